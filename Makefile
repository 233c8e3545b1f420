# `make demo` and `make test` are all that a fresh machine needs: both make .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint install clean

install: $(VENV)/.installed

# torch and torchvision are named together, so that pip picks builds that fit each other.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch torchvision -e ".[dev]"
	touch $@

demo: install
	$(RUN) prepare_corpus.py scenes --output_dir demo/corpus
	$(RUN) run_pretraining.py configs/pretrain_demo.yaml

test: install
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

lint: install
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) demo build *.egg-info
