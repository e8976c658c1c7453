# The two commands of the README, each with all of its set-up, and what they are made of.
PYTHON ?= python3
BIN := .venv/bin
# Small matrices on few cores: threads cost more than they give.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint suite benchmarks results results-check clean

demo: .venv/installed  ## train and compare on real digits, write runs/demo/report.html
	$(BIN)/fogzo compare digits-mlp --output-dir runs/demo

test: lint suite results-check  ## everything CI checks

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

suite: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

benchmarks: .venv/installed  ## measure again what the README says of cost
	$(BIN)/python benchmarks/step_cost.py --output benchmarks/step_cost.json
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/step_cost.py --threads 2 \
		--output benchmarks/step_cost_2_threads.json
	$(BIN)/python benchmarks/many_probes.py

results: .venv/installed  ## rewrite the README's tables and the reports from the committed JSON
	$(BIN)/python experiments/tables.py

results-check: .venv/installed  ## rebuild the README's tables from the committed JSON, fail if they differ
	$(BIN)/python experiments/tables.py --check

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
