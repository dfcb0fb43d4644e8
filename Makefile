# make demo    watch MLAN adapt a segmentation network to unlabelled street scenes
# make test    every gate, cheap ones first; the last line is pytest's count
# make install makes only what both need
# make clean   forget runs and caches (.venv stays)
# Both commands make .venv and install into it once, and again when a file that says what to install has changed.
# make PYTHON=/path/to/python3.12 ...   chooses the interpreter that .venv is made with
# make test SLOW=--slow                 runs the slow tests of tests/ too
# make test WORKERS=1                   tests one notebook, and runs one test, at a time

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
OUT ?= runs/demo
WORKERS ?= 2
SLOW ?=

SUITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUITS)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo test install clean

demo: $(STAMP)
	@$(BIN)/mlan demo --out $(OUT)

install: $(STAMP)

# $(call gate,name,command): run it; if it fails, say which gate that was
define gate
@printf '\n== %s\n' '$(1)'; $(2) || { printf 'make test: the gate "%s" failed\n' '$(1)' >&2; exit 1; }
endef

test: $(STAMP)
	$(call gate,ruff,$(BIN)/ruff check .)
	$(call gate,house: numbering; notebooks clean; package in step,$(BIN)/python -m pytest -q tests/test_house.py)
	$(call gate,notebooks,OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS) --do_print --timing)
	$(call gate,tests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/test_house.py -n $(WORKERS) --dist worksteal $(SLOW))

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/python || { p="$(PYTHON)"; \
		$${p:-false} -c '$(SUITS)' 2>/dev/null || { \
			echo "MLAN needs Python 3.10 to 3.13, not $${p:-what is on the PATH}:" \
				"choose one with  make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
		$$p -m venv $(VENV) || { rm -rf $(VENV); \
			echo "$$p cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)," \
				"or choose another interpreter with  make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; }
	@echo "Installing into $(VENV): once, and some minutes, for PyTorch is large."
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf runs build *.egg-info .ruff_cache .pytest_cache
