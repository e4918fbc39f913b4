"""The table of devices: what a name finds, and what an unknown one hears."""

import os

import pytest

from nanochat.hardware import GPUS, Devices, core_flops, devices, expected_flops, find_gpu, peak_flops, usable_cores


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("AMD Instinct MI300X", 1.3074e15),
        ("AMD Instinct MI355X", 2.5e15),
        ("AMD Instinct MI250X / MI250", 191.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A3000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA B300 SXM6 AC", None),
        ("Some Future Device", None),
        ("", None),
    ],
)
def test_a_devices_peak_is_its_own_or_unknown(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_no_entry_of_the_table_hides_a_later_one() -> None:
    for gpu in GPUS:
        assert find_gpu(f"Vendor {gpu.words}") == gpu, gpu.words


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h100", 1, "H100"),
        ("1xH200", 1, "H200"),
        ("2 x RTX 4090", 2, "RTX4090"),
        ("RTX4090", 1, "RTX4090"),
        ("4*A100-SXM4-80GB", 4, "A100"),
        ("h100-pcie", 1, "H100-PCIE"),
        ("cpu", 1, "cpu"),
    ],
)
def test_a_machine_is_read_as_people_write_it(text: str, count: int, name: str) -> None:
    found = devices(text)
    assert (found.count, found.gpu.name if found.gpu else "cpu") == (count, name)
    assert devices(str(found)) == found


@pytest.mark.parametrize("text", ["", "9xH10", "TPU", "8x", "H100\nx", "x" * 500, "8xRTX 4090 Laptop GPU"])
def test_an_unknown_machine_hears_every_known_name_on_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="known") as caught:
        devices(text)
    told = str(caught.value)
    assert "\n" not in told and len(told) < 600
    assert all(gpu.name in told for gpu in GPUS) and "cpu" in told


def test_every_name_that_is_offered_is_taken() -> None:
    for gpu in GPUS:
        assert devices(f"8x{gpu.name}") == Devices(8, gpu)


def test_the_smaller_memory_of_a_card_is_believed_and_no_larger_one() -> None:
    sizes = {name: find_gpu(name) for name in ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB")}
    assert [gpu.memory_gb for gpu in sizes.values() if gpu] == [40, 80, 96]


def test_facts_of_the_table_are_plausible() -> None:
    for gpu in GPUS:
        assert 5e13 < gpu.flops < 5e15, gpu
        assert 20 <= gpu.memory_gb <= 300, gpu
        assert gpu.price is None or 0.2 <= gpu.price <= 10, gpu


def test_a_run_is_planned_with_a_share_of_the_peak_or_what_a_core_does() -> None:
    assert expected_flops(1e15) == 4e14 and expected_flops(None) == 5e10
    assert core_flops("float32") == core_flops("float64") == core_flops("bfloat16") / 2 == 6e10


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_that_the_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    assert 0 < usable_cores() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() <= 1
    finally:
        os.sched_setaffinity(0, allowed)
