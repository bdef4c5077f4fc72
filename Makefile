# make serve        sets up and serves             make test        sets up and passes the tests
# make lint         ruff and mypy                  make format      puts the code into shape
# make bench        beside other servers (40 min)  make soak        overload, slow clients, restarts (10 min)
# make quick        a verdict in a minute           make mutants     changes of the sources that no test notices (an hour)
# make fuzz         changed files and requests, ten minutes; make fuzz SECONDS=60
# make lock         writes the image's lock files anew, with the latest packages that the requirements allow
# make serve-ray    the same service on Ray Serve  make test-ray    the contract's tests, on a cluster

PYTHON ?= python3
BIN := .venv/bin
# axe-core looks for what keeps people with a screen reader out; without npm its test is skipped.
AXE := $(if $(shell command -v npm),build/node_modules/axe-core/axe.min.js)

# Two processes share the files out, in the order of tests/conftest.py.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: serve test quick mutants fuzz lint format bench soak lock serve-ray test-ray test-ray-laptop clean

serve: .venv/serve
	$(BIN)/python run_keras_server.py $(ARGS)

test: .venv/dev .venv-clients/done $(AXE)
	$(BIN)/python -m pytest $(SHARED) $(ARGS)

# Without what starts processes and browsers, or has Keras convert: docs/testing.md says what is left out.
quick: .venv/dev
	$(BIN)/python -m pytest $(SHARED) -n 3 -m "not slow and not ray" $(ARGS)

# Which tests concern which sources: pyproject.toml. The last table: docs/testing.md.
mutants: .venv/dev .venv-mutants/done
	nice .venv-mutants/bin/python tools/mutants.py $(ARGS)

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

# For the image's Python, whichever this one is. --upgrade: else the versions of the files that are there would stay.
LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-lock/bin/uv pip compile --quiet --upgrade --generate-hashes \
	--python-version 3.12 --python-platform linux

lock: .venv-lock/done
	$(LOCK) --output-file requirements.lock requirements.txt
	$(LOCK) --constraint requirements.lock --output-file requirements-serve.lock requirements-serve.txt

serve-ray: .venv-ray/done build/bundled
	.venv-ray/bin/python -m keras_server.ray_app --model build/bundled $(ARGS)

# The other tests' conftest.py needs more than is installed beside Ray; the contract's tests run in the environment of theirs.
test-ray-laptop: .venv-ray/done .venv/dev .venv-clients/done build/bundled
	.venv-ray/bin/python -m pytest -m ray --noconftest tests/ray/test_laptop.py $(ARGS)

test-ray: test-ray-laptop
	.venv-ray/bin/python -m pytest -m ray --noconftest tests/ray/test_cluster.py $(ARGS)
	RAY_SERVE_ENABLE_HA_PROXY=0 .venv-ray/bin/python -m pytest -m ray --noconftest tests/ray/test_cluster.py $(ARGS)

# A stamp is newer than its requirements once they are installed.
.venv/serve: requirements.txt requirements-serve.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements-int8.txt requirements-resize.txt .venv/serve
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

.venv-mutants/done: tools/requirements-mutants.txt
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --quiet -r $<
	touch $@

.venv-ray/done: tests/requirements-ray.txt requirements-ray.txt requirements-serve.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet -r $<
	touch $@

.venv-lock/done:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "uv>=0.9,<1"
	touch $@

# Replicas need no TensorFlow: what they serve is written here.
build/bundled: .venv/serve $(wildcard keras_server/models/*.py keras_server/explain/*.py)
	rm -rf $@
	$(BIN)/python run_keras_server.py export bundled $@

clean:
	rm -rf .venv .venv-* build benchmarks/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
