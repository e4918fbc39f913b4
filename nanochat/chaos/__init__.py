"""Proof that nothing is lost: real training processes, killed or given failing disks, and what must hold after."""
