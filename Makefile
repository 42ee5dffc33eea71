# Everything a developer does with this project; `make` alone lists it.
#
# Nothing but Python 3.11 to 3.13, make and git is expected: the first target that needs Poetry
# puts a pinned one into .tools/ (git-ignored), and Poetry fills .venv/ from poetry.lock. Whoever
# has a Poetry of their own may use it instead: `poetry install` and `poetry run …` share .venv/.

# The steps share one virtual environment, and check-all's order is part of its meaning.
.NOTPARALLEL:
.DEFAULT_GOAL := help

# Not taken from the environment: shells and Conda export a HOST that names something else.
HOST = 0.0.0.0
PORT = 8000
IMAGE = llm-fastapi-service:latest
CONTAINER = llm-service

POETRY_VERSION := 2.5.1
MIRROR_PLUGIN_VERSION := 0.6.5
TOOLS := .tools/poetry
TOOLS_STAMP := $(TOOLS)/.poetry-$(POETRY_VERSION)-mirror-$(MIRROR_PLUGIN_VERSION)
INSTALL_STAMP := .venv/.installed-by-make

# torch's build: cuda, as poetry.lock has it, or cpu, which is 3.6 GB less. The stamp keeps the choice.
INSTALLED_TORCH := $(or $(shell cat $(INSTALL_STAMP) 2>/dev/null),cuda)
TORCH = $(INSTALLED_TORCH)
# vLLM's environment, which is not the service's: it needs other versions of torch and FastAPI. The
# stamp keeps the choice between cuda and cpu.
VLLM := .tools/vllm
VLLM_STAMP := $(VLLM)/.installed-by-make
INSTALLED_VLLM := $(shell cat $(VLLM_STAMP) 2>/dev/null)
VLLM_VARIANT = $(or $(VARIANT),$(INSTALLED_VLLM),cuda)
# Ray's environment: what Ray needs beside the packages in .venv/, which it finds there.
RAY = .tools/ray
RAY_VERSION := 2.60.0
RAY_STAMP = $(RAY)/.ray-$(RAY_VERSION)
# Where the CPU build comes from; empty: pip's own sources.
TORCH_INDEX_URL = https://download.pytorch.org/whl/cpu

# Prints the first suitable Python's own path, so that a version manager's shim or an activated
# environment does not end up inside .venv/. ensurepip is asked for because some distributions
# ship venv without it.
define FIND_PYTHON
for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3); do \
	"$$candidate" -c 'import ensurepip, sys, venv; v = sys.version_info[:2]; \
	print(getattr(sys, "_base_executable", sys.executable)); sys.exit(not (3, 11) <= v < (3, 14))' \
	2>/dev/null && exit 0; \
done; \
echo "error: no Python 3.11 to 3.13 with its venv module found: install one (Debian: python3.11" \
	"and python3.11-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1
endef

# Settings that would send the tools, or what Poetry installs, elsewhere than into the environments
# of this project: pip's targets, and a virtual environment that happens to be active.
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_PYTHON PIP_CONSTRAINT PIP_REQUIREMENT
unexport PIP_NO_DEPS PIP_DRY_RUN PYTHONHOME VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV

# make would hand down what these targets are given, where the service looks for its settings.
unexport MODEL OUTPUT

# Container images like to set it. Without bytecode every process compiles its half of torch and
# transformers anew, which doubles the start of the engine.
unexport PYTHONDONTWRITEBYTECODE

# Poetry reads the JSON pages that only some package indexes have. The plugin sends it to the
# simple API that pip uses, which all have; so whatever pip is configured for, Poetry follows, its
# certificate authority included. pip's own parser is asked, as `pip config get` reads one file only.
define ASK_PIP
import os, shlex
from pip._internal.commands import create_command
pip = create_command("download").parser.get_default_values()
for name, value in (("POETRY_PYPI_MIRROR_URL", pip.index_url), ("REQUESTS_CA_BUNDLE", pip.cert)):
    if value and not os.environ.get(name):
        print(f"export {name}={shlex.quote(value)}")
endef
export ASK_PIP

# The keyring is left alone because a locked one waits for a window that no terminal shows.
export POETRY_KEYRING_ENABLED ?= false
export POETRY_VIRTUALENVS_IN_PROJECT := true
export POETRY_NO_INTERACTION := 1
POETRY := $(TOOLS)/bin/poetry
# What `poetry run` does, without half a second of Poetry.
RUN := env PATH="$(CURDIR)/.venv/bin:$$PATH"

