# make demo    install, train a small SCHNet on drawn people, score it, parse a few figures: pictures under runs/demo/
# make test    install, the whole test suite
# make test-oldest  the same with the oldest versions that requirements.txt allows, in .venv-oldest
# make test-gpu  a GPU beside the CPU: three minutes on one card, nothing downloaded (without a GPU: skipped)
# make lint    ruff over the code
# make clean   remove the demo's run and what Python left behind (.venv, weights and other runs stay)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# two processes of one thread, each with whole files: twice as fast on two cores as one process of two threads
PYTEST := -m pytest -q -n 2 --dist loadfile

.PHONY: help demo test test-oldest test-gpu lint clean
help:
	@sed -n 's/^# //p' Makefile

$(VENV)/run: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.12, say"; exit 1; }
	@echo "installing what SCHNet needs into $(VENV) ..."
	@# a venv that has no working pip, as an interrupted make leaves it, is completed; if that fails, made anew
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --requirement requirements.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	@echo "installing what the tests compare with into $(VENV) ..."
	@$(PIP) --requirement requirements-dev.txt
	@touch $@

demo: $(VENV)/run
	@rm -rf runs/demo
	@# two processes on the CPU, also where there is one GPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 train.py
	$(BIN)/python -m synthetic.draw --out runs/demo/figures --count 6
	$(BIN)/python predict.py --run runs/demo --out runs/demo/parsed runs/demo/figures
	$(BIN)/python evaluate.py --run runs/demo
	$(BIN)/python evaluate.py --run runs/demo --tta
	@echo "pictures: runs/demo/curves.png runs/demo/validation.png runs/demo/parsed/ runs/demo/evaluation_tta/"
	@echo "next:     . $(BIN)/activate; python predict.py photo.jpg; your own data: configs/custom.yaml"

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-oldest:
	@echo "installing the lower bounds of requirements.txt into $(VENV)-oldest ..."
	@$(PYTHON) -m venv $(VENV)-oldest
	@sed -n "s/ *\#.*//; s/>=\(.*\)/==\1.*/p; s/^opencv-python==/opencv-python-headless==/p" requirements.txt > $(VENV)-oldest/oldest.txt
	@$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement requirements-dev.txt --constraint $(VENV)-oldest/oldest.txt
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python $(PYTEST)

test-gpu: export SCHNET_TEST_DEVICE ?= cuda
test-gpu: $(VENV)/dev
	$(BIN)/python -m pytest -q -rPs tests/gpu

lint: $(VENV)/dev
	$(BIN)/ruff check .

clean:
	rm -rf runs/demo .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
