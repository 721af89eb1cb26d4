# Every target sets up what it needs; `make help` lists them.
VENV ?= .venv
ARGS ?=
EXPERIMENT ?= quickstart
SWEEP ?= alpha_prompts
WORKERS ?= 0
JOB ?=
BIN := $(VENV)/bin
# The first interpreter that runs and is of a supported version.
PYTHON ?= $(shell for each in python3 python3.12 python3.11 python3.10; do \
	$$each -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$each && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup run sweep test test-cluster test-trust lint typecheck format docs lock bench bench-methods cluster submit job-status job-stop cluster-stop pretrain real clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## create .venv and install the package with its pinned dependencies (once)

# The stamp is written last, after the imports that a mismatched torch and torchvision would break.
$(VENV)/.ready: setup.cfg setup.py pyproject.toml constraints.txt constraints.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; install one or give PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (several GB; a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints.lock -e '.[dev]'
	@$(BIN)/python -c "import timm, torch, torchvision; torchvision.ops.nms; print('torch', torch.__version__, '| torchvision', torchvision.__version__, '| timm', timm.__version__, '| CUDA', torch.cuda.is_available())"
	@touch $@

run: setup ## run an experiment: make run [EXPERIMENT=quickstart] [ARGS="rounds=5"]
	@$(BIN)/fedprompt run $(EXPERIMENT) $(ARGS)

sweep: setup ## run a sweep: make sweep [SWEEP=alpha_prompts] [ARGS="sweep.seeds=5"]
	@$(BIN)/fedprompt sweep $(SWEEP) $(ARGS)

cluster: setup ## start a Ray cluster on this machine: make cluster [WORKERS=2]
	@$(BIN)/python jobs/cluster.py start --workers $(WORKERS)

submit: setup ## run an experiment as a job of the cluster: make submit [EXPERIMENT=quickstart] [ARGS="rounds=5"]
	@$(BIN)/python jobs/submit.py run $(EXPERIMENT) -- $(ARGS)

job-status: setup ## list the cluster's jobs: make job-status [JOB=id]
	@$(BIN)/python jobs/submit.py status $(JOB)

job-stop: setup ## stop the newest running job, or one: make job-stop [JOB=id]
	@$(BIN)/python jobs/submit.py stop $(JOB)

cluster-stop: setup ## end the cluster that `make cluster` started, and nothing else
	@$(BIN)/python jobs/cluster.py stop

test: setup ## run the whole test suite: make test [ARGS="-k name"]
	@$(BIN)/python -m pytest $(ARGS)

test-cluster: setup ## test submission, several nodes, node loss and sweeps (a few minutes)
	@$(BIN)/python -m pytest tests/cluster -m cluster -n 0 --timeout=900 $(ARGS)

test-trust: setup ## try crashes, damaged files, mutated inputs, hostile updates and ports (at most 15 minutes)
	@$(BIN)/python -m pytest tests/trust -m "trust or not trust" --timeout=900 $(ARGS)

lint: setup ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

typecheck: setup ## check types
	@$(BIN)/mypy

format: setup ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## build the site into site/, the tutorials executed (the first time installs mkdocs)
	@$(BIN)/python -c "import ipykernel, material, mkdocstrings_handlers.python, nbclient" 2>/dev/null \
	|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints.lock -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict $(ARGS)
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

lock: setup ## write the versions of all that is installed into constraints.lock
	@$(BIN)/python .ci/lock.py

bench: setup ## measure the quickstart over three seeds and the state hashes (about 15 minutes)
	@$(BIN)/python -m benchmarks.quickstart $(ARGS)

bench-methods: setup ## compare all methods: runs what is missing (hours), tables, figures
	@$(BIN)/python -m benchmarks.methods.runner $(ARGS); status=$$?; \
	$(BIN)/python -m benchmarks.methods.tables && exit $$status

pretrain: setup ## train the embedded backbone again (about an hour): make pretrain [ARGS="--help"]
	@$(BIN)/fedprompt pretrain $(ARGS)

real: setup ## fetch real images into data/ and DINOv2 into weights/ (a few minutes)
	@$(BIN)/fedprompt fetch real $(ARGS)

clean: ## remove the environment and everything that tools left behind; runs/ stays
	@rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
