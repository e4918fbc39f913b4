"""A fixed little training ends where it always did; `dev/golden.py --against=COMMIT` compares two commits exactly."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "dev"))

from golden import STEPS, furthest  # noqa: E402


def test_the_losses_of_two_hundred_fixed_steps_are_the_stored_ones() -> None:
    done = subprocess.run([sys.executable, ROOT / "dev" / "golden.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"base: {STEPS} steps" in done.stdout and f"sft: {STEPS} steps" in done.stdout


def test_a_changed_loss_and_a_missing_step_are_noticed() -> None:
    stored = json.loads((ROOT / "tests" / "golden.json").read_text())
    assert furthest(stored, stored) == 0
    changed = {**stored, "sft": [loss * (1 + 2e-3 * (step == 70)) for step, loss in enumerate(stored["sft"])]}
    assert 1.9e-3 < furthest(changed, stored) < 2.1e-3
    assert furthest({**stored, "base": stored["base"][:-1]}, stored) == float("inf")
