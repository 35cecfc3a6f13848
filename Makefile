# make demo    from nothing to a trained Mixture-of-Recursions with samples, a loss curve and a page of text by depth
# make test    all tests but the soak tests        make lint    ruff        make soak    the long ones
# make gpu     on a machine with a GPU: checks and measures it in about ten minutes, and writes gpu.json to send in
# make clean   remove what was made, data and runs included, and keep .venv
#
# PYTHON=python3.12 make ... chooses the interpreter that .venv is made with; JOBS=1 make test runs one test at a time.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: demo test lint soak gpu clean

demo: .venv/run.stamp data/python/meta.json
	$(BIN)/python train.py --data data/python --out out/demo --optimizer muon --steps 600 --cooldown 0.4 --eval-every 600
	$(BIN)/python sample.py out/demo "The module" --max-new-tokens 200 --html out/demo/page.html
	@echo "made out/demo: page.html, loss.png, metrics.jsonl and the checkpoint; next: $(BIN)/python sample.py out/demo"

data/python/meta.json: | .venv/run.stamp
	$(BIN)/python prepare.py python --out data/python --val-fraction 0.03

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

lint: .venv/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check

soak: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak

gpu: .venv/dev.stamp
	$(BIN)/python bench.py gpu --json gpu.json

clean:
	rm -rf data out build *.egg-info .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__

.venv/run.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable .
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/pip install --quiet --editable ".[dev,eval]"
	touch $@
