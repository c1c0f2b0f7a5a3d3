# `make demo` and `make test` set themselves up on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
# the versions CI runs; newer ones are welcome, see pyproject.toml
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
NEXT_TRITON ?= triton==3.9.0
BIN = $(VENV)/bin

.PHONY: demo test lint nightly bench clean

# A Python that has torch already (a GPU machine, say) lends it to the environment; otherwise the pinned versions are installed.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@$(BIN)/python -c "import torch, triton" 2>/dev/null || { \
	  $(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install -q $(TORCH) numpy && \
	  { [ "`uname`" != Linux ] || $(BIN)/python -m pip install -q $(TRITON); }; }
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

.triton-next/.ready: $(VENV)/.ready
	@if [ "`uname`" = Linux ]; then $(BIN)/python -m pip install -q --no-deps --target .triton-next $(NEXT_TRITON); fi
	@mkdir -p .triton-next && touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m examples.packed_text
	$(BIN)/python -m examples.train_bytes

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test: $(VENV)/.ready .triton-next/.ready lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests
	$(BIN)/python -m pytest --doctest-modules flexmask --ignore=flexmask/templates
	$(BIN)/python -m pytest --doctest-glob='*.md' docs README.md

# ten times as many random masks as `make test` tries, and every kernel compiled
nightly: $(VENV)/.ready .triton-next/.ready
	$(BIN)/python -m pytest -n 2 -m slow tests
	FLEXMASK_EXAMPLES=20000 $(BIN)/python -m pytest tests/test_random_predicates.py

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.host

clean:
	rm -rf $(VENV) .triton-next .pytest_cache .mypy_cache .ruff_cache
