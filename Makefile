# Lathe's commands. `make` alone lists them.
#
# PYTHON      the interpreter that makes the environment (3.11 or later)
# TORCH_FROM  a folder of wheels, or an index, that holds torch's CPU build; without it pip's own settings decide
# DATA        where `make quickstart` keeps its platform
PYTHON ?= python3.11
TORCH := torch==2.13.0
TORCH_FROM ?=
DATA ?= .lathe

VENV := .venv
BIN := $(VENV)/bin
LOCK := $(BIN)/uv pip compile -q pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	--override requirements/overrides.txt --no-emit-package torch

LOCK_GROUP := $(subst pyproject.toml,,$(LOCK))

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-unit test-gpu acceptance-kill acceptance-resume lint format proto proto-check breaking lock docs docs-check clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

quickstart: $(VENV)/.engine ## tune a real model on the example data, measure it, and chat with it
	@$(BIN)/lathe quickstart --data $(DATA)

test: $(VENV)/.dev ## install what the tests need and run all of them (not the cluster ones)
	$(BIN)/pytest tests/unit -n 2
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/contract -n 2
	$(BIN)/pytest tests/integration
	$(BIN)/pytest tests/e2e --target=embedded
	$(BIN)/pytest tests/e2e --target=processes

test-unit: $(VENV)/.dev ## the unit tests alone (seconds)
	$(BIN)/pytest tests/unit -n 2

# DEVICE      cuda, or cpu: the same tests without a GPU, slowly (they then show that the tests are right, no more)
DEVICE ?= cuda
test-gpu: $(VENV)/.dev ## every model family in bf16 and on a 4-bit base, on a GPU, beside transformers + PEFT + bitsandbytes
	@if [ "$(DEVICE)" = cuda ] && ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "test-gpu: SKIPPED. NOTHING WAS TESTED: torch sees no CUDA GPU on this machine."; \
	else LATHE_TEST_DEVICE=$(DEVICE) $(BIN)/pytest tests/gpu; fi

acceptance-kill: $(VENV)/.dev ## kill each process ten times during a job; the adapter must be the same, bit for bit
	PYTHONPATH=services:. $(BIN)/python -m tests.acceptance.kill_each_process

acceptance-resume: $(VENV)/.dev ## kill engines at 20 random steps of a job; losses and weights must be the same, bit for bit (ARGS="--method dpo")
	PYTHONPATH=services:. $(BIN)/python -m tests.acceptance.kill_engine $(ARGS)

.PHONY: acceptance-export
acceptance-export: $(VENV)/.dev ## export a tuned SmolLM2 in each way, checked by logits and by llama.cpp (minutes)
	PYTHONPATH=services:. $(BIN)/python -m tests.acceptance.export_smollm2

.PHONY: fuzz
fuzz: $(VENV)/.dev ## give damaged training files to the readers for a minute (ARGS="-max_total_time=600"; Linux)
	PYTHONPATH=services:. $(BIN)/python -m tests.fuzz.training_files -max_total_time=60 $(ARGS)

lint: $(VENV)/.dev proto-check docs-check ## ruff, mypy, import rules, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/hadolint docker/Dockerfile
	$(MAKE) breaking

