"""FlashAttention 3 is found where it was installed or fetched before, and never fetched."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from nanochat.kernels.attention_ladder import AttentionCase, FlashAttention3, Rung, try_rung

CASE = AttentionCase(torch.device("cpu"), torch.float32, head_dim=16, groups=2)
RUNG = Rung("FlashAttention 3", FlashAttention3)

FUNCTION = '''"""Has the function of FlashAttention 3, as documented: window (left, right), -1 is endless."""
import torch


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    left, length = window_size[0], q.size(1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & ((distance <= left) | (left < 0)) if causal else torch.ones_like(distance) > 0
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2), None
'''

# The package `kernels` up to 0.13, since 0.14, since 0.17, and before 0.7: what of it we call.
LOADERS = {
    "named": "def get_local_kernel(repo_path, package_name):\n    return load(repo_path / 'build' / package_name)",
    "unnamed": "def get_local_kernel(repo_path, backend=None):\n    return load(repo_path / 'build' / 'flash_attn3')",
    "keywords": "def get_local_kernel(repo_path, *, backend=None, trust_remote_code=False):\n"
    "    return load(repo_path / 'build' / 'flash_attn3')",
    "too old": "def get_kernel(repo_id, revision):\n    raise AssertionError",
}
KERNELS = """import importlib.util
from huggingface_hub import constants

def load(folder):
    assert constants.HF_HUB_OFFLINE, "would fetch what the kernel depends on"
    spec = importlib.util.spec_from_file_location("flash_attn3_test", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, and an empty cache beside it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("flash_attn_interface", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # is taken back at the end
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    return folder


def fetch(folder: Path, repo: str, source: str = FUNCTION, kind: str = "kernels") -> None:
    """As the hub's client leaves a kernel in its cache."""
    build = folder / f"{kind}--{repo.replace('/', '--')}" / "snapshots" / ("a" * 40) / "build" / "flash_attn3"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(source, encoding="utf-8")


def test_without_either_the_reason_names_both_ways(site: Path) -> None:
    kernel, fault = try_rung(RUNG, CASE)
    assert kernel is None and "neither flash_attn_interface is installed, nor is one of kernels-community/" in fault


def test_an_installed_package_is_taken(site: Path) -> None:
    (site / "flash_attn_interface.py").write_text(FUNCTION, encoding="utf-8")
    kernel, fault = try_rung(RUNG, CASE)
    assert isinstance(kernel, FlashAttention3) and fault == ""


@pytest.mark.parametrize("kind", ["models", "kernels"])
@pytest.mark.parametrize("loader", ["named", "unnamed", "keywords"])
def test_a_cached_kernel_is_loaded_by_any_version_of_the_package_and_nothing_is_fetched(
    site: Path, loader: str, kind: str
) -> None:
    from huggingface_hub import constants

    (site / "kernels.py").write_text(KERNELS + LOADERS[loader], encoding="utf-8")
    fetch(site.parent / "cache", "kernels-community/flash-attn3", kind=kind)
    kernel, fault = try_rung(RUNG, CASE)
    assert isinstance(kernel, FlashAttention3) and fault == ""
    assert constants.HF_HUB_OFFLINE is False  # as it was before


def test_the_function_may_be_in_a_module_inside(site: Path) -> None:
    inside = (
        f"{FUNCTION}\nimport types\nflash_attn_interface = types.SimpleNamespace(flash_attn_func=flash_attn_func)\n"
    )
    (site / "kernels.py").write_text(KERNELS + LOADERS["unnamed"], encoding="utf-8")
    fetch(site.parent / "cache", "varunneal/flash-attention-3", inside + "del flash_attn_func")
    assert try_rung(RUNG, CASE)[1] == ""


@pytest.mark.parametrize(("loader", "told"), [("too old", "0.7 or later can"), (None, "No module named 'kernels'")])
def test_a_cached_kernel_that_nothing_can_load_is_told(site: Path, loader: str | None, told: str) -> None:
    if loader:
        (site / "kernels.py").write_text(KERNELS + LOADERS[loader], encoding="utf-8")
    fetch(site.parent / "cache", "kernels-community/flash-attn3")
    kernel, fault = try_rung(RUNG, CASE)
    assert kernel is None and told in fault
