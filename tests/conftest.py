"""Fixtures shared by all tests. Tests run on one thread each: two spinning threads on a shared core are far slower."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browsing import Page
    from hub_server import Server

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported anywhere
os.environ["RAYON_NUM_THREADS"] = "1"

# In the background a shell makes its jobs ignore Ctrl-C, and whatever they start as well; some tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are collected everywhere and skipped where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text, conversations and evaluation items: $NANOCHAT_TEST_DATA, else ../shared/data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("NANOCHAT_TEST_DATA", default))
    if not (path / "pretrain").is_dir():
        pytest.skip(f"no real data at {path}: set NANOCHAT_TEST_DATA to a folder that has pretrain/ and sft/")
    return path


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty base folder for runs, as $NANOCHAT_BASE_DIR."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture
def recurrent(monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds the tests' recurrent mixer to the table of mixers; returns its letter."""
    from recurrent import TinyRecurrent

    from nanochat.model.gpt import MIXERS

    monkeypatch.setitem(MIXERS, "R", TinyRecurrent)
    return "R"


# What recipes train on ---------------------------------------------------------------------------------------------

CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} + 1?"},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ]
    }
    for i in range(60)
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text: the sources of the tests."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        (folder / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of conversations about small sums."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in CHAT), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(base_dir: Path, text: Path) -> None:
    """A tokenizer of 400 tokens in the base folder."""
    from scripts import tok_train

    tok_train.main([f"--data-dir={text}", "--vocab-size=400"])


# A hub on this machine ------------------------------------------------------------------------------------------------


@pytest.fixture
def only_our_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the tests' own server is asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server has: five small shards."""
    from fetching import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def server(shards: Path) -> "Iterator[Server]":
    """A hub that serves them."""
    from hub_server import Server

    with Server(shards) as running:
        yield running


# A browser and what it visits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> "Iterator[object]":
    """Chromium; the test is skipped where there is none."""
    from browsing import running_browser

    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: object, request: pytest.FixtureRequest) -> "Iterator[Page]":
    """A fresh visitor of the module's server (its fixture `url`) whose console has nothing to complain about."""
    from browsing import Page

    page = Page(browser, request.getfixturevalue("url"), **getattr(request, "param", {}))
    yield page
    page.context.close()
    assert page.complaints == []
