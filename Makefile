# Every target makes what it needs in .venv and repeats only what pyproject.toml changes.
#   make demo         train with and without clipping, print the table, draw the picture
#   make test         the test suite, doctests included
#   make quick        laws 1 to 4, 6 and 8 for one row of each kind of block
#   make lint         ruff and pyright
#   make test-oldest  the test suite on the oldest supported releases
#   make test-newest  the test suite on the newest Python and the newest releases found
#   make bench        time optclip against its peers; BENCH=--quick for a small model
#   make docs         build the site into docs/_build/html; warnings are errors
#   make docs-serve   build it and show it on http://localhost:8000
#   make docs-check   build it and look at it with headless Chromium
#   make clean        remove everything that these targets made

PYTHON ?= python3
# A file stays with one worker, which compiles each function once.
WORKERS ?= auto
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
NEWEST_PYTHON ?= $(or $(shell for p in python3.13 python3.12; do $$p -c '' 2>/dev/null && echo $$p && break; done),$(PYTHON))

DOCS := .venv-docs
SITE := docs/_build/html

.PHONY: demo test quick lint test-oldest test-newest bench docs docs-serve docs-check clean

demo: $(VENV)/examples.stamp
	$(VENV)/bin/python examples/regression.py

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

quick: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest --quick -n $(WORKERS) --dist loadfile tests/laws

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

test-oldest: $(OLDEST)/test.stamp
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile

# Installs at every run, for no stamp knows of a new release.
test-newest: | $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile

bench: $(VENV)/bench.stamp
	$(VENV)/bin/python -m benchmarks $(BENCH)

docs: $(DOCS)/docs.stamp
	$(DOCS)/bin/python -m sphinx -q -j 2 -W --keep-going -b html docs $(SITE)

docs-serve: docs
	$(DOCS)/bin/python -m http.server 8000 --bind localhost --directory $(SITE)

docs-check: docs $(DOCS)/docs-check.stamp
	$(DOCS)/bin/python docs/check.py $(SITE) docs/_build/pictures

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(DOCS) build dist examples/output docs/_build docs/_generated docs/api docs/gallery .hypothesis .pytest_cache .ruff_cache
	find optclip tests examples benchmarks docs -type d -name __pycache__ -exec rm -rf {} +

$(VENV)/bin/python $(OLDEST)/bin/python $(DOCS)/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)

$(NEWEST)/bin/python:
	$(NEWEST_PYTHON) -m venv $(@:/bin/python=)

# One stamp for each extra of pyproject.toml.
$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(OLDEST)/%.stamp: pyproject.toml tests/oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[$*]'
	touch $@

$(DOCS)/%.stamp: pyproject.toml | $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --quiet --editable '.[$*]'
	touch $@
