# The commands of daily work. CI runs `bash runs/test.sh`: set-up, then `make check`.
PYTHON ?= .venv/bin/python
WORKERS ?= 2

# Each test process computes on one thread: two that spin on a shared core are far slower.
export OMP_NUM_THREADS = 1

.PHONY: help check format test slow docs

help:
	@echo "make check    formatting, lint, types and the quick tests: all must pass before a change is sent in"
	@echo "make format   rewrite the sources as ruff wants them"
	@echo "make test     the quick tests only (WORKERS=2 processes)"
	@echo "make slow     the tests that take minutes"
	@echo "make docs     write docs/cli.md anew from every recipe's --help"

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(MAKE) --no-print-directory test

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

test:
	$(PYTHON) -m pytest -q -m "not slow and not gpu" -n $(WORKERS)

# pytest's status 5: no test ran, as where the extra `browser` is missing (an error if NANOCHAT_REQUIRE_BROWSER=1).
slow:
	$(PYTHON) -m pytest -q -m "slow and not gpu" || [ $$? -eq 5 ]

docs:
	$(PYTHON) dev/make_cli_docs.py