##@ Start here

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: model ## Fetch a small real model, start the service and ask it (KEEP=1 leaves it running)
	@$(RUN) KEEP=$(KEEP) python -m scripts.demo

.PHONY: install
install: $(INSTALL_STAMP) ## Install the locked dependencies into .venv/ (TORCH=cpu: without CUDA)

.PHONY: install-vllm
install-vllm: $(VLLM_STAMP) ## Install vLLM into .tools/vllm/, for GPUs (VARIANT=cpu: for CPUs)

.PHONY: model
model: install ## Fetch the bundled model (98 MB, once)
	@$(RUN) python -m scripts.fetch_model

.PHONY: export-openvino
export-openvino: install ## Convert a safetensors model for OpenVINO (MODEL=owner/name WEIGHTS=int8|int4)
	@$(if $(MODEL),,echo "name the model: make export-openvino MODEL=owner/name" >&2; exit 2;) \
	$(RUN) python -m scripts.export_openvino "$(MODEL)" --weights $(or $(WEIGHTS),int8) $(if $(OUTPUT),--output "$(OUTPUT)")

.PHONY: run
run: install ## Start the service (HOST=0.0.0.0 PORT=8000)
	$(RUN) uvicorn app.main:app --host $(HOST) --port $(PORT)

##@ Checks

IN_PROCESSES = --numprocesses $(or $(JOBS),4) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: test
test: model ## Run the tests in four processes (JOBS=4); the coverage report is htmlcov/index.html
	$(RUN) pytest tests/ -v --cov=app --cov-report=term-missing --cov-report=html $(IN_PROCESSES)

.PHONY: test-fast
test-fast: install ## Run the unit and architecture tests, in less than a minute
	$(RUN) pytest tests/unit tests/architecture --quiet $(IN_PROCESSES)

.PHONY: test-isolation
test-isolation: install ## Two keys, 100,000 random operations: neither may notice the other (OPERATIONS=, SEED=)
	ISOLATION_OPERATIONS=$(or $(OPERATIONS),100000) ISOLATION_SEED=$(or $(SEED),7) \
		$(RUN) pytest tests/api/test_isolation.py -v --timeout=3600

.PHONY: test-full
test-full: model ## Run all tests at full size, those that the suite leaves out or shortens too
	FULL_SIZE=1 $(RUN) pytest tests/ -m "" --timeout 3600

.PHONY: schemas
schemas: model ## Ask the bundled model for JSON of 200 random schemas, on both engines
	SCHEMAS=200 $(RUN) pytest tests/engine/test_random_schemas.py -rP --timeout 3600

.PHONY: models
models: install ## Try tiny models of every architecture, write docs/models.md (ARGS="llama gpt2" for some)
	$(RUN) python -m tests.zoo $(ARGS)

.PHONY: test-vllm
test-vllm: model ## Test the vllm engine; without a vLLM it installs the one for CPUs first
	@test -e $(VLLM_STAMP) || $(MAKE) install-vllm VARIANT=$(or $(VARIANT),cpu)
	TEST_VLLM=1 $(RUN) pytest tests -m vllm -v

.PHONY: test-ray
test-ray: $(RAY_STAMP) ## Test replicas of Ray Serve on this machine; installs Ray first (RAY=.tools/ray)
	TEST_RAY="$(abspath $(RAY))" $(RUN) pytest tests/api/test_ray.py -v

.PHONY: test-clients
test-clients: model ## Run programs of other OpenAI-compatible clients, in Python and node (ARGS="litellm" for some)
	$(RUN) python -m tests.contract.clients $(ARGS)

.PHONY: test-browser
test-browser: install ## Test the pages in a real Chromium, at full length (Debian: apt-get install chromium)
	$(RUN) pytest tests/playground tests/api/test_pages.py -m "" -v

.PHONY: screenshots
screenshots: model ## Take pictures of the playground with the bundled model, for docs/images
	$(RUN) python -m tests.playground

.PHONY: docs
docs: install ## Make README.md and docs/ a site in build/docs/site, with strict links
	$(RUN) python -m scripts.docs_site

.PHONY: format
format: install ## Format the code and sort the imports
	$(RUN) ruff check --select I --fix-only .
	$(RUN) ruff format .

.PHONY: format-check
format-check: install ## Check the format without changing anything
	$(RUN) ruff format --check .

.PHONY: lint
lint: install ## Look for mistakes and bad style
	$(RUN) ruff check .

.PHONY: scan
scan: install ## Look for insecure code (bandit)
	$(RUN) bandit --configfile pyproject.toml --quiet --recursive app deploy

