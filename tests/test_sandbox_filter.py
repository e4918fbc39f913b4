"""The filter for system calls, also for other processors: its program runs on a small machine of our own."""

import os
import re
import signal
import struct
from pathlib import Path

import pytest

from nanochat.sandbox import kernel, seccomp


def verdict(machine: str, number: int, first_argument: int = 0, architecture: int | None = None) -> int:
    """What the filter returns for a call, by a small machine of our own."""
    code = seccomp.assemble(seccomp.program(machine))
    words = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: architecture or seccomp.ARCHITECTURES[machine]}
    words[seccomp.FIRST_ARGUMENT] = first_argument
    place = held = 0
    tests = {0x15: lambda k: held == k, 0x25: lambda k: held > k, 0x45: lambda k: bool(held & k)}
    while True:
        operation, yes, no, k = struct.unpack_from("=HBBI", code, 8 * place)
        place += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            held = words[k]
        else:
            place += yes if tests[operation](k) else no


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_the_filter_refuses_what_it_lists_on_every_processor(machine: str, column: int) -> None:
    clone = {"x86_64": 56, "aarch64": 220}[machine]
    refused = {numbers[column] for numbers in seccomp.numbers().values()} - {-1}
    allowed = {number for number in range(500) if verdict(machine, number) == seccomp.ALLOW}
    assert allowed == set(range(seccomp.NEWEST + 1)) - refused - {seccomp.CLONE3}
    assert {verdict(machine, number) & 0xFFFF for number in refused} == {seccomp.EPERM}
    assert {verdict(machine, number) & 0xFFFF for number in (435, 463, 499)} == {seccomp.ENOSYS}
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[machine]
    assert verdict(machine, 0, architecture=seccomp.ARCHITECTURES[other]) == seccomp.KILL
    assert (verdict("x86_64", 0x40000000) == seccomp.KILL) and clone in allowed | {kernel.CLONE}


@pytest.mark.skipif(not seccomp.ARCHITECTURES.get(os.uname().machine), reason="no filter for this processor")
def test_the_filter_refuses_a_clone_by_its_flags() -> None:
    machine = os.uname().machine
    assert verdict(machine, kernel.CLONE, signal.SIGCHLD) == seccomp.ALLOW
    for flag in (kernel.NEWNS, kernel.NEWUSER, kernel.NEWPID, kernel.NEWNET, kernel.NEWIPC, kernel.NEWUTS):
        assert verdict(machine, kernel.CLONE, flag | signal.SIGCHLD) & 0xFFFF == seccomp.EPERM


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


@pytest.mark.parametrize("column", [0, 1])
def test_the_numbers_of_calls_are_those_of_the_kernels_headers(column: int) -> None:
    if not os.path.exists(HEADERS[column]):
        pytest.skip("needs the kernel's headers")
    text = Path(HEADERS[column]).read_text(encoding="utf-8")
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    ours = {name: numbers[column] for name, numbers in seccomp.numbers().items()}
    wrong = {name: number for name, number in ours.items() if known.get(name, -1 if number < 0 else number) != number}
    assert wrong == {} and len(known.keys() & ours.keys()) > 70
