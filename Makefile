# Every target makes .venv first when it is missing; PYTHON=... picks the interpreter.
# make demo DATA=path takes MNIST idx files or CIFAR-10 python batches instead of the digits.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.h csrc/cpu/*.h csrc/cpu/*.cpp) setup.py

.PHONY: demo test test-slow test-gpusim bench lint format clean

$(STAMP): pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

lfp_kernels/_C_cpu.so: $(STAMP) $(NATIVE)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: lfp_kernels/_C_cpu.so
	$(RUN) -m lfp_kernels demo --out runs/demo $(if $(DATA),--data $(DATA))

test: lfp_kernels/_C_cpu.so
	$(RUN) -m pytest -q -m "not slow and not gpu and not gpusim"

test-slow: lfp_kernels/_C_cpu.so
	$(RUN) -m pytest -q -m "slow"

# The executor of GPU code on the CPU: its own environment, with Triton and the CUDA compiler.
GPUSIM := .venv-gpusim
$(GPUSIM)/.installed: requirements-gpusim.txt
	$(PYTHON) -m venv $(GPUSIM)
	$(GPUSIM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-gpusim.txt
	touch $@

test-gpusim: $(GPUSIM)/.installed
	GPUSIM_REQUIRE_CUDA=1 $(GPUSIM)/bin/python -m pytest -q tests/gpusim

bench: lfp_kernels/_C_cpu.so
	$(RUN) -m bench run --out runs/bench

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

format: $(STAMP)
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

clean:
	rm -rf build dist *.egg-info lfp_kernels/*.so lfp_kernels/_build_info.json
