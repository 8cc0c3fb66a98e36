# make demo: from nothing to a verified bundle and heatmaps. make test: every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-out

.PHONY: demo test check install clean

# saae-run exits with 1 when it finds a defect: here that is what it should do.
demo: $(VENV)/.stamp-demo
	$(BIN)/saae-export build --category zipper --demo --out $(OUT)/zipper --work $(OUT)/work
	$(BIN)/saae-run $(OUT)/zipper '$(OUT)/work/demo/zipper/test/*/000.png' --out $(OUT)/heatmaps --sheets --heatmaps \
		|| test $$? -eq 1
	@echo
	@echo "Report:   $(OUT)/zipper/report.html"
	@echo "Heatmaps: $(OUT)/heatmaps"
	@echo "Next:     put pictures of your own product into a folder and type"
	@echo "          $(BIN)/saae-export build --normal FOLDER --category NAME"

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

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
