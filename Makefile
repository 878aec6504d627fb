# Every target does its own set-up. Variables to change from the command line:
#   PYTHON=...       the interpreter to make .venv with (3.12 or later)
#   WORKERS=2        how many processes run the tests; 0 = in one process
#   EXTRAS=dev,demo  the optional dependencies to install; .ci/run adds harness,ray,datasets
#   STAGES=...       which stages of the torture run: kills moments faults power corruption fuzz; all unless named
#   PEERS_ARGS=...   more arguments for the frontier, for instance PEERS_ARGS="--ours best=build/exl2"
#   PYTEST_ARGS=...  more arguments for pytest, for instance PYTEST_ARGS="-k packing"

WORKERS ?= 2
PYTEST_ARGS ?=
PEERS_ARGS ?=
STAGES ?=
EXTRAS ?= dev,demo
export PYTHON EXTRAS

BIN := .venv/bin
DEMO_MODEL := demo/model

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model lab check test test-fast torture quality lint format docs wheel parity parity-write gpu-env counts peers clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make or update the virtual environment .venv
	@scripts/setup.sh

demo-model: setup ## build the demo model (SmolLM2-135M-Instruct) in demo/model
	@$(BIN)/python scripts/make_demo_model.py --out $(DEMO_MODEL)

demo: demo-model ## convert the demo model to EXL2 and show the result
	@$(BIN)/python scripts/demo.py

lab: demo-model ## run the sweep of examples/lab.toml on the demo model and write its report
	@$(BIN)/python scripts/lab.py

check: lint docs test ## style, types, documentation and all tests; .ci/run runs it with every optional part installed

test: setup ## run all tests; the end of the output lists what was skipped and why
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-fast: setup ## run the tests that take seconds
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

torture: setup ## kill, refuse, corrupt and fuzz in full (half an hour where nothing else runs); writes the figures of docs/reliability.md
	nice $(BIN)/python -m tests.reliability.torture $(STAGES)

quality: demo-model ## measure the presets and their parts (two hours); the tables of docs/quality.md
	$(BIN)/python -m scripts.studies.quality --keep --plot build/quality/kl.png

lint: setup ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## build the documentation in build/site; a warning is an error
	$(BIN)/mkdocs build --quiet --strict

wheel: setup ## build the wheel and try it in an environment of its own
	@scripts/try_wheel.sh

parity: demo-model ## recompute the reference logits with torch and transformers and compare with the committed ones
	@scripts/setup.sh parity
	.venv-parity/bin/python -m scripts.parity.reference --check

parity-write: demo-model ## rebuild the committed reference logits that no longer agree
	@scripts/setup.sh parity
	.venv-parity/bin/python -m scripts.parity.reference --write

gpu-env: ## make .venv-gpu, JAX for CUDA (4.4 GB): compiles for a GPU where none is
	@scripts/setup.sh gpu

counts: demo-model ## count programs, calls, reads and bytes of a conversion of the demo model (minutes)
	$(BIN)/python -m scripts.bench.counts run build/counts

peers: demo-model ## the frontier: every format on the same rows at equal file size (more than an hour, 6 GB of software)
	@scripts/setup.sh peers
	$(BIN)/python -m scripts.peers.frontier $(PEERS_ARGS)

clean: ## remove caches and build outputs; keeps the virtual environments and the demo model
	rm -rf build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
