"""What a user can get wrong: one clear line for each mistake, exit code 2, and nothing written or lost.

Data files, checkpoints, the training recipe and the conversation on the terminal have their own such tests beside them;
here are the process that runs a recipe (`common.run`), command lines and scripts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError
from scripts import base_train, tok_train

REPO = Path(__file__).resolve().parents[1]

RECIPE = '''
"""A recipe for tests, 100% small.

python recipe.py --depth=4
"""
import os
from nanochat.cli import Parser, one_of, positive_int, run
from nanochat.common import UserError

def parse_args(argv):
    parser = Parser(__doc__)
    parser.flag("--depth", positive_int, 4, "layers, 50% of the dial")
    parser.flag("--device-type", one_of("", "cpu", "cuda"), "", "where")
    parser.flag("--prompt", str, "", "text", "-p")
    parser.switch("--dry-run", "do 0% of the work")
    if os.environ.get("RESUMABLE"):
        parser.flag("--resume", str, "no", "from where")
    parser.check(lambda args: "--depth=13: unlucky" if args.depth == 13 else None)
    return parser.parse(argv)

def main(argv=None):
    args = parse_args(argv)
    if args.prompt == "disk":
        raise UserError("disk: full\\nmemory: full")
    if args.prompt == "stop":
        raise KeyboardInterrupt
    if args.prompt == "diverge":
        raise FloatingPointError("the loss is nan")
    if args.prompt == "echo":
        return print(input() + "|half \\ud800")
    if args.prompt == "many lines":
        for i in range(100_000):
            print(i, flush=True)
    if args.prompt == "many lines in one write":
        print("line\\n" * 100_000, end="")
    print(f"depth={args.depth} device={args.device_type!r} prompt={args.prompt!r} dry={args.dry_run}")

if __name__ == "__main__":
    run(main)
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory):
    """Runs the recipe above as a process of its own."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(RECIPE, encoding="utf-8")

    def call(*argv, stdin=b"", resumable=False, start_only=False, **environment):
        command = [sys.executable, "-c", "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "]
        command[-1] += "run_name='__main__')"
        command += [str(path), *argv]
        environment |= {"RESUMABLE": "1"} if resumable else {}
        environment = os.environ | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": REPO, "env": environment}
        if start_only:
            return subprocess.Popen(command, **pipes, text=True)
        done = subprocess.run(command, **pipes, input=stdin, timeout=60)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    return call


def run_module(name: str, *flags: str, base: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *flags]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment, timeout=120)


def lines_of(error: pytest.ExceptionInfo[UserError]) -> list[str]:
    return str(error.value).splitlines()


# As a process -----------------------------------------------------------------------------------------------------


def test_a_good_line_runs_and_leaves_with_0(recipe):
    done = recipe("--", "--device_type", "cpu", "-p", "two words", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "depth=4 device='cpu' prompt='two words' dry=True\n"


def test_a_bad_line_leaves_with_2_and_one_line_for_each_problem(recipe):
    done = recipe("--depth=0", "--depht=3", "--device-type=gpu")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(lines) == 3
    assert all(line.startswith("error: --") for line in lines)
    assert "error: --device-type=gpu: choose one of cpu, cuda" in lines


def test_a_broken_rule_or_a_user_error_leaves_with_2_and_no_traceback(recipe):
    done = recipe("--depth=13")
    assert (done.returncode, done.stderr) == (2, "error: --depth=13: unlucky\n")
    done = recipe("-p", "disk")
    assert (done.returncode, done.stderr) == (2, "error: disk: full\nerror: memory: full\n")


def test_an_interrupt_leaves_with_130_and_no_traceback(recipe):
    done = recipe("-p", "stop")
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
    goes_on = "; a training run goes on from its last checkpoint with --resume=auto"
    done = recipe("-p", "stop", resumable=True)
    assert (done.returncode, done.stderr) == (130, f"\ninterrupted{goes_on}\n")


def test_a_diverged_training_leaves_with_1_and_its_reason(recipe):
    done = recipe("-p", "diverge")
    assert (done.returncode, done.stderr) == (1, "error: the loss is nan\n")


def test_only_the_first_rank_tells_of_a_bad_line_but_each_of_its_own_trouble(recipe):
    for rank, lines in (("0", 1), ("1", 0)):
        done = recipe("--depth=0", RANK=rank, WORLD_SIZE="2")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, lines)
        assert recipe("-p", "disk", RANK=rank, WORLD_SIZE="2").stderr == "error: disk: full\nerror: memory: full\n"


def test_a_rank_that_is_no_number_is_one_clear_error(recipe):
    done = recipe(RANK="x", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: RANK=x: must be a whole number, as torchrun sets it; else unset it\n"


def test_a_reader_that_leaves_early_ends_the_process_quietly(recipe):
    for text in ("many lines", "many lines in one write"):
        process = recipe("-p", text, start_only=True)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 141)
        process.stderr.close()


