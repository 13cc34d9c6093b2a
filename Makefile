# make demo   train a supervised baseline and MixPL on synthetic scenes, write runs/demo/report.html
# make test   build and run the test suite, its drop-in part on the newest and the oldest transformers
# make lint   ruff, mypy, clang-format
# make bench  CPU benchmarks, one thread
# make gpu    one-command GPU check: build for the GPU present, GPU tests, GPU benchmarks (uses the python3 that is there)
#
# Needs Python >= 3.10 and a C++ compiler; everything else goes into .venv. CUDA kernels are built where a toolkit is found.

PYTHON ?= python3
TORCH  ?= torch==2.11.0 torchvision==0.26.0
PIP    := .venv/bin/python -m pip --disable-pip-version-check install --quiet
BUILD  := .venv/bin/python setup.py --quiet build_ext --inplace > .venv/build.log 2>&1 || { cat .venv/build.log; exit 1; }
CSRC   := setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# The oldest transformers that drop-ins and adapters know, in a folder of its own: it wants an older hub client than the newest one does.
OLD_HF := .venv/transformers-5.17

.PHONY: demo test test-old-transformers lint format bench gpu clean

demo: .venv/.built-cpu
	.venv/bin/ssod-fast demo

test: .venv/.built .venv/.dev
	.venv/bin/pytest tests $(PYTEST_ARGS)
	$(MAKE) --no-print-directory test-old-transformers

test-old-transformers: .venv/.built $(OLD_HF)/.done
	PYTHONPATH=$(OLD_HF) .venv/bin/pytest tests/dropin/test_transformers_models.py tests/dropin/test_transformers_losses.py \
	  tests/detectors/test_from_transformers.py tests/detectors/test_build_transformers.py

$(OLD_HF)/.done: .venv/.dev
	$(PIP) --target $(OLD_HF) --no-deps transformers==5.17.0
	$(PIP) --target $(OLD_HF) "huggingface-hub<2"
	@touch $@

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(filter-out setup.py,$(CSRC)) $(wildcard tests/cpp/*.cpp)

format: .venv/.dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(filter-out setup.py,$(CSRC)) $(wildcard tests/cpp/*.cpp)

bench: .venv/.built .venv/.dev
	.venv/bin/python benchmarks/run.py --device cpu
	.venv/bin/python benchmarks/dropin/transformers_models.py --device cpu
	.venv/bin/python benchmarks/detectors/deformable_detr.py --device cpu

# The link and the safe path keep the repository root, where a folder called kernels lies, off sys.path.
gpu:
	SSOD_FAST_BUILD=cuda TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
	  $(PYTHON) setup.py build_ext --inplace
	mkdir -p build/site && ln -sfn ../../ssod_fast build/site/ssod_fast
	PYTHONPATH=build/site $(PYTHON) -m ssod_fast.ops
	status=0; export PYTHONSAFEPATH=1 PYTHONPATH=build/site; \
	$(PYTHON) -m pytest -m gpu tests/ops tests/nn tests/criterion tests/dropin tests/triton_kernels tests/detectors tests/methods -q || status=$$?; \
	PYTHONSAFEPATH= $(PYTHON) benchmarks/run.py --device cuda --out $(or $(OUT),benchmarks/results) || status=$$?; \
	exit $$status

# Stamps: a second call starts at once.
.venv/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "ssod_fast needs Python >= 3.10: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "setuptools>=70.1,<82" wheel packaging ninja $(TORCH)
	@touch $@

.venv/.installed: .venv/.base pyproject.toml
	SSOD_FAST_BUILD=none $(PIP) --no-build-isolation -e ".[train]"
	@touch $@

.venv/.dev: .venv/.installed
	SSOD_FAST_BUILD=none $(PIP) --no-build-isolation -e ".[train,dev]"
	@touch $@

# The demo needs no CUDA kernels, which take longer to compile than all the rest.
.venv/.built-cpu: .venv/.installed $(CSRC)
	@echo "building the CPU kernels"
	@SSOD_FAST_BUILD=cpu $(BUILD)
	@touch $@

.venv/.built: .venv/.installed $(CSRC)
	@echo "building the CPU kernels, and the CUDA kernels where a toolkit is found"
	@$(BUILD)
	@touch .venv/.built-cpu $@

clean:
	rm -rf .venv build dist runs *.egg-info ssod_fast/*.so
