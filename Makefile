# Every target makes .venv first when it is missing; PYTHON=... picks the interpreter.
# make demo (or demo-spiking) DATA=path takes MNIST idx files or CIFAR-10 python batches instead of
# the digits.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.h csrc/cpu/*.h csrc/cpu/*.cpp) setup.py

.PHONY: demo demo-spiking test test-slow test-peers test-gpusim test-gpusim-fast test-compiled \
	test-mutations gpu bench lint format clean simulated-executor simulated-training simulated-linear \
	simulated-linear-bf16 simulated-spiking simulated-attention simulated-triton

$(STAMP): pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

lfp_kernels/_C_cpu.so: $(STAMP) $(NATIVE)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: lfp_kernels/_C_cpu.so
	$(RUN) -m lfp_kernels demo --out runs/demo $(if $(DATA),--data $(DATA))

demo-spiking: lfp_kernels/_C_cpu.so
	$(RUN) -m lfp_kernels demo --model snn-mlp --out runs/demo-spiking $(if $(DATA),--data $(DATA))

test: lfp_kernels/_C_cpu.so
	$(RUN) -m pytest -q -m "not slow and not gpu and not gpusim and not peers"

test-slow: lfp_kernels/_C_cpu.so
	$(RUN) -m pytest -q -m "slow"

# Against other packages, in an environment that has them: torch with CUDA's libraries, 6 GB.
PEERS := .venv-peers
$(PEERS)/.installed: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	touch $@

test-peers: $(PEERS)/.installed lfp_kernels/_C_cpu.so
	PYTHONPATH=. $(PEERS)/bin/python -m pytest -q -m peers tests/peers

# The executor of GPU code on the CPU: its own environment, with Triton and the CUDA compiler.
GPUSIM := .venv-gpusim
SIMULATED := GPUSIM_REQUIRE_CUDA=1 $(GPUSIM)/bin/python -m pytest -q
OPS := $(addprefix tests/test_, activation.py sum_dropout.py update.py optim.py rewards.py \
	batch_norm.py batch_norm_contract.py pool.py max_pool.py linear.py linear_update.py one_pass.py \
	conv.py conv_contract.py golden.py alignment_metrics.py split_rules.py split_rules_conv.py \
	feedback_rules.py norms.py embedding.py attention.py alignment.py)
