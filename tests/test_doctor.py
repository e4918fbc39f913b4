"""scripts.doctor runs what it reports on, and tells it to people and to programs."""

from pathlib import Path

import pytest
import torch
from visiting import Visit, fake_package

from nanochat.common import UserError
from nanochat.doctor import kernels
from nanochat.doctor.checks import CHECKS, find_check
from nanochat.doctor.installed import extra_packages, requirements
from nanochat.kernels.attention_ladder import LADDER
from nanochat.model.gpt import attention_case
from nanochat.scaling import model_config
from scripts import doctor


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """All checks on this machine, for a base folder that is not there yet."""
    base = tmp_path_factory.mktemp("doctor") / "not" / "there"
    return Visit("--device-type=cpu", "--offline", NANOCHAT_BASE_DIR=str(base))


def test_every_check_reports_in_the_order_of_the_table(whole: Visit) -> None:
    assert list(whole.checks) == [check.name for check in CHECKS]
    assert whole.code == 0 and whole.record["ok"] is True and whole.errors == ""
    for name, check in whole.checks.items():
        assert check["state"] in doctor.COLOURS and check["seen"] and "\n" not in check["seen"], name
        assert bool(check["advice"]) == (check["state"] != "ok"), name
        assert check["seconds"] > 0


def test_what_training_needs_works_here_and_comes_with_numbers(whole: Visit) -> None:
    assert {whole.states()[check.name] for check in CHECKS if check.needed} <= {"ok", "slow"}
    numbers = {name: check["numbers"] for name, check in whole.checks.items()}
    assert numbers["device"]["flops_per_s"] > 1e9 and 0 < numbers["device"]["error"] < 0.01
    assert numbers["dtype"]["flops_per_s"]["float32"] > 1e9 and numbers["dtype"]["chosen"] in ("float32", "bfloat16")
    assert numbers["packages"]["versions"]["torch"] == torch.__version__
    assert numbers["memory"]["touched_bytes"] > 2**20 and numbers["memory"]["bytes_per_s"] > 0
    assert numbers["disk"]["write_bytes_per_s"] > 0 and numbers["disk"]["read_bytes_per_s"] > 0
    assert 5e9 < numbers["disk"]["checkpoint_bytes"] < 2e10
    assert numbers["text"]["first_chars"].keys() == {"train", "val"}


def test_two_processes_really_add_up(whole: Visit) -> None:
    check = whole.checks["ranks"]
    assert (check["state"], check["numbers"]["ranks"], check["numbers"]["backend"]) == ("ok", 2, "gloo")


def test_the_table_that_people_see_has_a_row_for_every_check(whole: Visit) -> None:
    lines = whole.printed.splitlines()
    assert [line.split()[0] for line in lines[:-3] if line[0] != " "] == [check.name for check in CHECKS]
    assert lines[-3:-1] == ["", "nothing hinders training"]
    assert {line.index(line.split(maxsplit=2)[2]) for line in lines[:-3] if line[0] != " "} == {doctor.MARGIN}


def test_nothing_is_left_behind(whole: Visit) -> None:
    folder = Path(whole.checks["disk"]["numbers"]["folder"])
    assert folder.name == "there" and not folder.parent.exists() and folder.parents[1].is_dir()


@pytest.mark.parametrize("only", ["nothing", "device,nothing", ""])
def test_an_unknown_check_is_refused_with_those_that_are_known(only: str) -> None:
    with pytest.raises(UserError, match=r"no such check: .*choose some of packages, device, "):
        doctor.parse_args([f"--only={only}"])
    with pytest.raises(UserError, match="no such check"):
        find_check("nothing")


def test_a_package_that_does_not_load_is_named(tmp_path: Path) -> None:
    visit = Visit("--only=packages", **fake_package(tmp_path, "tiktoken", "raise ImportError('wrong libc')"))
    assert visit.code == 1 and visit.states() == {"packages": "missing"}
    assert "not tiktoken: wrong libc" in visit.checks["packages"]["seen"]


def test_what_the_project_asks_for_is_read_from_its_own_file() -> None:
    assert requirements().keys() >= {"torch", "numpy", "huggingface_hub"} and ">=" in requirements()["torch"]
    assert extra_packages()["serve"] == ["pygments", "starlette", "uvicorn"] and "dev" not in extra_packages()


def test_every_attention_kernel_is_tried_and_refused_with_a_reason(whole: Visit) -> None:
    numbers = whole.checks["attention"]["numbers"]
    assert list(numbers["rungs"]) == [rung.name for rung in LADDER]
    assert numbers["rungs"][numbers["taken"]].startswith("works, tried in ")
    assert all(f"{name}: {outcome}" in whole.checks["attention"]["seen"] for name, outcome in numbers["rungs"].items())


def test_attention_is_tried_as_a_model_has_it(whole: Visit) -> None:
    case = attention_case(model_config(20), torch.device("cpu"), torch.float32)
    numbers = whole.checks["attention"]["numbers"]
    assert (numbers["head_dim"], numbers["windows"]) == (case.head_dim, case.windows) == (128, True)


def test_fp8_is_emulated_where_it_is_not_in_hardware(whole: Visit) -> None:
    numbers = whole.checks["fp8"]["numbers"]
    assert numbers.keys() == {"tensorwise", "rowwise"}
    for found in numbers.values():
        assert found["emulated"] is True and 0.01 < found["error"] < kernels.WORST_FP8_ERROR
