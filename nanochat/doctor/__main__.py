"""One check in this process: `python -m nanochat.doctor NAME`. The result is the last line; a crash shows itself.

`isolation` gives two more words: the request as JSON, and after how many seconds nobody waits for the result any more.
"""

import json
import signal
import sys
from dataclasses import asdict

from nanochat.common import UserError, prepare_process, run, to_json
from nanochat.doctor.checks import find_check
from nanochat.doctor.isolation import MARK
from nanochat.doctor.result import Request, Result


def main() -> None:
    name, *given = sys.argv[1:] or [""]
    check, request = find_check(name), Request(**json.loads(given[0])) if given else Request()
    if len(given) > 1:
        signal.alarm(int(float(given[1])) + 5)  # for a hanging check whose doctor was killed
    prepare_process(request.offline)
    try:
        result = check.run(request)
    except UserError as error:
        result = Result("failed", str(error))
    print(MARK + to_json(asdict(result)))


if __name__ == "__main__":
    run(main)
