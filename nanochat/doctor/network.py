"""The hub, the chat server's port, and processes that talk to each other."""

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillWaiting

from nanochat.common import UserError
from nanochat.doctor.result import Request, Result
from nanochat.serve.limits import DEFAULT_PORT

HUB_LIMIT_S = 8.0
PORTS_TRIED = 100
MAX_RANKS = 8


# The hub ---------------------------------------------------------------------------------------------------------


def hub(request: Request) -> Result:
    """The default data set is asked for at the hub, once. Being offline is no fault: training needs no network."""
    offline = "train on text of your own or on the default, stdlib; shards can be fetched elsewhere and copied"
    if request.offline:
        return Result("missing", "not asked, as --offline wants it", offline)
    began, answer = time.perf_counter(), Future[str]()

    def ask() -> None:
        try:
            answer.set_result(asked_hub())
        except UserError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # no timeout of ours ends a name that does not resolve
    try:
        seen = answer.result(HUB_LIMIT_S)
    except StillWaiting:
        return Result("missing", f"offline: no answer within {HUB_LIMIT_S:g} s", offline)
    except UserError as error:
        return Result("missing", str(error), offline)
    seconds = time.perf_counter() - began
    return Result("ok", f"{seen}, in {seconds:.1f} s", "", {"seconds": seconds})


def asked_hub() -> str:
    """What the hub says of the default data set. Raises UserError."""
    from huggingface_hub import HfApi, constants

    from nanochat.download import KNOWN
    from nanochat.hub import Passing, sorted_errors

    repo = KNOWN["climbmix"].repo
    try:
        with sorted_errors(repo):
            info = HfApi().dataset_info(repo, timeout=HUB_LIMIT_S / 2)
    except Passing as error:
        raise UserError(f"offline: {constants.ENDPOINT} does not answer ({error})") from error
    return f"{constants.ENDPOINT} has {repo} at {str(info.sha)[:12]}"


# The port --------------------------------------------------------------------------------------------------------


def port(request: Request) -> Result:
    """The chat server's default port on this computer, or the next one that is free."""
    if fault := listening_fault(DEFAULT_PORT):
        higher = range(DEFAULT_PORT + 1, DEFAULT_PORT + PORTS_TRIED)
        free = next((number for number in higher if not listening_fault(number)), 0)
        seen = (
            f"127.0.0.1:{DEFAULT_PORT} cannot be used ({fault}); {f'{free} is free' if free else 'nor the next ones'}"
        )
        return Result("missing", seen, f"python -m scripts.chat_web --port={free}", {"free": free})
    return Result("ok", f"127.0.0.1:{DEFAULT_PORT} is free for the chat page", "", {"free": DEFAULT_PORT})


def listening_fault(number: int) -> str | None:
    """Why nothing can listen there; None: it can."""
    try:
        socket.create_server(("127.0.0.1", number)).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


# Ranks -----------------------------------------------------------------------------------------------------------


def ranks(request: Request) -> Result:
    """Processes that torchrun starts really add up their numbers: with nccl where there are GPUs, else gloo."""
    import torch

    from nanochat.parallel import find_device

    kind = find_device(request.device_type, 0).type
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    count, kind = (min(gpus, MAX_RANKS), kind) if gpus > 1 else (2, "cpu")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", "nanochat.doctor.rank"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *launcher, kind], capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - began
    said = [line for line in done.stdout.splitlines() if line.startswith("SUM ")]
    wanted = f"SUM {count * (count + 1) // 2} "
    if done.returncode == 0 and said and said[-1].startswith(wanted):
        backend, rate = said[-1].split()[2:4]
        seen = f"{count} processes on {kind} add up {float(rate):.2g} GB/s by {backend}; {seconds:.1f} s in all"
        return Result("ok", seen, "", {"ranks": count, "backend": backend, "gb_per_s": float(rate), "seconds": seconds})
    errors = [line for line in done.stderr.splitlines() if "Error" in line] or [f"code {done.returncode}"]
    advice = "train with one process, without torchrun; several need the loopback device, and GPUs that see each other"
    return Result("failed", f"{count} processes on {kind} do not work together: {errors[0].strip()[:200]}", advice)