.PHONY: audit
audit: install ## Look the locked packages up in the database of known vulnerabilities (network)
	$(RUN) python -m scripts.audit $(AUDIT_OPTIONS)

.PHONY: type-check
type-check: install ## Check the types
	$(RUN) mypy app benchmarks deploy scripts tests

.PHONY: imports
imports: install ## Check which layer imports which
	$(RUN) lint-imports

.PHONY: deps
deps: install ## Look for missing and unused dependencies
	$(RUN) deptry .

.PHONY: lock-check
lock-check: install ## Check that poetry.lock fits pyproject.toml
	$(POETRY) check --lock

.PHONY: check-all
check-all: AUDIT_OPTIONS = --where-reachable
check-all: format-check lint scan type-check imports deps lock-check audit test ## Run all of the checks

.PHONY: restarts
restarts: install ## Restart the service again and again under load, losing nothing (COUNT=50)
	$(RUN) pytest tests/api/test_restarts.py --restarts $(or $(COUNT),50)

.PHONY: test-replicas
test-replicas: install ## Restart and kill copies of the service behind a real HAProxy (COUNT=20)
	$(RUN) pytest tests/api/test_behind_haproxy.py --restarts $(or $(COUNT),20) -v

.PHONY: failures
failures: install ## Failure modes at their full size: 10,000 connections, half a minute of silence
	$(RUN) pytest tests/api tests/engine -m full_size -rP

.PHONY: fuzz
fuzz: install ## Fuzz for an hour or more (ARGS="schema wire code --schema-cases 5000 …" for a part)
	$(RUN) python -m tests.fuzz $(ARGS)

.PHONY: soak
soak: model ## Mixed traffic, and what it leaves behind (MINUTES=10; take 240 before a release)
	$(RUN) python -m benchmarks soak --minutes $(or $(MINUTES),10) $(ARGS)

##@ Benchmarks

.PHONY: bench
bench: model ## Compare with other servers, write docs/performance.md (ARGS=--quick for a try)
	$(RUN) python -m benchmarks large $(ARGS)
	$(RUN) python -m benchmarks table $(ARGS)

.PHONY: bench-curve
bench-curve: model ## Load and prompt-length curves, overload (ARGS="--engine transformers")
	$(RUN) python -m benchmarks curve $(ARGS)

.PHONY: overload
overload: model ## Ten times what it can answer, for two minutes (ARGS="--factor 4 --rounds 3")
	$(RUN) python -m benchmarks overload $(ARGS)

##@ Docker

.PHONY: build-docker
build-docker: ## Build the image (for GPUs VARIANT=cuda or VARIANT=vllm)
	docker build $(if $(VARIANT),--build-arg VARIANT=$(VARIANT)) \
		--build-arg REVISION=$(or $(shell git rev-parse HEAD 2>/dev/null),unknown) \
		-t $(IMAGE) .

# A variable is passed only where it is set, because passing an unset one removes .env's value. The
# volume keeps downloaded models when the container is removed; the time to stop is longer than
# app.shutdown_grace_seconds, so that running requests may finish.
.PHONY: run-docker
run-docker: ## Start a container with config.yml, .env and the keys of the environment
	docker run -d \
		-p $(PORT):8000 \
		$(if $(wildcard .env),--env-file .env) \
		$(if $(HUGGINGFACE_TOKEN),-e HUGGINGFACE_TOKEN) \
		$(if $(SECURITY__API_KEY),-e SECURITY__API_KEY) \
		-v "$(CURDIR)/config.yml:/app/config.yml" \
		-v llm-models:/models \
		--stop-timeout 30 \
		--name $(CONTAINER) \
		$(IMAGE)

.PHONY: logs
logs: ## Follow the container's log
	docker logs -f $(CONTAINER)

.PHONY: test-docker
test-docker: ## Build the image and check it, with Docker or else with podman (root; VARIANT=vllm-cpu)
	@python="$$($(FIND_PYTHON))"; \
	"$$python" -m scripts.test_docker --image $(IMAGE) $(if $(VARIANT),--variant $(VARIANT))

##@ Housekeeping

.PHONY: clean
clean: ## Remove reports and caches; .venv/, .tools/ and models/ stay
	rm -rf htmlcov .coverage .coverage.* coverage.xml build dist .demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find app benchmarks scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(TOOLS_STAMP):
	@set -eu; python="$$($(FIND_PYTHON))"; \
	echo "Installing Poetry $(POETRY_VERSION) into $(TOOLS) with $$python"; \
	rm -rf $(TOOLS); \
	"$$python" -m venv $(TOOLS); \
	$(TOOLS)/bin/python -m pip install --quiet --no-user --disable-pip-version-check \
		"poetry==$(POETRY_VERSION)" "poetry-plugin-pypi-mirror==$(MIRROR_PLUGIN_VERSION)"; \
	touch $@