format: $(VENV)/.dev ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.dev ## regenerate services/lathe/v1 from proto/
	rm -f services/lathe/v1/*_pb2*
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I proto --python_out=services --grpc_python_out=services \
		--mypy_out=quiet,readable_stubs:services --mypy_grpc_out=quiet:services proto/lathe/v1/*.proto

proto-check: $(VENV)/.dev ## fail when the committed generated code is not what proto/ gives
	@rm -rf build/proto && mkdir -p build/proto
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I proto --python_out=build/proto --grpc_python_out=build/proto \
		--mypy_out=quiet,readable_stubs:build/proto --mypy_grpc_out=quiet:build/proto proto/lathe/v1/*.proto
	@diff -r -x __init__.py -x __pycache__ build/proto/lathe/v1 services/lathe/v1 || { echo "services/lathe/v1 differs from proto/: run 'make proto' and commit." >&2; exit 1; }

# A branch is compared with main; main itself with what it was before its last change to the contracts.
BREAKING_AGAINST ?= $(shell main=$$(git rev-parse -q --verify origin/main); \
	if [ -n "$$main" ] && [ "$$main" != "$$(git rev-parse HEAD)" ]; then echo $$main; \
	else git rev-parse -q --verify "$$(git log -1 --format=%H -- proto)~1"; fi)
breaking: $(VENV)/.dev ## fail when proto/ breaks what main promises
	@if [ -n "$(BREAKING_AGAINST)" ] && git cat-file -e $(BREAKING_AGAINST):proto 2>/dev/null; then \
		rm -rf build/breaking && mkdir -p build/breaking && git archive $(BREAKING_AGAINST) proto buf.yaml | tar -x -C build/breaking && \
		$(BIN)/buf breaking --against build/breaking; \
	else echo "breaking: nothing on main to compare with yet"; fi

lock: $(VENV)/.dev ## write requirements/*.txt anew from pyproject.toml
	$(LOCK) --all-extras --group dev -o requirements/dev.txt
	$(LOCK) --extra cli --extra server --extra postgres --extra engine -c requirements/dev.txt -o requirements/engine.txt
	$(LOCK) --extra cli --extra server --extra postgres --extra kubernetes -c requirements/dev.txt -o requirements/control.txt
	$(LOCK) --extra cli --extra server --extra postgres --extra engine --extra ray --group image-torch -c requirements/dev.txt \
		-o requirements/engine-image.txt
	$(LOCK_GROUP) --group image-build -c requirements/dev.txt -o requirements/build.txt
	$(LOCK_GROUP) --group tryout -c requirements/dev.txt -o requirements/tryout.txt

docs: $(VENV)/.dev ## write the generated pages
	$(BIN)/python tools/generated_docs.py

docs-check: $(VENV)/.dev ## fail when a generated page is out of date
	$(BIN)/python tools/generated_docs.py --check

clean: ## remove what the commands above made (not DATA)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# --- the chart, the alerts, the dashboard and the compose file: no cluster --------------------------------------

.PHONY: test-charts
test-charts: $(VENV)/.dev ## test what deploys Lathe: chart, alerts, dashboard, compose file (no cluster)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/pytest tests/charts -n 2

# --- benchmarks: the last line of each is one JSON object -----------------------------------------------------

# ARGS        --only sft,fused,sampling,adapters,interleave,warm_start (all of them if left out), --rounds, --threads

.PHONY: bench-engine
bench-engine: $(VENV)/.dev ## the engine beside TRL, transformers, PEFT and llama.cpp on SmolLM2 (ARGS="--only sampling")
	PYTHONPATH=services:. $(BIN)/python -m tests.benchmarks.engine $(ARGS)

.PHONY: bench-distributed
bench-distributed: $(VENV)/.dev ## a gang led through Ray beside a plain process, two workers beside one, a sharded base beside a whole one
	PYTHONPATH=services:. $(BIN)/python -m tests.benchmarks.distributed $(ARGS)

.PHONY: bench-datasets
bench-datasets: $(VENV)/.dev ## validation beside the cookbook's checker and Hugging Face's datasets (ARGS="--only validate")
	PYTHONPATH=services:. $(BIN)/python -m tests.benchmarks.datasets $(ARGS)

# --- images: docker/README.md ------------------------------------------------------------------------------
#
# BASE_IMAGE  what they are made from: a slim Python, or any Debian with Python 3.11 (docker/debian-base.sh makes one)
# IMAGES      which of control, engine and tryout
# TORCH_BUILD torch's build in the engine: cpu, or cu126 and the like together with an index in TORCH_FROM
# REGISTRY    where `make images-push` publishes, e.g. registry.example.com/team

.PHONY: images images-push images-check
images: ## build the container images (BASE_IMAGE=…, IMAGES="control engine tryout", TORCH_FROM=…)
	@TORCH="$(TORCH)" TORCH_FROM="$(TORCH_FROM)" PYTHON="$(PYTHON)" docker/images.sh

images-push: ## publish the images (REGISTRY=…)
	@docker/push.sh

images-check: ## look into the built images: sizes, user, nothing needless, a start on a read-only root
	@docker/check-images.sh

# --- on a cluster: kind, kubectl, helm and docker from PATH ---------------------------------------------------
#
# FAST        1: the install, the e2e suite, one killed pod of each kind and an engine's lost node, nothing more
# ARGS        what tests/cluster/run.py takes beside: --keep, --reuse, and what pytest takes; bench-cluster takes those two

.PHONY: test-cluster bench-cluster
test-cluster: $(VENV)/.dev ## build the images, make a kind cluster, install, run e2e and break things (FAST=1, ARGS="--keep")
	PATH="$$PATH:$(CURDIR)/$(BIN)" PYTHONPATH=services:. $(BIN)/python -m tests.cluster.run $(if $(FAST),--fast) $(ARGS)

bench-cluster: $(VENV)/.dev ## on a kind cluster: time to ready, memory when idle, an engine's start, a lost node (ARGS="--reuse --keep")
	PATH="$$PATH:$(CURDIR)/$(BIN)" PYTHONPATH=services:. $(BIN)/python tests/benchmarks/bench_cluster.py $(ARGS)

# --- the environment ---------------------------------------------------------------------------------------

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "Lathe needs Python 3.11 or later as '$(PYTHON)'; set PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; set PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) $(if $(TORCH_FROM),from $(TORCH_FROM),from where pip is set to look; without a CPU build there that is about 3 GB with CUDA)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_FROM),$(if $(findstring ://,$(TORCH_FROM)),--index-url,--find-links) $(TORCH_FROM)) $(TORCH) \
		|| { echo "$(TORCH) could not be installed. Give a folder or an index that has it: make TORCH_FROM=… $(MAKECMDGOALS)" >&2; exit 1; }
	@touch $@

define install
	@echo "Installing $(1)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r $(1) \
		|| { echo "The packages in $(1) could not be installed: is a Python package index reachable?" >&2; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@
endef

$(VENV)/.engine: requirements/engine.txt pyproject.toml $(VENV)/.torch
	$(call install,requirements/engine.txt)

$(VENV)/.dev: requirements/dev.txt pyproject.toml $(VENV)/.torch
	$(call install,requirements/dev.txt)
	@touch $(VENV)/.engine

