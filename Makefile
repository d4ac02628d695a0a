# make demo: the main job on the bundled trace. make test: the whole suite. Both make .venv first, and again only
# when the pins, the package's metadata or the Python change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# --no-build-isolation: the pinned setuptools builds the package, not whatever is newest today.
INSTALL_MOEFLOW := $(INSTALL) --no-deps --no-build-isolation --editable .

key = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
VENV_STAMP := $(VENV)/.python-$(shell ($(PYTHON) -c 'import sys; print(sys.executable, sys.version)'; pwd) 2>&1 | cksum | cut -d ' ' -f 1)
SIM_STAMP := $(VENV)/.sim-$(call key,pyproject.toml requirements/sim.txt)
TEST_STAMP := $(VENV)/.test-$(call key,pyproject.toml requirements/test.txt)

.PHONY: demo test lint wheel-check lock clean
.DELETE_ON_ERROR:

demo: $(SIM_STAMP)
	$(BIN)/sim run --hw ascend910b.yaml --out out/demo

test: $(TEST_STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Builds the wheel and checks what a user would get: contents, imports, types and the import contract.
wheel-check: $(TEST_STAMP)
	bash .ci/wheel_check

lock: $(VENV_STAMP)
	$(BIN)/python .ci/lock.py

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .numba_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp names its inputs; older ones go first, so that going back to earlier inputs installs again.
$(VENV_STAMP):
	@$(PYTHON) .ci/check_python.py
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(SIM_STAMP): $(VENV_STAMP)
	@rm -f $(VENV)/.sim-*
	$(INSTALL) --requirement requirements/sim.txt
	$(INSTALL_MOEFLOW)
	@touch $@

$(TEST_STAMP): $(SIM_STAMP)
	@rm -f $(VENV)/.test-*
	$(INSTALL) --requirement requirements/test.txt
	@touch $@
