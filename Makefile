# Everything a machine with python3 (3.11 or newer) needs is installed into .venv by the targets that need it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Releases of huggingface_hub that tests run beside the installed one: the last of 0.x, the last whose deletions
# follow links to the end, the first whose do not, the last of 1.x.
HUB_VERSIONS := 0.36.2 1.31.0 1.32.0 1.33.0
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo serve test check format bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.ready  ## make a tiny model in a folder, serve it, list it and chat with it
	@$(BIN)/python docs/demo.py

serve: $(VENV)/.ready  ## serve your own: make serve MODEL_PATH=/Volumes/LLMS/models [ARGS="--port 8000"]
	@$(BIN)/mlx-omni-server $(if $(MODEL_PATH),--model-path "$(MODEL_PATH)") $(ARGS)

test: $(VENV)/.hubs  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.ready  ## lint and type-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.ready  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready  ## print the overlay's, the gateway's and the server's ratios
	$(BIN)/python benchmarks/overlay.py
	$(BIN)/python benchmarks/gateway.py
	$(BIN)/python benchmarks/server.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The stamp goes away first, so that an interrupted set-up is done again.
$(VENV)/.ready: pyproject.toml Makefile
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@echo "Setting up $(VENV) (once) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.hubs: $(VENV)/.ready
	@for version in $(HUB_VERSIONS); do \
		test -d $(VENV)/hubs/$$version || { \
			echo "Setting up huggingface_hub $$version for the tests (once) …" && \
			rm -rf $(VENV)/hubs/.new && \
			$(PIP) install --no-warn-conflicts --target $(VENV)/hubs/.new "huggingface_hub==$$version" && \
			mv $(VENV)/hubs/.new $(VENV)/hubs/$$version; \
		} || exit 1; \
	done
	@touch $@
