# make demo       train AttnRes and vanilla on the standard library's text, probe, print the report's path
# make test       what a change must pass, without a GPU or a network
# make test-all   everything that needs neither a GPU nor a network; test-rest is what it adds to `make test`
# make test-long  what needs a package index or hours: the oldest and the newest versions, every extra and its recipe,
#                 transformers' own tests (TRANSFORMERS=<source archive of the installed version's git tag>), faults, soak
# Each target installs what it needs into .venv first. TORCH chooses the build, with pip's own options where it needs
# them, e.g. make demo TORCH="torch==2.13.0 --index-url <PyTorch's CPU index>".
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: demo test test-rest test-all test-long lint format lock clean
.DELETE_ON_ERROR:

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install --no-deps --require-hashes -r requirements.lock
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)
	$(PY) train.py
	$(PY) train.py +experiment=vanilla_tiny
	$(PY) probe.py ckpt=runs/attnres_tiny

test: $(INSTALLED)
	$(PY) -m pytest -m "not slow and not long"

test-rest: $(INSTALLED)
	$(PY) -m pytest -m "slow and not long"

test-all: $(INSTALLED)
	$(PY) -m pytest -m "not long"

test-long: $(INSTALLED)
	TORCH="$(TORCH)" TRANSFORMERS="$(TRANSFORMERS)" $(PY) -m pytest -n 0 -s -rs -m long
	$(PY) -m tests.faults --long
	$(PY) -m tests.faults.soak

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Needs uv and a network; torch itself is never in the lock.
lock:
	printf 'torch==2.13.0\ntriton==3.7.1; sys_platform == "linux"\n' | uv pip compile pyproject.toml \
		--extra dev --universal --python-version 3.11 --generate-hashes --no-emit-package torch --no-annotate \
		-c - -o requirements.lock --custom-compile-command "make lock"

clean:
	rm -rf .venv
