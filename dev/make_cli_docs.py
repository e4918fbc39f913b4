"""Write docs/cli.md from every recipe's own --help: `make docs`. tests/test_docs.py checks that the file is fresh.

A recipe is a file in scripts/ or nanochat/ that has `parse_args`; each is asked as a process of its own, in a fixed
environment, so that the text depends on the sources alone (and on Python's minor version, which the file records).
"""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"
FOLDERS = ("scripts", "nanochat")

INTRODUCTION = """\
# Command lines

Written by `make docs` with Python {version} from each recipe's `--help`. Do not edit it: change the recipe, then run
`make docs`.

Every flag may be spelled with dashes or underscores (`--device-batch-size`, `--device_batch_size`), with its value
joined by `=` or as the next word. Nothing may be abbreviated. All mistakes of a command line are told at once, and the
exit code is 2.
"""


def recipes() -> list[str]:
    """Module names of all recipes, in the page's order."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")) if path.name[0] != "_"]
    return [f"{path.parent.name}.{path.stem}" for path in files if _is_recipe(path)]


def _is_recipe(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "parse_args" for node in body)


def help_text(module: str) -> str:
    """What `python -m module --help` prints on a terminal of 100 columns, in a home of no one in particular."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
    environment |= {"COLUMNS": "100", "HOME": "/home/you", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command[1:])} left with {done.returncode}:\n{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page() -> str:
    """The whole text of docs/cli.md."""
    modules = recipes()
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(help_text, modules))
    parts = [INTRODUCTION.format(version=python_minor())]
    parts += [f"## python -m {module}\n\n```text\n{text}\n```\n" for module, text in zip(modules, texts)]
    return "\n".join(parts)


def python_minor() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(recipes())} recipes")
