"""What no source may do: depend on much, catch broadly, load code from data, read the environment anywhere."""

import ast

import pytest
from test_imports import MODULES, requirements


def test_there_are_at_most_ten_base_dependencies():
    names = requirements("dependencies")
    assert "torch" in names
    assert len(names) == len(set(names)) <= 10


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_NAMES = {"eval", "exec", "__import__"}
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("builtins", "exec"), ("builtins", "eval")}


def unsafe_lines(source: str) -> list[str]:
    """`line: what` for each broad except, pickle, eval, exec, torch.load and shell in a source text."""
    return [f"{node.lineno}: {what}" for node in ast.walk(ast.parse(source)) if (what := _unsafe(node))]


def _unsafe(node: ast.AST) -> str | None:
    if isinstance(node, ast.ExceptHandler):
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = [kind for kind in kinds if kind is None or getattr(kind, "id", "") in ("Exception", "BaseException")]
        return "catches broadly" if broad else None
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return next((f"imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES), None)
    if isinstance(node, ast.keyword):
        on = isinstance(node.value, ast.Constant) and node.value.value is True
        return f"{node.arg}=True" if on and node.arg in ("allow_pickle", "shell", "trust_remote_code") else None
    if isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
        return f"uses {node.id}"
    if isinstance(node, ast.Attribute) and (getattr(node.value, "id", ""), node.attr) in UNSAFE_CALLS:
        return f"uses {node.value.id}.{node.attr}"
    return None


# At the boundary of a thread that works for others: an answer that fails must not end the worker for all that follow,
# a dashboard that fails must not end the training, a kernel that fails must be passed over.
ALLOWED = {
    f"nanochat.{module}": ["catches broadly"]
    for module in ("serve.workers", "train.metrics", "kernels.attention_ladder")
}
# The sandbox runs programs, that is what it is for: inside of it, where whatever they raise is caught and told. Its
# plan goes to its own launcher as marshal, which starts sooner than what can read anything else.
ALLOWED |= {f"nanochat.sandbox.{module}": ["imports marshal"] for module in ("execute", "launcher", "supervise")}
RUNNING = {"imports marshal", "catches broadly", "uses exec", "uses __import__"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_source_catches_broadly_or_loads_code_from_data(module):
    found = unsafe_lines(MODULES[module].read_text(encoding="utf-8"))
    told = [line.partition(": ")[2] for line in found]
    if module == "nanochat.sandbox.harness":
        assert set(told) == RUNNING
    else:
        assert told == ALLOWED.get(module, [])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("try:\n    pass\nexcept:\n    pass", ["3: catches broadly"]),
        ("try:\n    pass\nexcept Exception:\n    pass", ["3: catches broadly"]),
        ("try:\n    pass\nexcept (OSError, BaseException):\n    pass", ["3: catches broadly"]),
        ("try:\n    pass\nexcept (OSError, KeyError):\n    pass", []),
        ("from pickle import loads", ["1: imports pickle"]),
        ("x = eval('1')", ["1: uses eval"]),
        ("model.eval()", []),
        ("import torch\ntorch.load('f')", ["2: uses torch.load"]),
        ("np.load('f', allow_pickle=True)", ["1: allow_pickle=True"]),
        ("np.load('f', allow_pickle=False)", []),
    ],
)
def test_unsafe_lines_are_found(source, found):
    assert unsafe_lines(source) == found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"nanochat.common", "nanochat.parallel"}))
def test_the_environment_is_read_in_common_and_parallel_only(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    reads = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    ]
    assert reads == [], "read it in nanochat/common.py and pass it on"
