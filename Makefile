# make demo    install, then run the whole story: train, export, serve, ask
# make test    install with the development tools, then everything that must be clean
# make protos  regenerate the stubs in greenroom/pb from protos/
# make clean   remove what make made, the environment too; the user's cache folder stays
#
# It knows nothing of what the commands do. PYTHON=... names another interpreter; it must be a Python 3.11.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(sort $(shell find protos -name '*.proto' 2>/dev/null))

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test protos clean

# One line per package: an installation of several minutes should not look like a hang.
INSTALL := PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	--constraint constraints.txt
SHOW := awk '/^ *(Collecting|Downloading|Installing|Successfully)/ { print "  " substr($$0, 1, 110); fflush() }'

help:
	@sed -n 's/^# make/make/p' Makefile

$(BIN)/python:
	@echo "greenroom: making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 is needed, this is {v}" if v != (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

# The stamps are written last, so an interrupted installation is taken up again.
$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "greenroom: installing (a few minutes the first time)"
	@$(INSTALL) --editable . | $(SHOW)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "greenroom: installing the development tools"
	@$(INSTALL) --editable '.[dev]' | $(SHOW)
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/greenroom demo

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# The virtual path makes the generated imports start with greenroom.pb, which is where the stubs live.
protos: $(VENV)/installed-dev
	$(BIN)/python -m grpc_tools.protoc -Igreenroom/pb=protos --python_out=. --pyi_out=. --grpc_python_out=. \
		$(patsubst protos/%,greenroom/pb/%,$(PROTOS))

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
