# make demo   set up, then the whole story on real text (about a quarter of an hour on two cores)
# make test   set up, then the tests
# make check  set up, then ruff format, ruff and mypy

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup test demo check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[test,docs]'
	touch $@

test: setup
	$(BIN)/pytest -n 2

demo: setup
	$(BIN)/flexolmo demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist
