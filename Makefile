# make demo         install, train a small SCHNet on drawn people, score it, parse six drawings; results in runs/demo/
# make test         install, run the test suite
# make test-oldest  the test suite with the oldest versions that requirements.txt allows, in .venv-oldest
# make test-gpu     compare the GPU with the CPU: three minutes, no weights (skipped without a GPU)
# make lint         run ruff
# make clean        remove the demo's run and Python's caches; keep .venv, weights and other runs

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# pip would compile all of torch, half of the installation; Python compiles what is imported, if it may write the result
export PYTHONDONTWRITEBYTECODE :=
INSTALL := -m pip install --no-compile --quiet --disable-pip-version-check
PIP    := $(BIN)/python $(INSTALL) --constraint constraints.txt
# two processes of one thread: faster than one of two threads or three; a test file is never split between them
PYTEST := -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
# the demo as well, on the CPU even if there is a GPU
DEMO   := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2

.PHONY: help demo test test-oldest test-gpu lint clean
help:
	@sed -n 's/^# //p' Makefile

$(VENV)/run: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "$(PYTHON) is older than Python 3.11: try make PYTHON=python3.12"; exit 1; }
	@echo "installing the requirements into $(VENV) ..."
	@# an interrupted make can leave a venv without pip: complete it or, if that fails, create it again
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --requirement requirements.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	@echo "installing the tests' requirements into $(VENV) ..."
	@$(PIP) --requirement requirements-dev.txt
	@touch $@

demo: $(VENV)/run
	@rm -rf runs/demo runs/drawings
	$(DEMO) train.py
	$(BIN)/python -m synthetic.draw --out runs/drawings --count 6
	$(BIN)/python predict.py --run runs/demo --out runs/demo/parsed runs/drawings
	$(DEMO) evaluate.py --checkpoint runs/demo --tta
	@echo "Done: a small SCHNet, trained on drawn people and scored on others, above with test-time augmentation."
	@echo "Its encoders are small, randomly initialised and trained with the rest; they are not SAM and CLIP."
	@echo "Look at runs/demo/: curves.png, validation.png, parsed/overlays/, evaluation_tta/. Next: docs/data.md"

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-oldest:
	@echo "installing the lower bounds of requirements.txt into $(VENV)-oldest ..."
	@$(PYTHON) -m venv $(VENV)-oldest
	@sed -n "s/ *\#.*//; s/>=\(.*\)/==\1.*/p; s/^opencv-python==/opencv-python-headless==/p" requirements.txt > $(VENV)-oldest/oldest.txt
	@$(VENV)-oldest/bin/python $(INSTALL) --requirement requirements-dev.txt --constraint $(VENV)-oldest/oldest.txt
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python $(PYTEST)

test-gpu: export SCHNET_TEST_DEVICE ?= cuda
test-gpu: $(VENV)/dev
	$(BIN)/python -m pytest -q -rPs tests/gpu

lint: $(VENV)/dev
	$(BIN)/ruff check .

clean:
	rm -rf runs/demo runs/drawings .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
