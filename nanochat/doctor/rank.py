"""One of the processes of the check `ranks`: what all of them add up, and how fast numbers travel."""

import sys
import time

from nanochat.common import prepare_process, run

NUMBERS = 2**24  # 64 MiB in float32: a bucket of gradients or two


def main() -> None:
    prepare_process()
    import torch
    import torch.distributed as dist

    from nanochat.parallel import runtime

    with runtime(sys.argv[1]) as rt:
        whole = rt.sum(torch.tensor(float(rt.rank + 1), device=rt.device)).item()
        numbers = torch.ones(NUMBERS, device=rt.device)
        rt.synchronize()
        began = time.perf_counter()
        rt.sum(numbers)
        rt.synchronize()
        rate = numbers.nbytes / (time.perf_counter() - began) / 1e9
        if rt.is_main and bool((numbers == rt.world_size).all()):
            print(f"SUM {whole:.0f} {dist.get_backend()} {rate:.3g}", flush=True)


if __name__ == "__main__":
    run(main)
