# Penstock's everyday commands; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TWINS  := $(wildcard shm/*.c shm/*/*.c broker/*/*.c frontend/*.c frontend/*.h)
# Whole files to each of two cores, in their order: what the tests of a file share is started once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ARGS   ?=

# Run over the sources and over the compiled build.
PATH_TESTS := tests/contract/test_transports.py benchmarks/guard/test_hot_path.py tests/frontend/upstream \
  $(addprefix tests/broker/,scheduler/test_inbox.py scheduler/test_subscriber.py test_lines.py test_counters.py test_port.py test_table.py test_zmtp.py) \
  tests/broker/test_candidates.py tests/broker/test_prefix.py tests/broker/policies/test_cache_aware.py tests/shm/test_seqlock.py $(addprefix tests/frontend/test_,\
  account.py admission.py body.py client.py conduit.py conduit_ends.py conduit_steps.py conformance.py flowing.py flowing_ends.py forward.py \
  forward_machine.py idle.py known_heads.py lean.py lending.py lifting.py outbox.py process.py sending.py)

.DEFAULT_GOAL := help
.PHONY: help install compiled run test check format bench bench-peers stress cluster-demo chaos e2e-vllm lock clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) compiled ## create .venv from the lock, and compile what is compiled

$(STAMP): requirements.lock pyproject.toml setup.py $(TWINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

compiled: $(STAMP) ## compile the request path, if the sources are not those of the last time; PENSTOCK_COMPILED=0: never
	@$(BIN)/python penstock_compiled.py

run: compiled ## start Penstock; ARGS="--port 30000 --config_path config.yaml", simulated engines when none is configured
	@exec $(BIN)/penstock serve --sim auto $(ARGS)

test: compiled ## the default test suite, on two cores; then what tests the request path, over its compiled build
	$(PYTEST) $(ARGS)
	$(if $(ARGS),,PYTHONMALLOC=debug $(PYTEST) -o "pythonpath=build/compiled ." $(PATH_TESTS))

check: $(STAMP) ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## benchmarks of the pieces and of the whole; table on screen, JSON in benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks -m '' --timeout=600 --benchmark-json=benchmarks/results/bench.json $(ARGS)

bench-peers: compiled ## Penstock beside other routers; ROUNDS=5 ONLY=.. SCENARIOS=.. MODES=pinned,free FD_ROUTER=path
	@ROUNDS="$(ROUNDS)" ONLY="$(ONLY)" SCENARIOS="$(SCENARIOS)" MODES="$(MODES)" FD_ROUTER="$(FD_ROUTER)" \
	  $(BIN)/python -m benchmarks.peers $(ARGS)

stress: $(STAMP) ## races and kills in real processes, each also with its protection switched off
	$(BIN)/python -m pytest -m stress --timeout=900 $(ARGS)

cluster-demo: $(STAMP) ## a Redis and three hosts under skewed load, and who helps whom; ends with Ctrl-C
	@exec $(BIN)/python -m tests.chaos.demo $(ARGS)

chaos: $(STAMP) ## kill -9 in a cluster of three hosts for ten minutes; SECONDS=600 SEED=.. ARGS=--freezes
	$(BIN)/python -m tests.chaos $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

e2e-vllm: $(STAMP) ## end to end with a real vLLM; VLLM_VENV names its virtual environment
	$(BIN)/python -m pytest -m e2e_vllm -rs --timeout=900 $(ARGS)

lock: ## resolve pyproject.toml anew into requirements.lock (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet -o requirements.lock

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/results benchmarks/peers/installed
	rm -f $(TWINS:.c=*.so)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
