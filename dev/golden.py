"""The losses of a small, fixed training: proof that a change alters no number.

    python dev/golden.py                     losses of this tree, against the stored ones (1e-3, any machine)
    python dev/golden.py --against=COMMIT    side by side with another commit, on this machine: must be equal to the bit
    python dev/golden.py --write             store this tree's losses in tests/golden.json

A tokenizer, 100 steps of pretraining at depth 2 and 100 of fine-tuning, through the recipes, on text and conversations
that are made here from a fixed seed. Recipes are called with flags that have been there from the first version on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "golden.json"
STEPS = 100
NOUNS = [
    "tree",
    "river",
    "stone",
    "bird",
    "house",
    "wind",
    "lamp",
    "boat",
    "road",
    "field",
    "child",
    "king",
    "song",
    "fire",
    "door",
    "year",
]
VERBS = [
    "sees",
    "finds",
    "loses",
    "follows",
    "carries",
    "builds",
    "leaves",
    "hears",
    "holds",
    "turns",
    "breaks",
    "keeps",
]


def sentences(random: Random, count: int) -> str:
    noun, verb = lambda: random.choice(NOUNS), lambda: random.choice(VERBS)
    return " ".join(f"The {noun()} {verb()} the {noun()}, and {random.randint(0, 99)} times." for _ in range(count))


def write_data(folder: Path) -> None:
    """Documents of 1 to 60 sentences, and questions with short answers."""
    random = Random(7)
    for shard in range(2):
        texts = [json.dumps({"text": sentences(random, random.randint(1, 60))}) for _ in range(120)]
        (folder / f"text{shard}.jsonl").write_text("\n".join(texts) + "\n")
    talks = []
    for _ in range(300):
        a, b = random.randint(0, 50), random.randint(0, 50)
        turns = [{"role": "user", "content": f"{sentences(random, 1)} What is {a}+{b}?"}]
        talks.append(json.dumps({"messages": [*turns, {"role": "assistant", "content": f"It is {a + b}."}]}))
    (folder / "talks.jsonl").write_text("\n".join(talks) + "\n")


def train(tree: Path) -> dict[str, list[float]]:
    """Losses of both stages, as the recipes of `tree` train them."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_data(work)
        (work / "text").mkdir()
        for shard in work.glob("text*.jsonl"):
            shard.rename(work / "text" / shard.name)
        base = work / "base"
        run = ["--seed=1", f"--num-iterations={STEPS}", "--eval-every=-1", "--logger=none", "--device-type=cpu"]
        batch = ["--device-batch-size=4", "--total-batch-size=1024"]
        recipe(tree, base, "tok_train", f"--data-dir={work / 'text'}", "--vocab-size=384")
        # Without backout, which depth 2 has not had since the laws leave it out: so that earlier commits compare, too.
        shape = ["--depth=2", "--max-seq-len=128", "--no-backout", f"--data-dir={work / 'text'}"]
        recipe(tree, base, "base_train", *shape, *run, *batch)
        recipe(tree, base, "chat_sft", f"--data={work / 'talks.jsonl'}", *run, *batch)
        return {stage: losses(base / "checkpoints" / stage / "d2" / "metrics.jsonl") for stage in ("base", "sft")}


def recipe(tree: Path, base: Path, name: str, *flags: str) -> None:
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32"}
    command = [sys.executable, "-m", f"scripts.{name}", *flags]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} in {tree} failed:\n{done.stdout}{done.stderr}")


def losses(path: Path) -> list[float]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["loss_raw"] for record in records if "loss_raw" in record]


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def furthest(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    """The largest relative difference; infinite where a stage has more or fewer steps."""
    pairs = [(ours[stage], theirs[stage]) for stage in theirs]
    if any(len(a) != len(b) for a, b in pairs):
        return float("inf")
    return max(abs(x - y) / abs(y) for a, b in pairs for x, y in zip(a, b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    ours = train(ROOT)
    if args.write:
        STORED.write_text(json.dumps(ours, indent=1) + "\n")
    if args.against:
        with checked_out(args.against) as tree:
            theirs, allowed = train(tree), 0.0
    else:
        theirs, allowed = json.loads(STORED.read_text()), 1e-3
    apart = furthest(ours, theirs)
    for stage in ours:
        print(f"{stage}: {len(ours[stage])} steps, first {ours[stage][0]:.6f}, last {ours[stage][-1]:.6f}")
    print(f"largest relative difference from {args.against or STORED.name}: {apart:.3g} (allowed {allowed:g})")
    sys.exit(not apart <= allowed)  # a NaN is apart, too


if __name__ == "__main__":
    main()
