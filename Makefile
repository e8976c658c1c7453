# The two commands of the README, each with all of its set-up, and what they are made of.
PYTHON ?= python3
BIN := .venv/bin
# Small matrices on few cores: threads cost more than they give.
export OMP_NUM_THREADS ?= 1

# One for each of CI's two cores, as the start of a third one takes more than it gives; WORKERS=8
# where there are more cores.
WORKERS ?= 2

# What keeps glibc from handing memory back to the system between two forwards.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000

.PHONY: demo test lint suite docs benchmarks gpu results results-check clean

demo: .venv/installed  ## train and compare on real digits, write runs/demo/report.html
	$(BIN)/fogzo compare digits-mlp --output-dir runs/demo

test: lint suite results-check docs  ## everything CI checks

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)

# With bytecode kept, as it starts some hundred interpreters.
suite: .venv/installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: .venv/installed  ## build the documentation in site/, an error on any broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmarks: .venv/installed  ## measure again what is said of cost, 20 minutes on an idle machine
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/fogzo bench --suite full --only steps memory layers compiled probes scaling \
		--output-dir benchmarks/full
	$(BIN)/fogzo bench --suite full --only export --output-dir benchmarks/export
	OMP_NUM_THREADS=2 $(BIN)/fogzo bench --suite full --only steps --threads 2 \
		--output-dir benchmarks/two-threads
	$(KEEP_MEMORY) $(BIN)/fogzo bench --suite full --only steps --output-dir benchmarks/kept-memory
	$(BIN)/python experiments/tables.py

gpu:  ## on a machine with a GPU, by its own Python and torch: tests, costs, two networks at full width
	$(PYTHON) experiments/gpu.py --resume

results: .venv/installed  ## rewrite the tables of docs/ and the reports from the committed JSON
	$(BIN)/python experiments/tables.py

results-check: .venv/installed  ## rebuild the tables of docs/ from the committed JSON, fail if they differ
	$(BIN)/python experiments/tables.py --check

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs site