def test_text_is_utf_8_whatever_the_terminal_claims_and_broken_bytes_pass(recipe):
    done = recipe("-p", "zażółć 你好", PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "prompt='zażółć 你好'" in done.stdout
    done = recipe("-p", "echo", stdin="你好 ".encode() + b"\xff\n", PYTHONIOENCODING="latin-1")
    assert done.stdout == "你好 \ufffd|half ?\n"


def test_help_shows_percent_signs_choices_as_typed_and_the_docstring(recipe):
    done = recipe("--depth=0", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("100% small", "50% of the dial (default 4)", "0% of the work", "cpu|cuda", "--prompt TEXT"):
        assert shown in done.stdout, shown


# Command lines ---------------------------------------------------------------------------------------------------


def test_every_flag_of_a_training_that_is_out_of_bounds_is_told_at_once(base_dir: Path) -> None:
    wrong = ["--depth=1001", "--max-seq-len=16777217", f"--seed={2**63}", "--head-dim=15", "--window-pattern=SLQ"]
    wrong += [
        "--layer-pattern=A A",
        "--residual=",
        "--target-param-data-ratio=1e-300",
        "--time-budget=1e99",
        "--run=a/b",
    ]
    wrong += ["--model-tag=a\tb", "--device-batch-size=9999999999999", "--matrix-lr=1e-400", "--device-type=gpu"]
    with pytest.raises(UserError) as caught:
        base_train.parse_args(wrong)
    for flag, told in zip(wrong, lines_of(caught), strict=True):
        assert told.startswith(flag.replace("\t", "\\t") + ": "), told
    assert not any("''" in told for told in lines_of(caught))
    assert not base_dir.exists()


def test_a_training_is_resumed_or_replaced_not_both() -> None:
    with pytest.raises(UserError) as caught:
        base_train.parse_args(["--resume=auto", "--overwrite"])
    assert lines_of(caught) == [
        "--resume, --overwrite: give one of them; one goes on with a run, the other replaces it"
    ]


def test_the_tokenizer_s_flags_have_bounds() -> None:
    with pytest.raises(UserError) as caught:
        tok_train.parse_args(["--vocab-size=1048577", "--depth=0", "--laws=none", "--max-chars=0"])
    assert [told.split("=")[0] for told in lines_of(caught)] == ["--vocab-size", "--depth", "--laws", "--max-chars"]


def test_an_empty_prompt_and_its_neighbours_leave_with_2_and_no_traceback(base_dir: Path) -> None:
    wrong = ["-p", "", "--top-k=-1", "--temperature=3", "--model-tag=.hidden", f"--seed={2**64}"]
    result = run_module("scripts.chat_cli", *wrong, base=base_dir, PYTHONIOENCODING="latin-1")
    assert (result.returncode, result.stdout) == (2, "")
    told = result.stderr.splitlines()
    assert [line.split("=")[0] for line in told] == [
        f"error: --{name}" for name in ("prompt", "top-k", "temperature", "model-tag", "seed")
    ]
    assert told[0] == "error: --prompt=: must not be empty; leave the flag out or give it a text"
    assert not base_dir.exists()


def test_downloading_data_without_the_network_is_refused_at_once(base_dir: Path) -> None:
    result = run_module("nanochat.dataset", "-n", "8", "--offline", base=base_dir)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "--data-dir" in result.stderr and not base_dir.exists()


@pytest.mark.parametrize("words", [["--bogus"], ["--smoke", "--bogus"]])
def test_the_main_script_names_an_argument_that_it_does_not_know(words: list[str], base_dir: Path) -> None:
    result = subprocess.run(["bash", "runs/runcpu.sh", *words], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --bogus: unknown argument") and len(result.stderr.splitlines()) == 1
    assert not base_dir.exists()


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, "neither HOME nor NANOCHAT_BASE_DIR is set"),
        (
            {"HOME": "/dev/null"},
            "/dev/null/.cache/nanochat: cannot be written to; choose another folder with NANOCHAT_BASE_DIR",
        ),
    ],
)
def test_the_main_script_needs_a_place_for_its_results(env: dict[str, str], told: str) -> None:
    env["PATH"] = os.environ["PATH"]
    result = subprocess.run(["bash", "runs/runcpu.sh"], capture_output=True, text=True, cwd=REPO, timeout=60, env=env)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {told}\n")


def test_no_line_of_a_script_is_longer_than_the_style_allows() -> None:
    long = [
        f"{path.name}:{number}"
        for path in sorted((REPO / "runs").glob("*.sh"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert long == []
