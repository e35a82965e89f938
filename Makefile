# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
DATA ?= digits
DEMO ?= demo
CONSTRAINTS ?= -c constraints.txt
PIP_ARGS = $(CONSTRAINTS) -e .
# Options of fcmae minkowski; MINKOWSKI=skip tests without MinkowskiEngine.
MINKOWSKI ?= --cpu
# Of make fuzz.
MINUTES ?= 20
# Of make test: percent; and skip, for the everyday suite.
COVERAGE ?=
SLOW ?=
# Of make study; DATA is its images.
STUDY ?= digits
SCALE ?= smoke

BIN = $(VENV)/bin
MINKOWSKI_SOURCES = $(wildcard convnextv2/commands/*minkowski*.py)
SOURCES = setup.py pyproject.toml requirements.txt constraints.txt $(wildcard sparse_ops/backends/cpu/csrc/*)

ifeq ($(MINKOWSKI),skip)
TEST_READY = $(VENV)/.installed-test
else
TEST_READY = $(VENV)/.installed-minkowski
endif
# No test runs where one of these is missing, and none is skipped for another reason than a device.
test: export REQUIRE_BACKENDS = $(if $(filter skip,$(MINKOWSKI)),cpu,cpu minkowski)
SANITIZED = build/sanitized/sparse_ops/backends/cpu/_cpu.so
ARM = build/arm/sparse_ops/backends/cpu/_cpu.so
ARM_TOOLS = aarch64-linux-gnu-g++ qemu-aarch64
BROWSERS = chromium chromium-browser google-chrome-stable google-chrome

.PHONY: help demo study test sanitize arm site browser lint hooks fuzz format bench minkowski dist clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say make PYTHON=python3.11, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@echo "Installing into $(VENV); torch alone is several GB, so this takes a few minutes the first time."
	$(BIN)/python -m pip install --quiet $(PIP_ARGS)
	@$(BIN)/python -m sparse_ops
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_ARGS)[test]
	@touch $@

$(VENV)/.installed-minkowski: $(VENV)/.installed-test $(MINKOWSKI_SOURCES)
	$(BIN)/python -m convnextv2 minkowski $(MINKOWSKI)
	@touch $@

demo: $(VENV)/.installed ## pre-train, convert, fine-tune, predict; DATA=<folder of class folders> for your own images
	$(BIN)/python -m convnextv2 demo --data "$(DATA)" --output "$(DEMO)"

study: $(VENV)/.installed ## a declared experiment, its tables and plots; STUDY=flowers SCALE=laptop DATA=<folder>
	$(BIN)/python -m studies run "$(STUDY)" --scale "$(SCALE)" --data "$(DATA)"; done=$$?; \
		$(BIN)/python -m studies table "$(STUDY)" --scale "$(SCALE)" --data "$(DATA)" && exit $$done

test: $(TEST_READY) ## the whole suite; SLOW=skip leaves out what takes over ten seconds; COVERAGE=90 asks for 90 % covered
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(if $(filter skip,$(SLOW)),-m "not slow") \
		$(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=$(COVERAGE))

$(SANITIZED): $(VENV)/.installed-test
	$(BIN)/python setup.py --quiet build_ext --sanitize --build-lib build/sanitized --build-temp build/sanitized

sanitize: $(SANITIZED) ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer; Linux and GCC
	SPARSE_OPS_CPU_LIBRARY=$(abspath $(SANITIZED)) $(BIN)/python -m pytest -n auto tests/ops/sanitizers.py

$(ARM): $(VENV)/.installed-test tests/ops/emulated.cpp
	@for tool in $(ARM_TOOLS); do command -v $$tool > /dev/null || { \
		echo "make arm needs $$tool; Debian: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 2; }; done
	CC=aarch64-linux-gnu-g++ CXX=aarch64-linux-gnu-g++ LDSHARED="aarch64-linux-gnu-g++ -shared" \
		LDCXXSHARED="aarch64-linux-gnu-g++ -shared" $(BIN)/python setup.py --quiet build_ext \
		--plat-name linux-aarch64 --build-lib build/arm --build-temp build/arm
	aarch64-linux-gnu-g++ -O1 -std=c++17 -Wall -Wextra tests/ops/emulated.cpp -o build/arm/emulated -ldl

arm: $(ARM) ## the C++ kernels on Arm, in QEMU, through the conformance cases; needs a cross compiler
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/ops/arm.py

$(VENV)/.installed-docs: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet $(PIP_ARGS)[docs]
	@touch $@

site: $(VENV)/.installed-docs ## the documents as a site, in build/site, with every link checked; no network is needed
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m pytest tests/site/built_site.py -k links

browser: site ## the report of runs and the site in a real browser, without a network; needs Chromium
	@for name in $(BROWSERS); do command -v $$name > /dev/null && exit 0; done; \
		echo "make browser needs Chromium; Debian: apt install chromium" >&2; exit 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/report/browser.py tests/site/built_site.py

lint: $(VENV)/.installed-test ## ruff, mypy, which package may import which, and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile

hooks: $(VENV)/.installed-test ## git runs before each commit what make lint runs, on the files that change
	$(BIN)/pre-commit install

fuzz: $(VENV)/.installed-test ## damaged checkpoints, images, recipes, masks, command lines for MINUTES; goes on where the last one ended
	$(BIN)/python tests/fuzz/fuzz_run.py --minutes $(MINUTES)

format: $(VENV)/.installed-test ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## speed and memory against dense masked, on this machine
	$(BIN)/python benchmarks/encoder.py --models atto pico tiny --batch-size 16 --json benchmarks/results/local.json

minkowski: $(VENV)/.installed-test ## build and install MinkowskiEngine; MINKOWSKI=--cuda for GPUs as well
	$(BIN)/python -m convnextv2 minkowski $(MINKOWSKI)
	@touch $(VENV)/.installed-minkowski

$(VENV)/.installed-release: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_ARGS)[release]
	@touch $@

dist: $(VENV)/.installed-release ## the sdist, and a wheel for this platform that is built from it, in dist/; both checked
	rm -rf dist
	$(BIN)/python -m build
	@if [ "$$(uname)" = Linux ]; then \
		PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist dist/*-linux_*.whl && rm dist/*-linux_*.whl; fi
	$(BIN)/twine check --strict dist/*

clean: ## remove what the demo and the build made; the environment stays
	rm -rf $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
