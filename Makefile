# make demo: from nothing to a verified bundle and heatmaps. make test: every test. make docs: the documentation as a site.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-out
EXTRAS ?= cpu

.PHONY: demo test check lock docs install clean

# saae-run exits with 1 when it finds a defect: here that is what it should do.
demo: $(VENV)/.stamp-demo
	$(BIN)/saae-export build --category zipper --demo --out $(OUT)/zipper --work $(OUT)/work
	$(BIN)/saae-run $(OUT)/zipper '$(OUT)/work/demo/zipper/test/*/000.png' --out $(OUT)/heatmaps --sheets --heatmaps \
		|| test $$? -eq 1
	@echo
	@echo "Report:   $(OUT)/zipper/report.html"
	@echo "Heatmaps: $(OUT)/heatmaps"
	@echo "Next:     put images of your own product into a folder and type"
	@echo "          $(BIN)/saae-export build --normal FOLDER --category NAME"

# With bytecode, whatever the environment says: else each of some hundred processes compiles the packages.
test: $(VENV)/.stamp-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Wheel and sdist, and what a line PC runs, pinned by hash: dist/requirements-line.txt, dist/sbom-line.json.
lock: $(VENV)/.stamp-dev
	$(BIN)/python -m build --outdir dist
	$(BIN)/python deploy/lock.py --wheel "$$(ls -t dist/*.whl | head -n 1)" --extras "$(EXTRAS)" --into dist

# Strict: a link that leads nowhere ends the build. The figures are drawn first; a test holds the committed ones against it.
docs: $(VENV)/.stamp-dev
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/commands.py
	$(BIN)/zensical build --clean --strict
	@echo
	@echo "The site is in build/site. To read it:"
	@echo "          $(BIN)/python -m http.server --directory build/site --bind 127.0.0.1 8000"

install: $(VENV)/.stamp-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar on -e ".[demo]"
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar on --no-compile -e ".[dev]"
	@# On all cores, where pip takes one; without what nothing here imports, a fifth of it all.
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests?|testing|_inductor|rllib)/' $(VENV)/lib >/dev/null || true
	@touch $@ $(VENV)/.stamp-demo

clean:
	rm -rf $(VENV) $(OUT) build dist .cache *.egg-info