$(GPUSIM)/.installed: requirements-gpusim.txt
	$(PYTHON) -m venv $(GPUSIM)
	$(GPUSIM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-gpusim.txt
	touch $@

# What CI runs, side by side: the executor itself; whole training steps (convolution, batch norm,
# pools, rewards, optimizers) on both backends; attention, norms and embeddings; linear at its tile
# limits, one tile and several per block, whose objects it shares; spiking neurons.
FAST := $(addprefix simulated-, training executor attention spiking triton linear linear-bf16)
test-gpusim-fast: $(GPUSIM)/.installed
	$(MAKE) --no-print-directory --jobs 3 --output-sync=target $(FAST)
simulated-executor:
	$(SIMULATED) tests/gpusim
simulated-training:
	LFP_SIM_SOURCES=activation.cu,batch_norm.cu,combine.cu,conv.cu,conv_rules.cu,linear.cu,linear_rules.cu,max_pool.cu,max_pool_redistribute.cu,pool.cu,reward.cu,update.cu \
		$(SIMULATED) --simulate cuda tests/gpusim_ops/test_training.py -k matches
simulated-linear: | simulated-training
	LFP_SIM_SOURCES=linear.cu,linear_rules.cu $(SIMULATED) --simulate cuda tests/gpusim_ops/test_linear_tiles.py -k float32
simulated-linear-bf16: | simulated-training
	LFP_SIM_SOURCES=linear.cu,linear_rules.cu $(SIMULATED) --simulate cuda --processors 1 \
		tests/gpusim_ops/test_linear_tiles.py -k "bfloat16 and redistribute"
simulated-spiking:
	LFP_SIM_SOURCES=lif.cu,spikes.cu $(SIMULATED) --simulate cuda tests/gpusim_ops/test_spiking_gpu.py \
		-k "not many_steps and (float32 or subtract- or not (forward or feedback or threshold))"
simulated-attention:
	LFP_SIM_SOURCES=attention.cu,attention_redistribute.cu,embedding.cu,softmax.cu,layer_norm.cu,group_norm.cu,update.cu \
		$(SIMULATED) --simulate cuda tests/test_attention.py tests/test_norms.py tests/test_embedding.py \
		-k "(formulas and native) or (float32 and (attnlrp or identity or update))"
simulated-triton:
	$(SIMULATED) --simulate triton tests/gpusim_ops/test_training.py -k "matches and momentum"

# All of it: every op test on both backends, sm_90a, traffic, what the compilers say. A process per
# file, as many at a time as there are processors; the files that fail are named at the end.
HERE := tests/gpusim_ops
COMPILED := $(wildcard $(HERE)/test_compile_*.py)
SIMULATED_FILES := $(filter-out $(COMPILED), $(wildcard $(HERE)/test_*.py)) $(OPS)
NO_CUDA := $(HERE)/test_cuda_hopper.py $(HERE)/test_triton_% $(HERE)/%_triton.py
ON_CUDA := $(addprefix on-cuda/, $(filter-out $(NO_CUDA), $(SIMULATED_FILES)))
NO_TRITON := $(HERE)/test_cuda_% $(HERE)/%_cuda.py
ON_TRITON := $(addprefix on-triton/, $(filter-out $(NO_TRITON), $(SIMULATED_FILES)))
ON_ONE := $(addprefix on-one/, $(HERE)/test_linear_tiles.py $(HERE)/test_cuda_long_sums.py)
ON_HOPPER := on-hopper/$(HERE)/test_cuda_hopper.py
.PHONY: cuda-objects compiled $(ON_CUDA) $(ON_TRITON) $(ON_ONE) $(ON_HOPPER)
test-gpusim: $(GPUSIM)/.installed
	$(MAKE) --no-print-directory --keep-going --output-sync=target --jobs $$(nproc) \
		simulated-executor compiled $(ON_CUDA) $(ON_TRITON) $(ON_ONE) $(ON_HOPPER)
compiled:
	$(SIMULATED) -m "not slow" $(HERE)
cuda-objects:
	$(SIMULATED) --simulate cuda --collect-only tests/test_linear.py > /dev/null
$(ON_CUDA): on-cuda/%: % | cuda-objects
	$(SIMULATED) --simulate cuda $<
$(ON_ONE): on-one/%: % | cuda-objects
	$(SIMULATED) --simulate cuda --processors 1 $<
$(ON_HOPPER): on-hopper/%: %
	$(SIMULATED) --simulate cuda --capability 90 --processors 4 $<
$(ON_TRITON): on-triton/%: %
	$(SIMULATED) --simulate triton $<

# Machine code for all architectures; more than an hour.
test-compiled: $(GPUSIM)/.installed
	$(SIMULATED) $(HERE)

# Plants bugs in the kernels and expects the tests to see them; an hour and more.
test-mutations: $(GPUSIM)/.installed
	$(GPUSIM)/bin/python -m tests.mutation cuda
	$(GPUSIM)/bin/python -m tests.mutation triton

# For a machine with a GPU: build, the op tests on the device, the sanitizer, the benchmarks.
gpu: $(STAMP)
	LFP_KERNELS_BUILD=cuda $(RUN) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	$(RUN) -m lfp_kernels backends --device cuda
	$(RUN) -m pytest -q --device cuda $(OPS)
	if command -v compute-sanitizer > /dev/null; then \
		compute-sanitizer --error-exitcode 1 $(RUN) -m pytest -q --device cuda tests/test_linear.py; \
	else echo "compute-sanitizer is not on PATH: memory was not checked"; fi
	$(RUN) -m bench run --device cuda --out runs/gpu
	$(RUN) -m bench plot runs/gpu/results.csv

bench: lfp_kernels/_C_cpu.so
	$(RUN) -m bench run --out runs/bench

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(STAMP)
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf build dist *.egg-info lfp_kernels/*.so lfp_kernels/_build_info.json
