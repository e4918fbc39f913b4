"""A filter for system calls: which the kernel answers, and which it refuses.

The program keeps what computing needs: memory, its own files, threads, clocks, pipes. Refused is what talks to other
machines and processes, changes the machine, holds memory beyond the limits, or is a known way into the kernel. What is
newer than this table does not exist for the program (ENOSYS), so a future call is no hole.

A filter is a program of the kernel's old packet filter (BPF): it loads a word of the call (its number, the processor's
architecture, an argument), compares, jumps forward, and returns a verdict. `assemble` turns lines with labels into it.
"""

import ctypes
import os
import struct

from nanochat.sandbox import kernel

# Words of `struct seccomp_data`, verdicts, operations: <linux/seccomp.h>, <linux/bpf_common.h>, <linux/audit.h>
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
OPERATIONS = {"load": 0x20, "equal": 0x15, "above": 0x25, "any_bit": 0x45, "return": 0x06}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000  # x86-64 has a second table of calls, with this bit
NEWEST = 462  # mseal, Linux 6.10

# Calls that are refused: their numbers on x86-64 and on the others; -1: has none there.
REFUSED = """
# the network, sockets of every family
socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242
# other processes
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, pidfd_open 434 434,
pidfd_getfd 438 438, pidfd_send_signal 424 424, process_madvise 440 440, process_mrelease 448 448
# file systems and roots
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, swapon 167 224, swapoff 168 225,
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
mount_setattr 442 442, statmount 457 457, listmount 458 458, name_to_handle_at 303 264, mknod 133 -1,
open_by_handle_at 304 265, mknodat 259 33, quotactl 179 60, quotactl_fd 443 443, fanotify_init 300 262,
fanotify_mark 301 263
# namespaces
unshare 272 97, setns 308 268
# ways into the kernel
bpf 321 280, userfaultfd 323 282, perf_event_open 298 241, io_uring_setup 425 425, io_uring_enter 426 426,
io_uring_register 427 427, keyctl 250 219, add_key 248 217, request_key 249 218, io_setup 206 0,
io_submit 209 2, vmsplice 278 75, modify_ldt 154 -1, uselib 134 -1, ustat 136 -1, sysfs 139 -1,
_sysctl 156 -1, lookup_dcookie 212 18, nfsservctl 180 42, remap_file_pages 216 234
# the machine
kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, reboot 169 142, finit_module 313 273,
delete_module 176 106, create_module 174 -1, acct 163 89, settimeofday 164 170, clock_settime 227 112,
adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, iopl 172 -1,
ioperm 173 -1, syslog 103 116, vhangup 153 58, personality 135 92
# memory that no limit counts, or that stays when its process is gone
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmat 30 196, msgget 68 186, semget 64 190,
mq_open 240 180, mbind 237 235, set_mempolicy 238 237, migrate_pages 256 238, move_pages 279 239
"""
# A clone with flags of namespaces is refused too. Those of clone3 are out of a filter's sight; the C library then falls
# back on clone.
CLONE3 = 435

Line = tuple[str, int, str, str]  # operation, its number, label if it holds, label if not ("": the next line)


def numbers() -> dict[str, tuple[int, int]]:
    """The refused calls by name."""
    lines = [line.rstrip(",") for line in REFUSED.splitlines() if line and not line.startswith("#")]
    calls = [call.split() for line in lines for call in line.split(", ")]
    return {name: (int(x86), int(other)) for name, x86, other in calls}


def program(machine: str) -> list[Line | str]:
    """The filter for a processor; a line that is only a text is a label."""
    is_x86 = machine == "x86_64"
    refused = sorted(number for x86, other in numbers().values() if (number := x86 if is_x86 else other) >= 0)
    return [
        ("load", ARCHITECTURE, "", ""),
        ("equal", ARCHITECTURES[machine], "", "kill"),
        ("load", NUMBER, "", ""),
        *([("above", X32_BIT - 1, "kill", "")] if is_x86 else []),
        ("above", NEWEST, "unknown", ""),
        ("equal", CLONE3, "unknown", ""),
        *[("equal", number, "refuse", "") for number in refused],
        ("equal", kernel.CLONE, "clone", "allow"),
        "clone",
        ("load", FIRST_ARGUMENT, "", ""),
        ("any_bit", kernel.EVERY_NAMESPACE, "refuse", "allow"),
        *("refuse", ("return", ERRNO | EPERM, "", "")),
        *("unknown", ("return", ERRNO | ENOSYS, "", "")),
        *("kill", ("return", KILL, "", "")),
        *("allow", ("return", ALLOW, "", "")),
    ]


def assemble(lines: list[Line | str]) -> bytes:
    """The kernel's form: 8 bytes a line, labels turned into the number of lines to skip."""
    places, code = dict[str, int](), list[Line]()
    for line in lines:
        if isinstance(line, str):
            places[line] = len(code)
        else:
            code.append(line)

    def skip(label: str, place: int) -> int:
        return places[label] - place - 1 if label else 0

    return b"".join(
        struct.pack("=HBBI", OPERATIONS[operation], skip(yes, place), skip(no, place), number)
        for place, (operation, number, yes, no) in enumerate(code)
    )


def install() -> None:
    """From here on, for this process and all that it starts. Needs no_new_privs."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(EPERM, f"no filter for system calls is written for {machine}")
    code = ctypes.create_string_buffer(assemble(program(machine)))
    pointer = struct.pack("HxxxxxxP", (len(code) - 1) // 8, ctypes.addressof(code))  # struct sock_fprog
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, pointer)
