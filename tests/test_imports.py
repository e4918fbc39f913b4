"""The house stands as drawn: rooms use rooms below only, imports do nothing, `--help` is instant."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The house, ground floor first. A module may import from lower floors only; a sub-package is one room, whose files may
# import each other. A new module gets its place here.
FLOORS = (
    ("common", "memory", "hardware"),
    ("kernels", "config", "loggers", "manifest", "parallel", "precision", "cli", "kinds", "cpp", "pickles", "runlock"),
    (
        "model",
        "optim",
        "loader",
        "packing",
        "sharding",
        "prefetch",
        "windows",
        "fim",
        "dataset",
        "sources",
        "stdlib_corpus",
        "chat",
        "abilities",
        "calculator",
        "knowledge",
        "machine",
        "phrasings",
        "tokenizer",
        "scaling",
    ),
    (
        "train",
        "engine",
        "tools",
        "python_tool",
        "sandbox",
        "checkpoint",
        "ancestor",
        "hub",
        "download",
        "forecast",
        "planning",
    ),
    ("evals", "serve", "tasks", "report", "inventory", "chaos", "costs"),
    ("doctor", "terminal"),
    ("scripts",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR = {
    ("common", "memory"),
    ("hardware", "common"),
    ("cli", "config"),
    ("cli", "kinds"),
    ("cli", "loggers"),
    ("kinds", "config"),
    ("kernels", "parallel"),
    ("kernels", "precision"),
    ("parallel", "precision"),
    ("prefetch", "loader"),
    ("loader", "windows"),
    ("windows", "dataset"),
    ("windows", "packing"),
    ("windows", "tokenizer"),
    ("loader", "dataset"),
    ("loader", "packing"),
    ("loader", "fim"),
    ("loader", "chat"),
    ("loader", "tokenizer"),
    ("chat", "tokenizer"),
    ("fim", "tokenizer"),
    ("dataset", "stdlib_corpus"),
    ("dataset", "download"),  # its command, imported when it runs
    ("dataset", "sources"),
    ("download", "hub"),
    ("optim", "sharding"),
    ("abilities", "calculator"),
    ("abilities", "chat"),
    ("abilities", "stdlib_corpus"),
    ("abilities", "knowledge"),
    ("abilities", "phrasings"),
    ("engine", "tools"),
    ("train", "checkpoint"),
    ("train", "forecast"),
    ("train", "planning"),
    ("forecast", "checkpoint"),
    ("planning", "forecast"),
}
COMMON_ONLY = {"cpp"}  # token counter and compile check are passed in by its recipe
LIBRARY = sorted((ROOT / "nanochat").rglob("*.py"))
SOURCES = LIBRARY + sorted((ROOT / "tasks").rglob("*.py")) + sorted((ROOT / "scripts").rglob("*.py"))
RECIPES = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if not path.name.startswith("_"))
WITHOUT_TORCH = (
    "common",
    "hardware",
    "config",
    "cli",
    "kinds",
    "loggers",
    "tokenizer",
    "chat",
    "dataset",
    "packing",
    "scaling",
    "forecast",
    "planning",
    "tools",
    "python_tool",
    "abilities",
    "sandbox.execute",
    "serve.access",
    "serve.limits",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def room_of(module: str) -> str:
    """The room a module belongs to: `nanochat.model.gpt` is in `model`, `tasks.gsm8k` in `tasks`; "" is nanochat."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "nanochat" else package


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) for every import of the project's own modules, in functions too."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            inside = [f"{origin}.{alias.name}" for alias in node.names]
            found = [module if module in MODULES else origin for module in inside]
        else:
            continue
        yield from (
            (node.lineno, module) for module in found if module.split(".")[0] in ("nanochat", "tasks", "scripts")
        )


def fault(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, or None."""
    here, there = room_of(importer), room_of(imported)
    if here == "scripts":
        return "a recipe never imports a recipe" if there == "scripts" and imported != "scripts" else None
    if there in ("scripts", "tasks") and here != "tasks":
        return "the library never imports scripts or tasks"
    if not there or here == there or (here, there) in SAME_FLOOR:
        return None
    if here in COMMON_ONLY and there != "common":
        return f"{here} imports common only"
    if FLOOR_OF[there] >= FLOOR_OF[here]:
        return f"{there} is on floor {FLOOR_OF[there]}, not below {here} on floor {FLOOR_OF[here]}"
    return None


def test_every_module_has_a_place_in_the_house():
    homeless = sorted({name for name in MODULES if room_of(name) and room_of(name) not in FLOOR_OF})
    assert homeless == [], "put these modules on a floor of FLOORS in tests/test_imports.py"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_lower_floors(module):
    faults = [
        f"line {line}: {imported}: {why}"
        for line, imported in imports_of(MODULES[module])
        if (why := fault(module, imported))
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("nanochat.engine", "nanochat.model.state", True),
        ("nanochat.model.gpt", "nanochat.model.layers", True),
        ("nanochat.loader", "nanochat.dataset", True),
        ("nanochat.dataset", "nanochat.loader", False),
        ("nanochat.common", "nanochat.config", False),
        ("nanochat.config", "nanochat.cli", False),
        ("nanochat.evals.chat", "tasks.common", False),
        ("nanochat.train.loop", "scripts.base_train", False),
        ("nanochat.cpp.order", "nanochat.common", True),
        ("nanochat.cpp.order", "nanochat.tokenizer", False),
        ("tasks.gsm8k", "tasks.common", True),
        ("tasks.gsm8k", "nanochat.report", False),
        ("scripts.base_train", "tasks.common", True),
        ("scripts.base_train", "scripts.base_loss", False),
    ],
)
def test_the_rules_allow_and_refuse_as_the_house_is_drawn(importer, imported, allowed):
    assert (fault(importer, imported) is None) == allowed


def test_imports_inside_functions_are_seen():
    path = ROOT / "scripts" / "base_train.py"
    seen = {module for _, module in imports_of(path)}
    assert {"nanochat.cli", "nanochat.loader", "nanochat.train.loop"} <= seen


# Importing has no effects -------------------------------------------------------------------------------------------

WATCHED_IMPORT = """
import importlib, json, os, sys, threading

third_party, modules = json.loads(sys.argv[1])
for name in third_party:
    importlib.import_module(name)
effects = []
watching = [True]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def watch(event, args):
    if not watching[0]:
        return
    if event == "open" and (set("wax+") & set(args[1] or "") or (args[2] or 0) & WRITING):
        effects.append(f"opens {args[0]} for writing")
    elif event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "socket.connect"):
        effects.append(event)
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
        effects.append(f"{event} {args[0]}")

