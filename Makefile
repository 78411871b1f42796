# `make demo` runs the main job, `make test` the tests, `make test-all` the slow ones too; each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The newest CUDA build where an NVIDIA driver answers; elsewhere one fixed version, of which a CPU build is enough.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(GPU),torch>=2.11,torch==2.13.0)
# What a change of must be installed (and compiled) again; Python files of an editable install need nothing.
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
DEMO := runs/demo
SANITIZED := build/sanitize
TIMM := build/timm
UMAP := build/umap
SCHEDULERS := build/schedulers
SERVE := build/serve

.PHONY: demo test test-all test-timm test-umap test-schedulers test-serve test-native soak check docs clean

demo: $(VENV)/.installed
	$(BIN)/fastmae pretrain --data_path digits --output_dir $(DEMO) --resume auto --tune off

# Tests are small and many, so processes with one thread each; a GPU is for one of them at a time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(if $(GPU),1,auto) --maxprocesses 8 --dist worksteal

test: check
	$(PYTEST) -m 'not slow$(if $(GPU),, and not gpu)'

# The slow ones too, among them wheels for every Python that is supported.
test-all: check
	$(PYTEST)

# What needs timm, in an environment of its own: timm imports torchvision, which needs a torch of its own version, and
# that may be a CUDA build of several GB.
test-timm: $(TIMM)/.installed
	OMP_NUM_THREADS=1 $(TIMM)/bin/python -m pytest -q -k timm tests/model tests/export

# What needs umap-learn, in an environment of its own: numba wants a numpy of its choice.
test-umap: $(UMAP)/.installed
	OMP_NUM_THREADS=1 $(UMAP)/bin/python -m pytest -q tests/evaluate/test_map.py

# What needs SkyPilot and Ray, in an environment of their own: both are large, and bring versions of what others need.
test-schedulers: $(SCHEDULERS)/.installed
	OMP_NUM_THREADS=1 $(SCHEDULERS)/bin/python -m pytest -q tests/test_schedulers.py

# The service on Ray Serve, in an environment of its own, as Ray is large.
test-serve: $(SERVE)/.installed
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -q --disable-warnings tests/serve

# The C++ ops once more, built with the address and undefined-behaviour sanitizers.
test-native: $(VENV)/.installed-dev
	$(BIN)/cmake -S . -B $(SANITIZED) -DFASTMAE_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(SANITIZED)
	$(BIN)/cmake --build $(SANITIZED) --parallel $$(nproc)
	FASTMAE_SANITIZED=$(CURDIR)/$(SANITIZED) PYTHONPATH=tests ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q --capture=sys -p sanitized tests/ops/test_cpu.py tests/ops/test_wrong_arguments.py \
		tests/ops/test_depthwise_visible.py tests/ops/test_grn.py tests/ops/test_bernoulli_masking.py tests/data/test_chunks.py

# Long campaigns, of which the tests do a sample: kills, damages, mutations, hostile calls (docs/reliability.md). What is
# done is kept: `make soak` goes on where it was stopped, and `make soak FRESH=1` begins anew.
soak: $(VENV)/.installed-dev
	$(BIN)/python tests/soak.py $(if $(FRESH),--fresh)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site. It needs no server and no network: open build/docs/index.html.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo build/docs/index.html

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fastmae needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 2; }
	@c++ --version >/dev/null 2>&1 || { echo "fastmae needs a C++ compiler, such as g++; install one"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check '$(TORCH)' -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check '$(TORCH)' -e '.[dev]'
	touch $@

$(UMAP)/.installed: $(SOURCES)
	test -x $(UMAP)/bin/python || $(PYTHON) -m venv $(UMAP)
	$(UMAP)/bin/python -m pip install -q --disable-pip-version-check '$(TORCH)' pytest pytest-timeout -e '.[parquet,report,umap]'
	touch $@

$(TIMM)/.installed: $(SOURCES)
	test -x $(TIMM)/bin/python || $(PYTHON) -m venv $(TIMM)
	$(TIMM)/bin/python -m pip install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm \
		hypothesis pytest pytest-timeout transformers -e '.[export]'
	touch $@

$(SCHEDULERS)/.installed: $(SOURCES)
	test -x $(SCHEDULERS)/bin/python || $(PYTHON) -m venv $(SCHEDULERS)
	$(SCHEDULERS)/bin/python -m pip install -q --disable-pip-version-check '$(TORCH)' -e . pytest pytest-timeout \
		kubeflow-trainer-api submitit skypilot 'ray[train]'
	touch $@

$(SERVE)/.installed: $(SOURCES)
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install -q --disable-pip-version-check '$(TORCH)' -e '.[serve]' httpx pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info fastmae/_C*.so
