# `make demo` and `make test` are all that a fresh machine needs: both make .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo demo-runs test transformers-suite lint install clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# torch and torchvision are named together, so that pip picks builds that fit each other.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch torchvision -e ".[dev]"
	touch $@

# --- demo: every run is a folder of demo/, done when its results.json is there; a killed demo goes on ---

# Small matrices are fastest on one thread each; the fine-tuning runs go two at a time.
demo: export OMP_NUM_THREADS = 1
demo: install demo/pretraining/results.json
	@$(MAKE) --no-print-directory -j 2 demo-runs
	$(RUN) -m uc2.demo_report demo

RETRIEVAL_RUNS := retrieval-untrained retrieval-zero-shot retrieval-en retrieval-de retrieval
VQA_RUNS := vqa-en-untrained vqa-en vqa-ja
demo-runs: $(patsubst %,demo/%/results.json,$(RETRIEVAL_RUNS) $(VQA_RUNS))

demo/corpus/corpus.json:
	$(RUN) prepare_corpus.py scenes --output_dir demo/corpus --num_train 2500 --num_val 150 --num_test 150

demo/pretraining/results.json: demo/corpus/corpus.json
	$(RUN) run_pretraining.py configs/pretrain_demo.yaml

# The same network without any pre-training, for comparison: one step at learning rate 0.
demo/untrained/results.json: demo/corpus/corpus.json
	$(call quietly,run_pretraining.py configs/pretrain_demo.yaml --ea_steps 0 --max_steps 1 --learning_rate 0 \
		--eval_strategy no --eval_passes 1 --retrieval_images 0 --output_dir demo/untrained)

# Progress goes to a log file: two runs at a time would garble each other's bars.
quietly = @echo "$(patsubst %/,%,$(dir $@)) …"; mkdir -p demo/logs; \
	$(RUN) $(1) > demo/logs/$(notdir $(patsubst %/,%,$(dir $@))).log 2>&1 || \
	{ tail -n 20 demo/logs/$(notdir $(patsubst %/,%,$(dir $@))).log; exit 1; }
RETRIEVAL = $(call quietly,run_retrieval.py configs/retrieval_demo.yaml --output_dir $(@D) $(1))
VQA = $(call quietly,run_vqa.py configs/vqa_demo_en.yaml --output_dir $(@D) $(1))

demo/retrieval-untrained/results.json: demo/untrained/results.json
	$(call RETRIEVAL,--model demo/untrained --train_languages en)
demo/retrieval-zero-shot/results.json: demo/pretraining/results.json
	$(call quietly,run_retrieval.py --model demo/pretraining --region_store demo/corpus/regions/test \
		--eval_files scenes=demo/corpus/captions_test.jsonl --eval_languages en de fr cs ja zh --output_dir $(@D))
demo/retrieval-en/results.json: demo/pretraining/results.json
	$(call RETRIEVAL,--train_languages en)
demo/retrieval-de/results.json: demo/pretraining/results.json
	$(call RETRIEVAL,--train_languages de)
demo/retrieval/results.json: demo/pretraining/results.json
	$(call RETRIEVAL)
demo/vqa-en-untrained/results.json: demo/untrained/results.json
	$(call VQA,--model demo/untrained)
demo/vqa-en/results.json: demo/pretraining/results.json
	$(call VQA)
demo/vqa-ja/results.json: demo/pretraining/results.json
	$(call VQA,--languages ja --eval_languages ja)

# --- checks ---

test: install
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

# transformers' own shared suites, which only its source release has (tests/test_transformers_suite.py).
SUITE := $(VENV)/transformers-source
transformers-suite: install
	$(RUN) -m pip install --quiet parameterized
	$(RUN) -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest $(SUITE) \
		transformers==$$($(RUN) -c "import transformers; print(transformers.__version__)")
	tar -xzf $(SUITE)/transformers-*.tar.gz -C $(SUITE) --strip-components 1
	UC2_TRANSFORMERS_TESTS=$(SUITE)/tests OMP_NUM_THREADS=1 $(RUN) -m pytest -o addopts= -q -n auto -W ignore \
		tests/test_transformers_suite.py

lint: install
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) demo build *.egg-info
