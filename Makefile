# `make demo` and `make test` work on a fresh machine with Python 3.11: both make .venv when it is missing or stale.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
# The stamp carries a hash of what decides the install, so installing twice does nothing the second time.
STAMP  := $(VENV)/.installed-$(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test drills unit lint types clean
help:
	@echo "make demo   the whole loop on MovieLens-100K: fetch, prepare, train, tune, serve, ask"
	@echo "make test   lint, import contracts, types, unit and integration tests"
	@echo "make drills what breaks on purpose and takes minutes: nodes lost, jobs interrupted"
	@echo "make unit   the tests that start no Ray"
	@echo "make clean  remove the virtual environment and caches"

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11, or name it: make demo PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing into $(VENV) (about two minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet -e ".[cpu,dev]"
	@# torchrec asks for the CUDA build of FBGEMM, which breaks the CPU build beside it
	@$(BIN)/python -m pip install --quiet --no-deps torchrec==1.8.0
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)
	@$(BIN)/slimrank demo

test: $(STAMP) lint types
	@$(BIN)/python -m pytest -m "not integration" -n 2
	@$(BIN)/python -m pytest -m "integration and not drill" -n 2 --dist loadfile --no-loadscope-reorder

drills: $(STAMP)
	@$(BIN)/python -m pytest -m drill

unit: $(STAMP)
	@$(BIN)/python -m pytest -m "not integration" -n 2

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(STAMP)
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
