# make demo   set up, then the whole story on real text (about nine minutes on two cores)
# make test   set up, then the tests
# make check  set up, then ruff format, ruff, mypy and a strict build of the documentation
# make docs   set up, then the documentation in site/
# make test-vllm  vLLM in an environment of its own (3 GB, minutes), then the tests that need it

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup test test-vllm demo check docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[test,docs]'
	touch $@

# Tests and the demo start Python many times: it keeps what it has compiled, also where the shell
# forbids that
test: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal

# vLLM brings three packages that do not fit the torch it runs on, and needs none of them
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --progress-bar off -c constraints-vllm.txt \
	    -e '.[vllm,serve]' pytest hypothesis httpx
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/flexolmo_vllm

demo: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/flexolmo demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-vllm runs build dist site
