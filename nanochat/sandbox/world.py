"""A root of its own: a file system in memory, in which only what is listed appears, read-only, and one folder to write.

The new root is put together below the old one, which then is taken away. Read-only files are the host's, bound in
place; the rest is made here.
"""

import os

from nanochat.sandbox import kernel

WORK = "/tmp"  # the one folder that the program may write
USER = 1000  # who it believes to be, where a user who is not root has started it
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
FILES = 4096  # at most, in the folder to write; each takes a little memory besides its bytes


def enter(folder: str, view: dict[str, list], disk_bytes: int, owner: int) -> None:
    """Make the view of this process's mount namespace the whole file system, with WORK as the current folder.

    folder: any empty one, in which the roots change places. view: `View.listed()`.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    new_memory(folder, 2**20, "755")
    os.mkdir(f"{folder}/old")
    os.mkdir(f"{folder}/new")
    kernel.pivot_root(folder, f"{folder}/old")
    os.chdir("/")
    new_memory("/new", 2**20, "755")
    for path in (WORK, "/dev"):
        os.mkdir(f"/new{path}")
    new_memory(f"/new{WORK}", disk_bytes, "700")
    os.chown(f"/new{WORK}", owner, owner)
    for target, text in view["links"]:
        make_parent(target)
        os.symlink(text, f"/new{target}")
    for target, source in view["bound"]:
        bind(source, target)
    for target in view["hidden"]:
        new_memory(f"/new{target}", 2**16, "755")
    for target, source in view["packages"]:
        bind(source, target)
    for path in DEVICES:
        os.close(os.open(f"/new{path}", os.O_CREAT | os.O_WRONLY, 0o666))
    kernel.make_read_only("/new")
    kernel.make_writable(f"/new{WORK}")
    for path in DEVICES:
        kernel.mount(f"/old{path}", f"/new{path}", None, kernel.MS_BIND)
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.detach(".")  # the old root, on top of the new one
    os.chdir(WORK)


def new_memory(target: str, size_bytes: int, mode: str) -> None:
    options = f"size={size_bytes},nr_inodes={FILES},mode={mode}"
    kernel.mount("tmpfs", target, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)


def bind(source: str, target: str) -> None:
    """Show a file or folder of the old root at `target`, unless it is there as a part of another one."""
    place = f"/new{target}"
    if not os.path.lexists(place):
        make_parent(target)
        if os.path.isdir(f"/old{source}"):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
    elif os.path.samefile(place, f"/old{source}"):
        return
    kernel.mount(f"/old{source}", place, None, kernel.MS_BIND | kernel.MS_REC)


def make_parent(target: str) -> None:
    os.makedirs(os.path.dirname(f"/new{target}"), exist_ok=True)
