# Assumes Python 3.11 to 3.13 and make. Every target prepares what it needs, in this directory only.

BIN := .venv/bin
PROTOC := .proto-venv/bin/python -m grpc_tools.protoc
PROTOS := $(wildcard protos/expertmesh/v1/*.proto)

# Warnings of pip concern its own set-up; errors are still printed.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

# The oldest generator that knows Python 3.13: what it writes loads on protobuf 5.29 and later. It
# caps protobuf below 6, hence a virtual environment of its own.
PROTO_PINS := grpcio-tools==1.71.2 grpcio==1.71.2 protobuf==5.29.6

PYTHON = $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$python && break; done)

.PHONY: test test-fast demo lint proto bench mutants check-sm90 clean

test: lint .proto-venv/installed
	@$(BIN)/python -m pytest

# While one works: what decides, what is written on the wire, and one request from end to end.
test-fast: lint
	@$(BIN)/python -m pytest -m "not slow and not ray" tests/unit tests/repo \
		tests/integration/test_cluster.py

demo: .venv/installed
	@$(BIN)/expertmesh demo

lint: .venv/installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

proto: .proto-venv/installed
	@$(PROTOC) -I protos --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

bench: .venv/installed
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit; done

# Changes the deciding modules in one small way at a time and runs the tests beside them. No part of
# `make test`: it takes about an hour. Some of them only: make mutants GROUPS="gate dispatch".
mutants: .venv/mutants
	@nice $(BIN)/python scripts/mutants.py $(GROUPS)

# Compiles the Triton kernels for an H100 or H200; needs no GPU.
check-sm90: .venv/installed
	@$(BIN)/python scripts/check_sm90.py --report benchmarks/results

clean:
	rm -rf .venv .proto-venv tests/foreign/node_modules build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by itself, so that pip takes the build this machine offers for the pin. The
# build backend is installed, not isolated, so that its version is a pinned one too.
.venv/installed: pyproject.toml constraints.txt
	$(call make_venv,.venv)
	@$(BIN)/python $(PIP_INSTALL) $(call pin,torch) $(call pin,setuptools)
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[hf,dev,bench]'
	@touch $@

.venv/mutants: .venv/installed
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[mutants]'
	@touch $@

.proto-venv/installed: Makefile
	$(call make_venv,.proto-venv)
	@.proto-venv/bin/python $(PIP_INSTALL) $(PROTO_PINS) $(call pin,setuptools)
	@touch $@

pin = $(shell grep '^$(1)==' constraints.txt)

define make_venv
@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 on PATH" >&2; exit 1; }
@echo "Setting up $(1): the first time takes a few minutes"
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
