# make demo: from nothing to a verified bundle and heatmaps. make test: every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-out

.PHONY: demo test check install clean

demo: $(VENV)/.stamp-demo
	$(BIN)/saae-export build --category zipper --out $(OUT)/bundles/zipper
	$(BIN)/saae-run $(OUT)/bundles/zipper $(OUT)/bundles/zipper/samples --out $(OUT)/heatmaps --heatmaps --overlays --expect-defects
	@echo "Heatmaps: $(OUT)/heatmaps   Report: $(OUT)/bundles/zipper/report.html"

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.stamp-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar on -e ".[demo]"
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar on -e ".[dev]"
	@touch $@ $(VENV)/.stamp-demo

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
