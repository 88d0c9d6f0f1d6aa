# Everything runs in .venv, which `make setup` creates once and refreshes when pyproject.toml or this file changes.
# TORCH is pinned in the same pip command as everything else, so that no dependency can replace it with another build.
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
LEROBOT := lerobot[pi]==0.6.1
PEER_PYTHON ?= $(shell if python3.12 -c '' >/dev/null 2>&1; then echo python3.12; fi)
BIN := .venv/bin
STAMP := .venv/.setup-done
SIMULATORS := .venv/.simulators-done
# What MuJoCo draws with where there is no GPU, as Debian and Ubuntu call it.
RENDERING := libegl1 libgl1 libgles2 libegl-mesa0 libgl1-mesa-dri libosmesa6 libglib2.0-0

.PHONY: setup demo test lint docs simulators rendering bench-gpu bench-cpu speed-page clean

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@test -x $(BIN)/pip || test -n "$(PYTHON)" || { echo "tokenprune needs Python 3.11 or newer, and none is on PATH." \
		"Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "creating .venv with $(PYTHON)"; "$(PYTHON)" -m venv .venv; }
	@echo "installing $(TORCH), tokenprune and its tools into .venv (a minute or more the first time)"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check "$(TORCH)" -e ".[dev,docs]"
	@touch $@

demo: setup
	$(BIN)/tokenprune compare dense random uniform_grid fastv specprune.static specprune.dynamic \
		specprune.controller specprune --backbone openvla-oft --preset mini

test: lint docs rendering
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# What the tests of the closed loop need besides: LIBERO with its assets, and Ray.
simulators: $(SIMULATORS)

$(SIMULATORS): $(STAMP)
	@echo "installing LIBERO and Ray into .venv (a minute or more the first time, 2.5 GB)"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check "$(TORCH)" -e ".[libero,ray]"
	@touch $@

rendering: simulators
	@MUJOCO_GL=egl $(BIN)/python -c "import mujoco; \
		mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).close()" >/dev/null 2>&1 || { \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		echo "installing what MuJoCo draws with: $(RENDERING)"; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $(RENDERING) >/dev/null; \
	else \
		echo "MuJoCo cannot draw here; install its libraries, on Debian and Ubuntu as root:" \
			"apt-get install -y --no-install-recommends $(RENDERING)" >&2; exit 1; \
	fi; }

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/lint_hot.py

# Laid out for less than 8 minutes on one GPU: the whole table at the releases' dimensions, compiled layers inside the
# graph, a long run, pi0 with three cameras, then the tests marked `cuda`, graph against eager among them. Weights are
# random, so no checkpoint is needed; they and the rest take 20 GB of the GPU's memory. No prerequisites: without a GPU it
# ends before anything is installed.
STAGES := specprune specprune.static specprune.dynamic specprune.controller
ON_GPU := --device cuda --dtype bfloat16 --pairs 10 --warmup 3
bench-gpu:
	@test -e /dev/nvidiactl || test -e /dev/dxg || nvidia-smi -L >/dev/null 2>&1 || { \
		echo "make bench-gpu needs a CUDA device, and there is none here" >&2; exit 2; }
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit( \
		f'make bench-gpu needs a CUDA device, and torch {torch.__version__} sees none')"
	$(BIN)/tokenprune bench $(STAGES) $(foreach keep,0.5 0.25 0.125,uniform_grid@keep=$(keep) fastv@keep=$(keep)) \
		--backbone openvla-oft --preset 7b --backbone openvla --preset 7b \
		--backbone pi0 --preset base --backbone pi05 --preset base $(ON_GPU) --mode eager --mode cuda_graph \
		--reference upstream --out docs/evidence/bench-gpu.json --chart docs/assets/bench-gpu.png
	$(BIN)/tokenprune bench specprune --backbone openvla-oft --preset 7b $(ON_GPU) --mode compile \
		--mode compiled_cuda_graph --out docs/evidence/bench-gpu-compiled.json
	$(BIN)/tokenprune bench specprune --backbone pi0 --preset base --option 'views=[primary,wrist,side]' \
		--episode examples/three_cameras.npz $(ON_GPU) --mode cuda_graph \
		--out docs/evidence/bench-gpu-three-cameras.json
	$(BIN)/python tools/long_run.py --preset small --queries 2000 --stretch 500 --device cuda --execution cuda_graph \
		--out docs/evidence/long-run-gpu.json
	$(MAKE) speed-page
	$(BIN)/python -m pytest -m cuda

# A quarter of an hour on two cores with bfloat16 instructions and nothing else to do; 20 GB of memory.
bench-cpu: setup
	OMP_NUM_THREADS=2 $(BIN)/tokenprune bench specprune specprune.static uniform_grid@keep=0.25 fastv@keep=0.25 \
		--backbone openvla-oft --preset 7b --dtype bfloat16 --pairs 3 --warmup 1 --queries 3 --reference upstream \
		--out docs/evidence/bench-cpu-7b.json --chart docs/assets/bench-cpu-7b.png
	$(MAKE) speed-page

# Brings the page up to the result files.
speed-page: setup
	$(BIN)/python tools/speed_page.py docs/speed.md

# Never add --quiet: mkdocs then lets broken links pass even with --strict.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Compares with lerobot, which wants Python 3.12 and an older transformers, and so an environment of its own.
.PHONY: peer
peer: .venv-peer/.setup-done
	.venv-peer/bin/python -m pytest -m peer tests/peer

.venv-peer/.setup-done: pyproject.toml
	@test -x .venv-peer/bin/pip || test -n "$(PEER_PYTHON)" || { echo "make peer needs Python 3.12, and none is on PATH." \
		"Install it, or name it: make peer PEER_PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x .venv-peer/bin/pip || "$(PEER_PYTHON)" -m venv .venv-peer
	@echo "installing torch, $(LEROBOT) and tokenprune into .venv-peer (5 GB the first time)"
	@.venv-peer/bin/python -m pip install -qq --no-compile --disable-pip-version-check "$(LEROBOT)" hypothesis pytest -e .
	@touch $@

clean:
	rm -rf .venv .venv-peer site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
