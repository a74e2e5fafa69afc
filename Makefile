# Few verbs, each one line that calls the real tool. PYTHON chooses the interpreter that .venv is made from.
.PHONY: demo test test-long lint bench clean setup peers
BIN := .venv/bin
ALL := remote report fleet test

demo: peers; @scripts/setup && scripts/demo
test: peers; @scripts/setup $(ALL) && $(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term $(ARGS)
test-long: peers; @scripts/setup $(ALL) && HYPOTHESIS_PROFILE=long $(BIN)/pytest -n 2 --dist worksteal -m long $(ARGS)
lint:; @scripts/setup $(ALL) && $(BIN)/ruff check . && $(BIN)/mypy
bench: peers; @scripts/setup $(ALL) && $(BIN)/cowslice bench table $(ARGS) && $(BIN)/python bench/figures.py
clean:; rm -rf .venv build dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis

setup:; @scripts/setup $(ALL)
peers:; @scripts/peers
