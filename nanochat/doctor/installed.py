"""What stands on the disk: packages, tokenizer, text, models. Each is loaded or read, not only looked for."""

import importlib
import importlib.metadata
import platform
import re
from argparse import Namespace
from pathlib import Path

from nanochat.common import UserError, base_dir
from nanochat.doctor.result import Request, Result

DEVELOPMENT = ("browser", "dev")  # extras that no user needs
CLAUSE = re.compile(r"(>=|<)\s*([\d.]+)")


# Packages --------------------------------------------------------------------------------------------------------


def packages(request: Request) -> Result:
    """Every package that training imports, and the version of each against the range that was tested."""
    wanted = requirements()
    absent = {name: fault for name in wanted if (fault := import_fault(name))}
    versions = {name: installed_version(name) for name in wanted if name not in absent}
    numbers = {"python": platform.python_version(), "versions": versions}
    seen = f"Python {platform.python_version()}, torch {versions.get('torch', 'none')}, {len(versions)} packages load"
    if absent:
        faults = "; ".join(f"{name}: {fault}" for name, fault in absent.items())
        return Result("missing", f"{seen}, not {faults}", "bash runs/setup.sh installs them", numbers)
    found = {"python": platform.python_version(), **versions}
    ranges = {"python": python_range(), **wanted}
    odd = [f"{name} {found[name]} ({ranges[name]})" for name in found if not is_within(found[name], ranges[name])]
    if odd:
        return Result("slow", f"{seen}; not tested: {', '.join(odd)}", "bash runs/setup.sh installs what was", numbers)
    return Result("ok", f"{seen}, in the versions that were tested", "", numbers)


def import_fault(name: str) -> str | None:
    """Why a package cannot be imported; None: it can."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return "not installed" if getattr(error, "name", None) == name else str(error).splitlines()[0]
    return None


def installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def is_within(version: str, allowed: str) -> bool:
    """Whether a version is in a range such as `>=2.9,<2.14`. What is no number counts as within.

    >>> is_within("2.13.0+cpu", ">=2.9,<2.14"), is_within("2.14.1", ">=2.9,<2.14"), is_within("2.9", ">=2.9")
    (True, False, True)
    """
    found = numbers_of(version)
    return not found or all(
        found >= numbers_of(bound) if sign == ">=" else found < numbers_of(bound)
        for sign, bound in CLAUSE.findall(allowed)
    )


def numbers_of(version: str) -> tuple[int, ...]:
    """
    >>> numbers_of("2.13.0+cpu")
    (2, 13, 0)
    """
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


# What the project asks for -------------------------------------------------------------------------------------------


def project() -> str:
    """The text of pyproject.toml. By hand below: Python 3.10 has no reader for it. Raises UserError without one."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    if not path.is_file():
        raise UserError(f"{path}: is not there, so nobody knows what to look for; run this in a copy of the sources")
    return path.read_text(encoding="utf-8")


def python_range() -> str:
    found = re.search(r'^requires-python = "(.*)"', project(), re.MULTILINE)
    return found[1] if found else ""


def requirements() -> dict[str, str]:
    """The packages of `dependencies`: import name -> range."""
    found = re.search(r"^dependencies = \[(.*?)^\]", project(), re.MULTILINE | re.DOTALL)
    return ranges_in(found[1]) if found else {}


def extra_packages() -> dict[str, list[str]]:
    """Extra -> import names of its packages; without those of developers."""
    table = re.search(r"^\[project\.optional-dependencies\]\n(.*?)(?=^\[)", project(), re.MULTILINE | re.DOTALL)
    groups = re.findall(r"^(\w+) = \[(.*?)\]", table[1] if table else "", re.MULTILINE | re.DOTALL)
    return {name: list(ranges_in(group)) for name, group in groups if name not in DEVELOPMENT}


def ranges_in(text: str) -> dict[str, str]:
    found = re.findall(r'"([\w.-]+)([^"]*)"', text)
    return {name.replace("-", "_"): allowed for name, allowed in found}


def extras(request: Request) -> Result:
    """Optional packages: the chat server and dashboards."""
    found = {
        name: not any(map(import_fault, packages_of_extra)) for name, packages_of_extra in extra_packages().items()
    }
    there, absent = ([name for name in found if found[name] is is_there] for is_there in (True, False))
    seen = f"installed: {', '.join(there) or 'none'}" + (f"; not installed: {', '.join(absent)}" if absent else "")
    if "serve" in absent:
        return Result("missing", seen, "for the chat page: bash runs/setup.sh serve", {"installed": found})
    return Result("ok", seen, "", {"installed": found})  # dashboards are a matter of taste


# In the base folder ----------------------------------------------------------------------------------------------


def tokenizer(request: Request) -> Result:
    """The tokenizer of the base folder gives back what it was given."""
    from nanochat.tokenizer import Tokenizer

    folder = base_dir() / "tokenizer"
    if not folder.exists():
        return Result("missing", f"{folder}: not there yet", "train one: python -m scripts.tok_train")
    loaded = Tokenizer.load(folder)
    text = "It costs 37 * 24 = 888, naïve as it is. 日本語 🙂\n\tdef f(x): return x"
    if loaded.decode(loaded.encode(text)) != text:
        return Result("failed", f"{folder}: changes the text that goes through it", "train it anew: scripts.tok_train")
    seen = f"{folder}: {loaded.vocab_size:,} tokens; a text comes back as it was"
    return Result("ok", seen, "", {"vocab_size": loaded.vocab_size})


def text(request: Request) -> Result:
    """The text that training would read without --data-dir: the first document of each side."""
    from nanochat.cli import data_folder
    from nanochat.dataset import open_corpus

    corpus = open_corpus(data_folder(Namespace(data_dir="")))
    sides = {side.name: len(next(side.documents(), "")) for side in (corpus.train, corpus.val)}
    sizes = ", ".join(f"{side} {size:,}" for side, size in sides.items())
    seen = f"{corpus.describe()}; characters of the first documents: {sizes}"
    if not all(sides.values()):
        return Result("failed", seen, "one side is empty: give other text with --data-dir", {"first_chars": sides})
    return Result("ok", seen, "", {"first_chars": sides})


def models(request: Request) -> Result:
    """What models there are, and whether their files are all there."""
    from nanochat.inventory import find_models

    found = find_models()
    names = ", ".join(model.name for model in found[:5]) + (", ..." if len(found) > 5 else "")
    damaged = [model.name for model in found if model.damaged]
    numbers = {"models": len(found), "damaged": damaged}
    if not found:
        where = base_dir() / "checkpoints"
        return Result("missing", f"{where}: no models yet", "train one: python -m scripts.base_train", numbers)
    if damaged:
        seen = f"{len(found)} models; damaged: {', '.join(damaged)}"
        return Result("failed", seen, "python -m scripts.models shows what is wrong and deletes", numbers)
    return Result("ok", f"{len(found)} models: {names}; all their files are there", "", numbers)
