"""The documentation says what the sources say."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from dev import make_cli_docs

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("nanochat", "tasks")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_the_page_of_command_lines_is_what_every_recipe_says_of_itself():
    written = make_cli_docs.PAGE.read_text(encoding="utf-8")
    recorded = re.search(r"with Python (\d+\.\d+)", written)
    assert recorded, "docs/cli.md does not say which Python wrote it: run make docs"
    if recorded[1] != make_cli_docs.python_minor():
        pytest.skip(f"docs/cli.md was written with Python {recorded[1]}; argparse words its help a little differently")
    assert written == make_cli_docs.page(), "docs/cli.md is out of date: run make docs"


def test_every_recipe_is_on_the_page_and_no_private_file_is():
    recipes = make_cli_docs.recipes()
    assert "scripts.base_train" in recipes
    assert not [name for name in recipes if "._" in name]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_hold(module):
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"(test_\w+)(?:\.py)?::(test_\w+)", page.read_text(encoding="utf-8"))
    assert page.stem != "training" or len(named) > 25
    for module, test in named:
        source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{module}::{test}"
