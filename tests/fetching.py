"""Fetching from a server of five small shards: what test_hub and test_download share."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hub_server import CLIMBMIX, Server

from nanochat.download import Wish, download
from nanochat.hub import Backoff, Hub
from nanochat.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"shard_{i:05}.parquet" for i in range(5)]
VAL = NAMES[-1]


def write_shard(path: Path, documents: int = 1500) -> None:
    """About 60 KB that do not compress away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{path.name} {i} {i * 7919 % 10007:x} {i**5:x} {i**9:x}" for i in range(documents)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1024)


def write_shards(folder: Path) -> Path:
    """What the server has: four train shards, one for validation, and a page about them."""
    for name in NAMES:
        write_shard(folder / name)
    (folder / "README.md").write_text("---\nlicense: odc-by\n---\n")
    return folder


def impatient(server: Server, attempts: int = 3) -> Hub:
    return Hub(server.url, Backoff(attempts=attempts, first_s=0.01))


def fetch(server: Server, folder: Path, num_train: int | None = 2, repo: str = CLIMBMIX, **options: object) -> None:
    download(repo, folder, Wish(num_train), hub=impatient(server), **options)


def command(server: Server, folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "nanochat.dataset", f"--data-dir={folder}", *flags]


def environment(server: Server, folder: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def start(server: Server, folder: Path, *flags: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        command(server, folder, *flags),
        cwd=ROOT,
        env=environment(server, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def assert_sound(folder: Path, shards: Path, *names: str) -> None:
    """The folder holds these shards byte for byte, a manifest of them, and nothing half done."""
    assert files_in(folder) == sorted([*names, *(["manifest.json"])])
    assert not (folder / ".download").exists()
    manifest = read_manifest(folder)
    assert manifest and manifest.names() == sorted(names)
    assert all((folder / name).read_bytes() == (shards / name).read_bytes() for name in names)
    assert {shard.name: shard.split for shard in manifest.shards if shard.split != "train"} in ({VAL: "val"}, {})
