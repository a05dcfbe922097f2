# `make setup` once, `make demo` to see it work, `make test` before a change goes in.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-stamp
EXTRAS ?= cpu,openvino,tensorrt,serve,video,export,dev
# The demo installs what it uses; where all of the above is installed, that will do.
DEMO_STAMP := $(VENV)/.demo-stamp
$(DEMO_STAMP): EXTRAS := cpu,export
# The documentation is built with what it takes alone, beside whatever else is installed.
DOCS_STAMP := $(VENV)/.docs-stamp
# Installed first and by itself, so that the resolver never weighs another build of it.
TORCH  := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test sanitizers slow ray cuda-stub torch-tensorrt fuzz cpp lint format docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 11

setup: $(STAMP)  ## make .venv and install everything, pinned

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python %d.%d found; 3.11 to 3.13 needed: make setup PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)

$(STAMP) $(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

$(DOCS_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

demo: $(or $(wildcard $(STAMP)),$(DEMO_STAMP))  ## draw with the bundle that ships, export its model, draw gated and ungated, time it
	PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh

# In the order of their folders: by the number of their tests, minutes of fuzzing in a file of four come last, one by one.
# A worker that dies fails the run: with a new one in its place, pytest-xdist waits for ever.
test: setup lint  ## what CI runs
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Three builds of libtgate beside the tests' own, in one process: they take both cores.
sanitizers: setup  ## libtgate under AddressSanitizer, UBSan and TSan, and libFuzzer's targets; CI runs it, too
	$(BIN)/python -m pytest -m "sanitizers and not slow" tests/cpp

slow: setup  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

ray: setup  ## the tests under Ray, which is 300 MB more
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest tests/serve/test_ray.py tests/serve/test_ray_parts.py

# onnxruntime-gpu installs the same module as onnxruntime, so it has an environment of its own: without torch, and
# without CUDA, whose libraries the stub takes the place of. The other environment exports what it cannot.
CUDA_VENV  ?= .venv-cuda
CUDA_STAMP := $(CUDA_VENV)/.setup-stamp
ORT_GPU    := $(shell sed -n 's/^onnxruntime==/onnxruntime-gpu==/p' constraints.txt)
$(CUDA_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(ORT_GPU) onnx pytest --editable '.[cuda]'
	@touch $@

STUB_BUNDLE := build/cuda_stub/mini-sdxl
$(STUB_BUNDLE): $(STAMP)
	$(BIN)/tgate-export --model mini-sdxl --dtype fp16 --no-verify --output $@ --force

cuda-stub: $(CUDA_STAMP) $(STUB_BUNDLE) cpp-release  ## ort-cuda, Python's and libtgate's, on ONNX Runtime's CUDA provider over a stub of CUDA, which is 250 MB more
	$(CUDA_VENV)/bin/python -m tests.cuda_stub -m pytest --confcutdir tests/cuda_stub tests/cuda_stub

# Its own code and the bindings that it asks for, beside the environment and not in it: they are held to an older
# TensorRT than ours, which no registry has, and its libraries need that and CUDA.
TORCH_TENSORRT := build/torch_tensorrt
$(TORCH_TENSORRT)/.stamp: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) torch-tensorrt==2.13.0 tensorrt-cu13-bindings==11.0.0.114 dllist==2.0.0
	rm -rf $(@D)/torch_tensorrt/lib
	@touch $@

torch-tensorrt: $(TORCH_TENSORRT)/.stamp  ## which operators torch-tensorrt could not convert, of every family's graphs; minutes
	PYTHONPATH=$(TORCH_TENSORRT) $(BIN)/python -m pytest tests/torch_tensorrt

# What it finds stays in tests/fuzz/corpus, for the tests; led by coverage where atheris is: pip install '.[fuzz]'
TIME ?= 600
fuzz: setup  ## make up files as a stranger would, for TIME=600 seconds
	nice -n 10 $(BIN)/python -m tests.fuzz --seconds $(TIME)

# libtgate, by the presets of runtime/cpp/CMakePresets.json: make cpp is the library and tgate-run, cpp-asan and such are
# the tests' builds.
cpp: cpp-release  ## libtgate and tgate-run, in build/cpp/release
cpp-%:
	scripts/cpp_setup.sh $(if $(filter fuzz,$*),--fuzz) build/cpp/include
	cmake -S runtime/cpp --preset $* -D ONNXRUNTIME_INCLUDE_DIR=$(abspath build/cpp/include)
	cd runtime/cpp && cmake --build --preset $*

lint: setup  ## style, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite what can be rewritten
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP)  ## build the documentation into site/, its links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo site/index.html

clean:  ## remove what was made, the environment and bundles included
	rm -rf $(VENV) $(CUDA_VENV) bundles build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
