"""Processes below a process: finding them, ending them, and the memory that they hold. Only Linux tells; elsewhere
there are none to be found.

These functions need /proc of the world that they look at.
"""

import os


def children(pid: int) -> list[int]:
    """Processes that any thread of this one has started."""
    found = list[int]()
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:  # it has ended
        return found
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
        except OSError:  # the thread has ended
            continue
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all below it. Each is halted first, and asked for its children until it has no new ones."""
    try:
        os.kill(pid, 19)  # SIGSTOP
        known = set[int]()
        while new := set(children(pid)) - known:
            for child in new:
                kill_tree(child)
            known |= new
        os.kill(pid, 9)
    except (ProcessLookupError, PermissionError):  # it has ended, or is another user's
        return


def memory_bytes(pid: int) -> int:
    """What a process and all below it hold in memory, without files: what forked processes share counts for each."""
    return own_memory_bytes(pid) + sum(map(memory_bytes, children(pid)))


def own_memory_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    except OSError:  # it has ended
        return 0
    return sum(1024 * int(words[1]) for words in lines)


def num_threads(user: int) -> int:
    """Threads of all processes of a user."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it has ended
            continue
    return count
