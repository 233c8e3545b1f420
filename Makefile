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

# Small matrices are fastest on one thread; the other core prepares the batches.
demo: export OMP_NUM_THREADS = 1
demo: install demo/pretraining/results.json demo/finetuned
	$(RUN) -m uc2.demo_report demo

demo/corpus/corpus.json:
	$(RUN) prepare_corpus.py scenes --output_dir demo/corpus --num_train 2500 --num_val 150 --num_test 150

demo/pretraining/results.json: demo/corpus/corpus.json
	$(RUN) run_pretraining.py configs/pretrain_demo.yaml

# Retrieval and VQA, and the same from a model that was never pre-trained, for comparison.
RETRIEVAL := $(RUN) run_retrieval.py configs/retrieval_demo.yaml
VQA := $(RUN) run_vqa.py configs/vqa_demo_en.yaml
demo/finetuned:
	$(RUN) run_pretraining.py configs/pretrain_demo.yaml --ea_steps 0 --max_steps 1 --learning_rate 0 \
		--eval_strategy no --retrieval_images 0 --output_dir demo/untrained
	$(RETRIEVAL) --model demo/untrained --train_languages en --output_dir demo/retrieval-untrained
	$(RUN) run_retrieval.py --model demo/pretraining --region_store demo/corpus/regions \
		--eval_files scenes=demo/corpus/captions_test.jsonl --eval_languages en de fr cs ja zh \
		--output_dir demo/retrieval-zero-shot
	$(RETRIEVAL) --train_languages en --output_dir demo/retrieval-en
	$(RETRIEVAL) --train_languages de --output_dir demo/retrieval-de
	$(RETRIEVAL)
	$(VQA) --model demo/untrained --output_dir demo/vqa-en-untrained
	$(VQA)
	$(VQA) --languages ja --eval_languages ja --output_dir demo/vqa-ja
	touch $@

test: install
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

lint: install
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) demo build *.egg-info