sys.addaudithook(watch)
environment, threads = dict(os.environ), threading.active_count()
for name in modules:
    importlib.import_module(name)
    if dict(os.environ) != environment:
        effects.append(f"{name} changes the environment")
        environment = dict(os.environ)
    if threading.active_count() != threads:
        effects.append(f"{name} starts a thread")
        threads = threading.active_count()
watching[0] = False
print("RESULT" + json.dumps({"effects": effects, "loaded": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def requirements(table: str) -> list[str]:
    """Distribution names in a part of pyproject.toml: `dependencies`, or all of `optional-dependencies`."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # by hand: Python 3.10 has no tomllib
    if table == "dependencies":
        part = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    else:
        part = re.search(r"^\[project\.optional-dependencies\]\n(.*?)(?=^\[)", text, re.MULTILINE | re.DOTALL)
    assert part, f"pyproject.toml has no {table}"
    return re.findall(r"[\"']([A-Za-z0-9._-]+)[^\"']*[\"']", part[1])


def python_names(distributions: list[str]) -> set[str]:
    """Import names of the distributions that are installed, and the guess for those that are not."""
    wanted = {_plain(name) for name in distributions}
    names = {name.replace("-", "_") for name in wanted}
    for name, owners in packages_distributions().items():
        names |= {name} if wanted & {_plain(owner) for owner in owners} else set()
    return names


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-B", "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def watched_import() -> dict:
    """What happens when every module of the library is imported, one after the other, in a fresh process."""
    third_party = [name for name in requirements("dependencies") if name != "safetensors"] + ["safetensors.torch"]
    library = [name for name in MODULES if room_of(name) not in ("scripts", "tasks")]
    done = run_python(WATCHED_IMPORT, json.dumps([third_party, library]))
    assert done.returncode == 0, done.stderr
    printed, _, result = done.stdout.partition("RESULT")
    return {"printed": printed + done.stderr, **json.loads(result)}


def test_importing_the_library_prints_nothing(watched_import):
    assert watched_import["printed"] == ""


def test_importing_the_library_writes_starts_and_changes_nothing(watched_import):
    assert watched_import["effects"] == []


def test_importing_the_library_needs_no_optional_extra(watched_import):
    base = python_names(requirements("dependencies"))
    extras = python_names(requirements("optional-dependencies")) - base
    assert "pytest" in extras
    assert sorted(extras & set(watched_import["loaded"])) == []


def test_the_watch_sees_effects(tmp_path):
    """The test of the test: a module that does all that is forbidden is found out."""
    bad = tmp_path / "bad_module.py"
    bad.write_text(
        "import os, subprocess, sys, threading\n"
        "os.environ['ADDED_BY_IMPORT'] = '1'\n"
        f"open({str(tmp_path / 'left')!r}, 'w').close()\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "threading.Thread(target=threading.Event().wait, args=(5,), daemon=True).start()\n"
    )
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + WATCHED_IMPORT, '[[], ["bad_module"]]')
    effects = "\n".join(json.loads(done.stdout.partition("RESULT")[2])["effects"])
    for told in ("left for writing", "subprocess.Popen", "changes the environment", "starts a thread"):
        assert told in effects


@pytest.mark.parametrize("name", [name for name in WITHOUT_TORCH if f"nanochat.{name}" in MODULES])
def test_the_modules_that_run_before_torch_never_import_it(name):
    done = run_python(f"import sys, nanochat.{name}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr or f"nanochat.{name} imports torch"


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(f"scripts.{sys.argv[0]}", run_name="__main__")
except SystemExit as left:
    assert not left.code, left.code
else:
    raise AssertionError("--help did not end the recipe")
assert "torch" not in sys.modules, "imports torch before it reads its flags"
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_comes_without_torch_and_leaves_with_0(recipe):
    done = run_python(HELP, recipe)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert "--help" in done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_its_command_line_in_the_docstring_and_the_agreed_form(recipe):
    source = (ROOT / "scripts" / f"{recipe}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert f"-m scripts.{recipe}" in (ast.get_docstring(tree) or "")
    assert {"parse_args", "main"} <= functions
    assert re.search(r'^if __name__ == "__main__":\n    (cli\.)?run\(main\)\s*\Z', source, re.MULTILINE)
