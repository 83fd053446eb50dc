# `make demo` and `make test` need python3 (3.10 or newer) with venv, git and make; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KEEP := .demo
WHEEL_VENV := build/wheel-venv
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

# Hundreds of processes start in the tests: none has to compile what another did.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint docs wheel bench clean

demo: $(INSTALLED)
	rm -rf $(KEEP)
	$(BIN)/hubdiff demo --keep $(KEEP)

# A file of tests in one process, and more processes than cores: half of the time is spent waiting.
# Files begin in the order of tests/conftest.py, the long ones first; else those of many tests would.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m hubdiff.cli._reference README.md

# The wheel's own files in an environment of their own, which borrows the dependencies only: an
# editable install is found through a .pth file, and those of a borrowed folder are not read.
wheel: $(INSTALLED)
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(BIN)/python -c '$(PACKAGES)' > "$$($(WHEEL_VENV)/bin/python -c '$(PACKAGES)')/borrowed.pth"
	$(WHEEL_VENV)/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd / && "$(CURDIR)/$(WHEEL_VENV)/bin/hubdiff" --version
	cd / && "$(CURDIR)/$(WHEEL_VENV)/bin/python" "$(CURDIR)/tests/installed.py" "$(CURDIR)/$(WHEEL_VENV)"

# Hours, 60 GB of disk and a quiet machine; each script takes --help. real_llm.py and
# forecasts.py are apart: they need more packages.
bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/startup.py --readme README.md
	$(BIN)/python tests/benchmarks/encodings.py --readme README.md
	$(BIN)/python tests/benchmarks/network.py --readme README.md
	$(BIN)/python tests/benchmarks/speed.py --gb 1.7 7 --readme README.md
	$(BIN)/python tests/benchmarks/sizes.py --readme README.md
	$(BIN)/python tests/benchmarks/transfer_matrix.py --readme README.md

clean:
	rm -rf $(VENV) $(KEEP) build dist

# Without compiling: what is never imported, which is most of it, would take a minute.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@
