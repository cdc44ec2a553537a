# Every target makes .venv first when it is missing; `make -B setup` makes it anew.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
MINUTES ?= 10

.PHONY: setup demo test lint fuzz mutants bench docs

setup: $(STAMP)

# `sh` picks pip, whose index and cache settings people already have; torch is pinned before the rest so that
# no dependency pulls another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/eplb demo

# Two workers suit machines with two cores and more: many tests start processes of their own.
test: $(STAMP)
	$(RUN) -m pytest -n 2 tests eplb_core eplb_torch
	$(RUN) -m pytest -n 2 --jaxtyping-packages=eplb_core,beartype.beartype property_tests

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)

fuzz: $(STAMP)
	$(RUN) -m property_tests.fuzz --minutes $(MINUTES)

# How many mutants of the planning modules the tests kill; about an hour.
mutants: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt mutmut
	$(RUN) .ci/mutants

bench: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(RUN) -m benchmarks

docs: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict --config-file .ci/mkdocs.yml
	@echo "Open build/site/index.html"