# Poetry cannot leave out what torch of the lock file needs. So pip installs what is locked, but for
# torch with CUDA, as it does in the image; the order leaves an environment with CUDA whole where
# there is no CPU build to be had.
define INSTALL_WITHOUT_CUDA
	lists="$$(mktemp -d)"; trap 'rm -rf "$$lists"' EXIT; \
	pip() { $(TOOLS)/bin/python -m pip --python .venv/bin/python "$$@"; }; \
	$(TOOLS)/bin/python deploy/docker/lock_requirements.py --variant cpu --dev poetry.lock "$$lists"; \
	if ! said="$$(pip install --no-deps --retries 1 $(addprefix --index-url ,$(TORCH_INDEX_URL)) \
		--requirement "$$lists/torch.txt" 2>&1)"; then \
		echo "error: no CPU build of torch at $(or $(TORCH_INDEX_URL),pip's own sources); name an index with" \
			"TORCH_INDEX_URL=, or a folder with PIP_FIND_LINKS= ($$(echo "$$said" | tail -n 1))" >&2; \
		exit 1; \
	fi; \
	pip install --no-deps --require-hashes --requirement "$$lists/requirements.txt"; \
	pip uninstall --yes --quiet --quiet --requirement "$$lists/gpu.txt"; \
	$(POETRY) install --only-root
endef

# All that vLLM needs is in the list, by version: pip looks for nothing more. The CPU build of torch
# comes from its own index.
$(VLLM_STAMP): deploy/vllm/cpu.txt deploy/vllm/cuda.txt $(TOOLS_STAMP) $(if $(filter $(VLLM_VARIANT),$(INSTALLED_VLLM)),,other-torch)
	@set -eu; python="$$($(FIND_PYTHON))"; list=deploy/vllm/$(VLLM_VARIANT).txt; \
	test -e "$$list" || { echo "error: VARIANT is cpu or cuda" >&2; exit 2; }; \
	echo "Installing vLLM for $(VLLM_VARIANT) into $(VLLM) with $$python (3.5 GB, with CUDA 12 GB)"; \
	rm -rf $(VLLM); "$$python" -m venv --without-pip $(VLLM); \
	pip() { $(TOOLS)/bin/python -m pip --python $(VLLM)/bin/python install --quiet --no-deps "$$@"; }; \
	if [ $(VLLM_VARIANT) = cpu ]; then \
		pip --retries 1 $(addprefix --index-url ,$(TORCH_INDEX_URL)) "$$(sed -n 's/^\(torch==[^ ]*+cpu\).*/\1/p' "$$list")"; \
	fi; \
	pip --requirement "$$list"; \
	echo $(VLLM_VARIANT) > $@

$(RAY_STAMP): $(INSTALL_STAMP)
	@set -eu; echo "Installing Ray $(RAY_VERSION) into $(RAY) (320 MB)"; \
	rm -rf $(RAY); .venv/bin/python -m venv --without-pip $(RAY); \
	packages="$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$packages/service.pth"; \
	$(TOOLS)/bin/python -m pip --python $(RAY)/bin/python install --quiet "ray[serve]==$(RAY_VERSION)"; \
	touch $@

.PHONY: other-torch
other-torch:

# An existing .venv/ is kept: choosing a Python for it again could make Poetry build it anew.
$(INSTALL_STAMP): $(TOOLS_STAMP) poetry.lock pyproject.toml $(if $(filter $(TORCH),$(INSTALLED_TORCH)),,other-torch)
	@set -eu; settings="$$($(TOOLS)/bin/python -c "$$ASK_PIP")"; eval "$$settings"; \
	if ! .venv/bin/python -c '' 2>/dev/null; then \
		python="$$($(FIND_PYTHON))"; \
		echo "Creating .venv with $$python"; \
		$(POETRY) env use --quiet "$$python"; \
	fi; \
	case "$(TORCH)" in \
		cuda) echo "Installing the locked dependencies into .venv (about 5 GB the first time)"; \
			$(POETRY) install;; \
		cpu) echo "Installing the locked dependencies into .venv, without CUDA (about 2 GB the first time)"; \
			$(INSTALL_WITHOUT_CUDA);; \
		*) echo "error: TORCH is cpu or cuda" >&2; exit 2;; \
	esac; \
	echo $(TORCH) > $@
