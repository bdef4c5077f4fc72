# make serve        sets up and serves             make test        sets up and passes the tests
# make lint         ruff and mypy                  make format      puts the code into shape
# make bench        beside other servers (25 min)  make soak        overload, slow clients, restarts (10 min)
# make fuzz         changed files and requests, ten minutes; make fuzz SECONDS=60
# make serve-ray    the same service on Ray Serve  make test-ray    the contract's tests, on a cluster

PYTHON ?= python3
BIN := .venv/bin
# axe-core looks for what keeps people with a screen reader out; without npm its test is skipped.
AXE := $(if $(shell command -v npm),build/node_modules/axe-core/axe.min.js)

.PHONY: serve test fuzz lint format bench soak serve-ray test-ray clean

serve: .venv/serve
	$(BIN)/python run_keras_server.py $(ARGS)

test: .venv/dev .venv-clients/done $(AXE)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# What fails is kept in tests/data/fuzz, where a test finds it from then on.
fuzz: .venv/dev
	$(BIN)/python -W ignore tests/fuzzing.py --seconds $(or $(SECONDS),600) $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict run_keras_server.py simple_request.py keras_server
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/serve .venv-bench/done
	$(BIN)/python benchmarks/bench.py $(ARGS)

soak: .venv/serve
	$(BIN)/python benchmarks/soak.py $(ARGS)

serve-ray: .venv-ray/done
	.venv-ray/bin/python -m keras_server.ray_app $(ARGS)

test-ray: .venv-ray/done
	.venv-ray/bin/python -m pytest -m ray tests/ray $(ARGS)
	RAY_SERVE_ENABLE_HA_PROXY=0 .venv-ray/bin/python -m pytest -m ray tests/ray/test_cluster.py $(ARGS)

# A stamp is newer than its requirements once they are installed.
.venv/serve: requirements.txt requirements-serve.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements-int8.txt .venv/serve
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# Clients that others wrote hold back packages that the server is tested with. Nearly all the time would go into compiling them.
.venv-clients/done: tests/requirements-clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --no-compile -r $<
	touch $@

build/node_modules/axe-core/axe.min.js:
	npm install --silent --no-save --no-fund --no-audit --prefix build axe-core@4

.venv-bench/done: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -r $<
	touch $@

.venv-ray/done: requirements-ray.txt requirements.txt requirements-serve.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet -r requirements-ray.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-* build benchmarks/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
