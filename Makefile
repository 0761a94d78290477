# Every target creates and fills .venv on a fresh machine. PYTHON may name another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0
export OMP_NUM_THREADS = 1

.PHONY: demo test test-deployment test-mpc check bench clean

demo: $(VENV)/.demo
	$(BIN)/fedinfer demo --rewards

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not deployment"

# Whole deployments on loopback, and what befalls them: one at a time, or their clocks run out.
test-deployment: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m deployment tests/e2e tests/chaos

# Secure multi-party computation needs numpy 1.26, so it has an environment of its own.
test-mpc: .venv-mpc/.done
	.venv-mpc/bin/python -m pytest -q tests/mpc

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) .venv-mpc demo-report

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

.venv-mpc/.done: pyproject.toml
	$(PYTHON) -m venv .venv-mpc
	.venv-mpc/bin/python -m pip install -q --disable-pip-version-check -e '.[mpc,torch,dp]' \
	  'torch==2.13.0' 'scikit-learn>=1.5' 'hypothesis>=6.100' 'pytest>=8' 'pytest-timeout>=2.3'
	touch $@
