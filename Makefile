# SPDX-License-Identifier: Apache-2.0
# Everything happens in .venv inside the checkout. `make demo` and `make test` are the two to know.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CARGO  ?= cargo
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST_ARGS ?=

.PHONY: all venv build guests wheel demo test lint test-rust test-python sanitize differential mutants bench clean help
all: build

help:
	@echo 'make demo    build, fetch the default guest, boot it, run commands in it'
	@echo 'make test    lint, types, Rust tests, Python tests, whole boots'
	@echo 'make differential  the software CPU against this processor, longer, and strict on any'
	@echo 'make sanitize the memory of the crate under AddressSanitizer, ThreadSanitizer and Miri'
	@echo 'make mutants break lines and count what the tests notice'
	@echo 'make bench   the figures of docs/performance.md, QEMU beside them where installed'
	@echo 'make wheel   one abi3 wheel in dist/'
	@echo 'make clean   remove everything built'

# A stamp per step: what has been made of these files is made again only when one of them is newer.
EXTENSION := $(wildcard src/softkvm/_softcpu*.so)
CRATE     := Cargo.toml pyproject.toml $(shell find client cpu/src cpu/python -type f) cpu/Cargo.toml
# Environments have absolute paths in them: one that has been moved or copied is made anew.
MOVED     := $(filter-out $(abspath $(VENV)),$(shell cat $(BIN)/.ready 2>/dev/null))
ifneq ($(MOVED),)
.PHONY: $(BIN)/.ready
endif
ifeq ($(EXTENSION),)
.PHONY: $(BIN)/.built
endif

venv: $(BIN)/.ready
$(BIN)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'softkvm needs Python 3.11 or later: make PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo 'this Python cannot make virtual environments: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(if $(MOVED),--clear) $(VENV)
	$(PIP) --upgrade 'pip>=25.1' 'maturin>=1.16,<2'
	@echo '$(abspath $(VENV))' > $@

# The tools of `make test`, apart: `make demo` does not wait for them.
$(BIN)/.dev: $(BIN)/.ready pyproject.toml
	$(PIP) --group test
	@touch $@

build: guests $(BIN)/.built
$(BIN)/.built: $(BIN)/.ready $(CRATE)
	@command -v $(CARGO) >/dev/null \
	  || { echo 'softkvm needs a Rust toolchain (cargo) to build' >&2; exit 1; }
	. $(BIN)/activate && PIP_QUIET=1 maturin develop --release
	@touch $@

guests:
	@$(MAKE) --no-print-directory -C guests

wheel: venv guests
	$(BIN)/maturin build --release --out dist

demo: build
	@$(BIN)/python scripts/demo.py

# mypy reads the libraries that `build` installs with the package.
lint: build $(BIN)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

test-rust:
	$(CARGO) test --release --workspace --no-run
	$(CARGO) test --release --workspace --quiet
	$(CARGO) test --profile checked -p softcpu --no-run
	$(CARGO) test --profile checked -p softcpu --quiet

test-python: build $(BIN)/.dev
	$(BIN)/pytest $(PYTEST_ARGS)

test: lint test-rust test-python

# Ten minutes. `make test` compares less, and goes on where a processor that is not known yet differs.
DIFF_CASES ?= 50000
differential:
	SOFTCPU_DIFF_STRICT=1 SOFTCPU_DIFF_CASES=$(DIFF_CASES) SOFTCPU_DIFF_ENCODINGS=all $(CARGO) test --release -p softcpu --no-fail-fast \
	  --test differential --test float_native --test simd_native --test x87_sequences -- --nocapture

# Ten minutes, most of which goes into builds of their own (CONTRIBUTING.md says what each sees). The sanitizers' faults are
# the guards' to handle. Guest memory, to which all accesses go by `mem::host`, is shared by design.
NIGHTLY   ?= nightly
HOST       = $(shell rustc -vV | sed -n "s|host: ||p")
SANITIZED := --profile checked -p softcpu --quiet
sanitize: export RUSTC_BOOTSTRAP := 1
sanitize: export ASAN_OPTIONS := handle_segv=0:handle_sigbus=0
sanitize: export TSAN_OPTIONS := handle_segv=0:handle_sigbus=0:suppressions=$(abspath cpu/tests/tsan.txt)
sanitize: export MIRIFLAGS := -Zmiri-disable-isolation -Zmiri-permissive-provenance -Zmiri-ignore-leaks
sanitize:
	@command -v rustup >/dev/null || { echo 'the checkers are parts of toolchains that rustup knows' >&2; exit 1; }
	rustup component add rust-src
	rustup component add miri rust-src --toolchain $(NIGHTLY)
	RUSTFLAGS='-Zsanitizer=address --cfg softcpu_asan' \
	  $(CARGO) test --target-dir target/asan --target $(HOST) $(SANITIZED) --lib --test engine --test system
	RUSTFLAGS='-Zsanitizer=thread' \
	  $(CARGO) test -Zbuild-std --target-dir target/tsan --target $(HOST) $(SANITIZED) --lib --test engine
	RUSTFLAGS='-Zsanitizer=thread' \
	  $(CARGO) test -Zbuild-std --target-dir target/tsan --target $(HOST) $(SANITIZED) --test system threads::
	$(CARGO) +$(NIGHTLY) miri test --target-dir target/miri -p softcpu --lib -- mem::bus mem::region
	$(CARGO) +$(NIGHTLY) miri test --target-dir target/miri -p softcpu --test engine

# Up to half an hour: lines of the modules that everything rests on are broken, and the tests have to notice. A sample,
# the same for the same code, and what comes of it is docs/mutants.md.
MUTANTS_ARGS ?= --write docs/mutants.md
mutants: build $(BIN)/.dev
	$(PIP) --group mutants
	@command -v cargo-mutants >/dev/null || $(CARGO) install --quiet cargo-mutants
	nice $(BIN)/python scripts/mutants.py $(MUTANTS_ARGS)

bench: build
	$(BIN)/python -m benchmarks.all

clean:
	$(CARGO) clean 2>/dev/null || true
	$(MAKE) --no-print-directory -C guests clean
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache src/softkvm/_softcpu*.so benchmarks/results
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
