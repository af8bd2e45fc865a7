# `make help` lists what can be made. Everything is installed into .venv; PYTHON chooses the
# interpreter that makes it: `make test PYTHON=python3.13`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# The installation is renewed when one of these changes; Python sources are used in place.
SOURCES := pyproject.toml Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: export MATURIN_PEP517_ARGS ?= --no-default-features
demo: $(VENV)/installed ## install, and merge two adapters into a small model made on the spot
	$(BIN)/lorafast demo

# One process a core; then what measures seconds or memory, with nothing beside it. `--tests` does not
# build what no test needs; there are no documentation tests.
.PHONY: test
test: $(VENV)/installed-test ## install what the tests need, and run them (Rust and Python) in ten minutes at most
	if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --locked --tests; else cargo test --locked --tests; fi
	$(BIN)/python -m pytest --numprocesses auto -m "not exhaustive and not alone"
	$(BIN)/python -m pytest -m "not exhaustive and alone"

.PHONY: test-exhaustive
test-exhaustive: $(VENV)/installed-test ## run what `make test` leaves out: more combinations of what it tries
	$(BIN)/python -m pytest --numprocesses auto -m "exhaustive and not alone"
	$(BIN)/python -m pytest -m "exhaustive and alone"

.PHONY: test-all
test-all: test test-exhaustive ## run every test

.NOTPARALLEL: test-all

.PHONY: lint
lint: $(VENV)/installed-dev ## check formatting, lints and types (Rust and Python)
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest lorafast._core --allowlist tests/stubtest.txt --ignore-unused-allowlist

.PHONY: reference
reference: $(VENV)/installed-test ## write the pages of the documents that are generated from code and tests
	PYTHONPATH=docs/tools $(BIN)/python -m reference
	$(BIN)/python tests/conformance/table.py
	$(BIN)/python tests/formats/format_table.py

.PHONY: man
man: $(VENV)/installed ## write the manual pages into target/man
	PYTHONPATH=docs/tools $(BIN)/python -m reference man

.PHONY: bench
bench: $(VENV)/installed-test ## time merges, analyses and fleets; takes an hour and 15 GB of disk
	$(BIN)/python benches/startup.py
	cargo bench --locked --bench kernel
	$(BIN)/python benches/merge.py
	$(BIN)/python benches/analyze.py
	$(BIN)/python benches/fleet.py
	$(BIN)/python benches/similarity.py

# Each count is a program's of tests/trust; `make test` runs a few of each.
TRUST := KILLS=200 KILL_CALLS=1000 KILL_SUBTRACTIONS=1000 KILL_PIPELINES=150 FAILING_CALLS=2000 \
  FULL_DISKS=150 CHANGING_INPUTS=250 RACES=100 REPLACED_ADAPTERS=100 CACHES=90 LOCKED_CACHES=2 KILLS_IN_STORES=100 KILL_WORKERS=100 \
  SIGNALS=400 EXACT_SUMS=10000000 FUZZED_FILES=100000 MANY_MERGES=10000

# A faster S3 server than the tests' own, for their larger models; they skip those without it.
.PHONY: s3-server
s3-server: ## build s3s-fs, an S3 server for tests of larger models; takes a few minutes
	cargo install --root target/s3s-fs --version 0.14.1 --locked --features binary s3s-fs

.PHONY: trust
trust: $(VENV)/installed-test ## attack merges with kills, failing calls and hostile files; takes a quarter of an hour
	env $(addprefix LORAFAST_TRUST_,$(TRUST)) $(BIN)/python -m pytest tests/trust tests/stores/test_interruptions.py

.PHONY: clean
clean: ## remove the virtual environment, build products and caches
	rm -rf $(VENV) target lorafast-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f python/lorafast/_core*.so
	find python tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each of these holds what the one before it holds, and more.
$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python rust
	$(PIP) install --editable .
	@touch $@

$(VENV)/installed-test: $(SOURCES) tests/requirements-data.txt | $(VENV)/bin/python rust
	$(PIP) install --editable '.[test]'
	$(PIP) install --no-deps --requirement tests/requirements-data.txt
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(SOURCES) | $(VENV)/bin/python rust
	$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lorafast needs Python 3.11 or newer, and $(PYTHON) is not; install it or name it: make … PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; install its venv module (Debian: apt install python3-venv)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# Cargo would say the same, but pip buries it.
.PHONY: rust
rust:
	@need=$$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml); \
	have=$$(cargo --version 2>/dev/null | cut -d' ' -f2); \
	if [ "$$(printf '%s\n' "$$need" "$${have:-0}" | sort -V | head -n1)" != "$$need" ]; then \
	  echo "lorafast is compiled from Rust $$need or newer, and $${have:+only }$${have:-no} cargo is here; install it with rustup (https://rustup.rs)" >&2; \
	  exit 1; \
	fi
