# Each target makes .venv when it is missing and installs what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,data,export,diffusers,onnx,notebooks,ray,dev

.PHONY: demo test lint install clean help

help:
	@echo "make demo   draw scenes, make masks, train, evaluate, export; writes runs/demo/report.html"
	@echo "make test   run the tests (CPU, offline)"
	@echo "make lint   ruff, format check and mypy --strict"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: install
	$(BIN)/alpha-clip demo

# pytest-xdist splits the suite over the cores; torch then gets one thread a worker.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
