"""What a program gets to see of the machine's files, and how it is started."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from nanochat.common import UserError

LIBRARIES = ("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
TOOLCHAIN = ("/usr/include", "/usr/libexec", "/usr/local/include")
LIBRARY_CACHE = "/etc/ld.so.cache"  # where the dynamic linker looks first
COMPILERS = ("g++", "clang++")
PACKAGE = Path(__file__).resolve().parents[1]
CODE = "/code"  # where bubblewrap shows the launcher's own sources
TOOLS = ("as", "ld", "ld.bfd", "ld.gold", "ld.lld")  # what a compiler starts, besides programs in its own folders


@dataclass(frozen=True)
class View:
    """Files and folders that are shown, read-only. `hidden`: folders in them that are shown empty; `packages`: of
    those, and of others, the ones that are shown all the same."""

    shown: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def listed(self) -> dict[str, list]:
        """For the launcher, which knows only plain values: each place, and the file that is shown there."""
        links = [path for path in LIBRARIES if path in self.shown and os.path.islink(path)]
        bound = [path for path in sorted({*self.shown}) if path not in links and os.path.exists(path)]
        return {
            "links": [(path, os.readlink(path)) for path in links],
            "bound": [(path, os.path.realpath(path)) for path in bound],
            "hidden": [os.path.realpath(path) for path in self.hidden if os.path.isdir(path)],
            "packages": [(path, os.path.realpath(path)) for path in self.packages],
        }

    def by_bubblewrap(self, work: str, devices: Sequence[str], disk_bytes: int, user: int) -> list[str]:
        """The same for bubblewrap, which is then to start the launcher's inner half. Empty where there is none."""
        program, listed = which("bwrap"), self.listed()
        if program is None:
            return []
        words = [program, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
        words += ["--uid", f"{user}", "--gid", f"{user}", "--size", f"{disk_bytes}", "--perms", "0700", "--tmpfs", work]
        words += [word for path, text in listed["links"] for word in ("--symlink", text, path)]
        # The launcher is written in Python, so what that needs is shown in any case.
        bound = {**dict(python_view(()).listed()["bound"]), **dict(listed["bound"])}
        words += [word for path, source in bound.items() for word in ("--ro-bind", source, path)]
        words += [word for path in listed["hidden"] for word in ("--tmpfs", path, "--remount-ro", path)]
        words += [word for path, source in listed["packages"] for word in ("--ro-bind", source, path)]
        words += [word for path in devices for word in ("--dev-bind", path, path)]
        for part in ("__init__.py", "sandbox"):
            words += ["--ro-bind", str(PACKAGE / part), f"{CODE}/nanochat/{part}"]
        return [*words, "--remount-ro", "/", "--chdir", work, *start(CODE, "inside")]


def start(folder: str, function: str) -> list[str]:
    """The command that starts a function of the launcher's, with the sources in this folder."""
    code = f"import sys; sys.path[:0] = [{folder!r}]; from nanochat.sandbox import launcher; launcher.{function}()"
    return [interpreter(), "-I", "-S", "-c", code]


def interpreter() -> str:
    """The running Python's own program; a virtual environment's is a link to it."""
    return os.path.realpath(sys.executable)


def python_view(packages: Sequence[Path]) -> View:
    """The interpreter, its standard library, shared libraries, and packages in these folders."""
    for folder in packages:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: is no folder; packages are folders from which a program may import")
    standard = Path(sysconfig.get_path("stdlib"))
    others = (standard / "site-packages", standard.parent / "python3" / "dist-packages")
    shown = (*LIBRARIES, LIBRARY_CACHE, str(standard.parent), interpreter())
    return View(shown, tuple(map(str, others)), tuple(str(Path(folder).absolute()) for folder in packages))


def find_compiler() -> str | None:
    """The machine's C++ compiler."""
    return next((path for name in COMPILERS if (path := which(name))), None)


def cpp_view(compiler: str) -> View:
    """A compiler with its headers, libraries and the programs that it starts."""
    tools = tuple(path for name in TOOLS if (path := which(name)))
    home = Path(os.path.realpath(compiler)).parent.parent  # of a compiler that does not belong to the system
    own = () if home == Path("/usr") else (str(home),)
    return View((*LIBRARIES, LIBRARY_CACHE, *TOOLCHAIN, *tools, *own, compiler, os.path.realpath(compiler)))
