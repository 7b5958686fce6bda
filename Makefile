# SPDX-License-Identifier: MIT
# A thin front of CMake; the kinds of build are in CMakePresets.json.
export JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
# Where downloads and llama.cpp are kept; the scripts read it too.
export TQ_DEPS_DIR := $(abspath $(or $(TQ_DEPS_DIR),build/deps))
PYTHON := $(TQ_DEPS_DIR)/venv/bin/python

.PHONY: all
all:  ## the library, tq, and (when llama.cpp's sources are there) the plug-in, in build/release
	@scripts/setup.sh --check build
	@cmake --preset release --log-level=WARNING -DTQ_GGML_DIR=$(TQ_DEPS_DIR)/llama.cpp/ggml
	cmake --build --preset release -j $(JOBS) --target product

.PHONY: check
check:  ## format, layers, symbols, units, kernels: under a minute, no model, no network; ROOM=cache tests one room only
	@scripts/setup.sh --check build
	python3 tests/run_all.py check $(if $(ROOM),--room $(ROOM))

.PHONY: run
run:  ## the answer of a real model with and without the plug-in, and a table of memory, speed and quality
	@scripts/setup.sh run
	@scripts/get_llama.sh --sources
	@$(MAKE) --no-print-directory all
	@scripts/get_llama.sh llama-completion
	@scripts/get_model.sh
	@$(PYTHON) scripts/get_text.py
	@$(PYTHON) scripts/report.py --only answers
	@scripts/get_llama.sh llama-completion llama-bench llama-perplexity
	@$(PYTHON) scripts/report.py --only table --csv build/report.csv --plot build/report.svg

.PHONY: test
test: test-deps  ## all of check, a sanitizer, each instruction set, small models and the real one: 10 minutes once set up
	$(PYTHON) tests/run_all.py test

.PHONY: test-full
test-full: test-deps  ## what `make test` leaves out: 1.5 hours, 12 GB for PyTorch, vLLM; SHARD=1/9: a ninth (docs/testing.md)
	$(PYTHON) tests/run_all.py full $(if $(SHARD),--shard $(SHARD))

.PHONY: test-deps
test-deps: deps
	@scripts/get_llama.sh --bindings
	@scripts/setup.sh test

.PHONY: bench
bench: deps all  ## speed: kernels, attention next to ggml's, then llama-bench at depths 0 to 8192; an hour
	cmake --build --preset release -j $(JOBS) --target checkkern
	build/release/tests/checkkern --bench --csv >build/bench-kernels.csv
	$(PYTHON) bench/attention.py --csv build/bench-attention.csv --plot build/bench-attention.svg
	$(PYTHON) bench/speed.py --llama-bin $(TQ_DEPS_DIR)/llama-bin --plugin build/release/libggml-turboquant.so \
	  --model $(TQ_DEPS_DIR)/models/SmolLM2-135M-Instruct.Q4_1.gguf --once q8_0,q4_0 --csv build/bench.csv

.PHONY: evidence
evidence: deps all  ## real models and texts: divergence against bits of presets and llama.cpp's types; hours, QUICK=1 minutes
	@$(PYTHON) scripts/get_qwen.py
	$(PYTHON) bench/evidence.py $(if $(QUICK),--quick)

.PHONY: release
release:  ## wheels, source distribution and tarball in dist/, for glibc 2.28; CUDA=release: also the wheel libturboquant-cuda
	@scripts/setup.sh run release
	@scripts/get_llama.sh --sources
	$(TQ_DEPS_DIR)/release-venv/bin/python scripts/release.py $(if $(CUDA),--cuda "$(CUDA)")

.PHONY: release-test
release-test:  ## what `make release` has made, in clean environments, under qemu and in a bare root; 3 minutes
	@scripts/setup.sh cross
	@$(MAKE) --no-print-directory test-deps
	$(PYTHON) tests/release/test_release.py

.PHONY: format
format:  ## clang-format of all C files
	python3 scripts/check_style.py --fix

.PHONY: install
install: all  ## to PREFIX (/usr/local)
	cmake --install build/release --prefix $(PREFIX)

.PHONY: clean
clean:  ## delete the builds; keep build/deps and the cache of downloads and llama.cpp (docs/dependencies.md)
	rm -rf build/release build/asan build/asan-simd build/tsan build/fuzz build/aarch64 build/wheel build/python-clean \
	  build/metal build/release-artefacts

.PHONY: deps
deps:  ## packages, an unpatched llama.cpp, the model and the texts: links in build/deps
	@scripts/setup.sh run
	@scripts/get_llama.sh
	@scripts/get_model.sh
	@$(PYTHON) scripts/get_text.py

.PHONY: help
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1	/p' $(MAKEFILE_LIST) | expand -t 10
