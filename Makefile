# The commands of this repository. `make` alone lists them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test lint format demo docs bench lock size clean

VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
PYTHON ?=

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## virtual environment at .venv with the locked dependencies

# A no-op while the lock and pyproject.toml are unchanged. An environment that was left half made is made anew.
$(STAMP): requirements.lock pyproject.toml
	@found=; for python in $(PYTHON) python3.11 python3 python3.12 python3.13 python3.14; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Luthier needs Python 3.11 or newer and found none on PATH." >&2; \
	  echo "Install it (Debian: apt-get install python3.11 python3.11-venv) or name it: make setup PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$found cannot make virtual environments: its modules venv and ensurepip are missing." >&2; \
	  echo "On Debian: apt-get install python3-venv; or name another Python: make setup PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	if ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	  echo "Making $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo "Installing the locked packages into $(VENV) (torch is large: minutes on a slow line)"
	@if [ -t 1 ]; then say=; else say=-qq; fi; $(RUN) -m pip install $$say --disable-pip-version-check -r requirements.lock
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Two workers with one thread each: torch's own threads would fight over the cores.
test: lint ## style, types, then every test
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n 2

lint: setup ## ruff and mypy --strict
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup ## ruff, with repairs
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

demo: setup ## fine-tune a real model on this machine and see whether it helped
	$(RUN) examples/orders/demo.py

docs: setup ## write docs/cli.md from the code
	$(RUN) -m luthier.cli.reference > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

# All of it takes hours. CASE="S1 S3", PEERS="flat trl-tuned", STAGE="gate time target ladder report", ROUNDS and SERIES
# choose; what was cut off goes on where it was. LAUNCHER is a command that every run is started through.
bench: setup ## fine-tuning beside other trainers: writes docs/benchmarks.md
	$(RUN) -m benchmarks.training --launcher "$(LAUNCHER)" $(if $(CASE),--case "$(CASE)") $(if $(PEERS),--peers "$(PEERS)") \
	  $(if $(STAGE),--stage "$(STAGE)") $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SERIES),--series $(SERIES))

# Exact versions only. The index, folders and constraint files of the machine that resolved them stay out, and so does
# torch's local build tag: "torch==2.13.0" is whichever build the installing machine offers.
lock: setup ## resolve pyproject.toml into requirements.lock
	@tools=$$(mktemp -d) && trap 'rm -rf "$$tools"' EXIT && \
	$(RUN) -m venv "$$tools" && \
	"$$tools/bin/python" -m pip install --quiet --disable-pip-version-check pip-tools && \
	"$$tools/bin/python" -m piptools compile --quiet --extra dev --strip-extras --allow-unsafe --no-header --annotation-style line \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file "$$tools/lock" pyproject.toml && \
	{ echo "# Every package of a Luthier environment, resolved from pyproject.toml (with its extra dev) by make lock."; \
	  grep -E '^[A-Za-z0-9]' "$$tools/lock" | sed -E 's/\+cpu( |$$)/\1/; s/ -c [^ ,]+,?//' | LC_ALL=C sort -f; } > requirements.lock.new && \
	mv requirements.lock.new requirements.lock

size: ## lines of code per room
	@printf '%-24s %6s %7s %8s\n' "" files lines longest
	@for room in src/luthier src/luthier/*/ tests tests/*/ examples/*/; do \
	  case $$room in *__pycache__*) continue;; *[a-z]/) depth=9;; *) depth=1;; esac; \
	  find $$room -maxdepth $$depth \( -name '*.py' -o -name '*.cpp' \) -exec cat {} + | wc -l | { read lines; \
	  files=$$(find $$room -maxdepth $$depth \( -name '*.py' -o -name '*.cpp' \) | wc -l); \
	  longest=$$(find $$room -maxdepth $$depth \( -name '*.py' -o -name '*.cpp' \) -exec wc -l {} \; | sort -rn | awk 'NR==1{print $$1}'); \
	  printf '%-24s %6d %7d %8d\n' $$room $$files $$lines $${longest:-0}; }; \
	done

clean: ## remove what make made
	rm -rf $(VENV) demo-run dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
