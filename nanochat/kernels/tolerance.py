"""How far right numbers may be from exact ones, for every check that runs something and looks at what came out."""

import torch


def tolerance(device: torch.device, dtype: torch.dtype) -> float:
    """The error, relative to the norm, that a sound product, or attention forward and backward, stays well below.

    Seen were 0.6 of a rounding in 16 bits, and 6 in 32 and 64 bits, where long sums add up. An attention window that
    ends one key too early is off by 0.1. Products in float32 may be made of TF32 on GPUs.
    """
    if dtype == torch.float32 and device.type != "cpu":
        return 4 * 2.0**-10
    return torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 64)
