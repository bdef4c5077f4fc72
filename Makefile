# make serve   sets up and serves          make test    sets up and passes the tests
# make lint    ruff and mypy               make bench   measures against other servers (half an hour)

PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test lint format bench clean

serve: .venv/serve
	$(BIN)/python run_keras_server.py $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is newer than its requirements once they are installed.
.venv/serve: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/serve
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
