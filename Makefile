# Every target is one call of a tool. What a target needs is set up first, and only when a lock has changed.
MODEL ?= smollm2-135m
GPU_MODEL ?= llama8b
ARGS ?=
OUT ?= protos
GO_OUT ?= examples/go
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV := $(BIN)/uv
LOCK := $(UV) pip compile --quiet --generate-hashes --no-header --python-version 3.11
export VIRTUAL_ENV := $(CURDIR)/.venv

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev serve test test-full nightly kernels gpu bench clients ghz quant-table lint stubs go-stubs lock

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile

setup: .venv/runtime ## everything that serving on a CPU needs, into .venv

setup-dev: .venv/dev

serve: $(if $(findstring --openai-port,$(ARGS)),.venv/clients,.venv/runtime) ## serve MODEL (default smollm2-135m), flags in ARGS
	$(BIN)/pagewire serve $(MODEL) $(ARGS)

test: .venv/dev lint ## lint, types, imports, and the default tests
	$(BIN)/pytest -n 2 $(ARGS)

test-full: .venv/dev lint ## the default tests and the slow ones
	$(BIN)/pytest -n 2 -m "not nightly and not gpu" $(ARGS)

nightly: .venv/dev ## the long profiles: events, fuzz, soak
	$(BIN)/pytest -m nightly $(ARGS)

kernels: .venv/dev ## Triton kernels: interpreted beside their oracles, and compiled for sm_80, sm_90 and gfx942
	$(BIN)/pytest -n 2 tests/kernels_triton
	$(BIN)/python -m kernels.ahead $(ARGS)

gpu: .venv/dev ## on a GPU host: its tests, a GPU worker by itself on the checkpoint GPU_MODEL, and peers in ARGS
	$(BIN)/python -m benchmarks.gpu $(GPU_MODEL) $(ARGS)

bench: .venv/dev ## workloads a to e beside the peers, into benchmarks/results
	$(BIN)/python -m benchmarks.run $(ARGS)

quant-table: .venv/dev ## the tables of docs/quantization.md, from the fixtures
	$(BIN)/python -m tests.quantized.table --write

clients: .venv/clients ## build and run the example clients against a live server
	$(BIN)/python -m examples $(ARGS)

ghz: .venv/runtime ## a load test by ghz; needs go
	$(BIN)/python -m examples ghz $(ARGS)

lint: .venv/dev ## ruff, mypy, import-linter, buf
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/buf lint

stubs: .venv/dev ## regenerate the gRPC stubs from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) protos/pagewire/v1/*.proto

go-stubs: .venv/dev ## regenerate those of the Go example; needs go
	GOBIN=$(CURDIR)/build/go go -C examples/go install tool
	PATH=$(CURDIR)/build/go:$$PATH $(BIN)/python -m grpc_tools.protoc -I protos --go_out=$(GO_OUT) --go_opt=module=pagewire.dev --go-grpc_out=$(GO_OUT) --go-grpc_opt=module=pagewire.dev protos/pagewire/v1/*.proto

lock: $(UV) ## resolve the locks again: hashes, and no host
	$(LOCK) --extra build pyproject.toml -o requirements.lock
	$(LOCK) --extra clients -c requirements.lock pyproject.toml -o requirements-clients.lock
	$(LOCK) --all-extras -c requirements.lock pyproject.toml -o requirements-dev.lock
	$(LOCK) requirements-uv.in -o requirements-uv.lock

# Without a C++ compiler the worker needs torch, and says so when it starts.
.venv/runtime: requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	-@$(BIN)/python -m kernels.cpu.build
	@touch $@

# Where there are no wheels of these, the runner says which client it does not run for it.
.venv/clients: requirements-clients.lock .venv/runtime
	-@$(PIP) --no-deps --require-hashes -r requirements-clients.lock
	@touch $@

.venv/dev: requirements-dev.lock .venv/runtime | $(UV)
	$(UV) pip install --quiet --compile-bytecode --require-hashes -r requirements-dev.lock
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$@ -m pip uninstall --quiet --yes setuptools

$(UV): requirements-uv.lock | $(BIN)/python
	$(PIP) --require-hashes -r requirements-uv.lock
	@touch $@
