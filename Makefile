# For newcomers: make demo, make test, make lint and make docs. For releases: make release.
# The first one that you run sets up .venv.

PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-units test-hospitals lint format docs release clean

demo: .venv/installed
	rm -rf demo
	$(BIN)/flapsam demo

# The hospitals' tests mostly wait, so both parts run in parallel. Each process has one thread, because more would compete.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(MAKE) --jobs=2 --output-sync=line --no-print-directory test-units test-hospitals

test-units: .venv/installed-dev
	$(BIN)/python -m pytest --ignore tests/federation/test_nvflare.py --ignore tests/federation/test_engine_attacks.py --numprocesses 2 --dist loadfile --cov --cov-report=
	@printf 'Coverage of src/flapsam, in percent: '; $(BIN)/coverage report --format=total

test-hospitals: .venv/installed-dev
	$(BIN)/python -m pytest tests/federation/test_nvflare.py tests/federation/test_engine_attacks.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The variable turns off the advertisement that the theme prints for its successor.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Builds wheel and sdist in dist/, and tests the wheel in an environment of its own with the whole demo.
release: .venv/installed-dev
	.ci/release $(abspath $(BIN))/python

clean:
	rm -rf .venv demo dist site

.venv/installed: pyproject.toml hatch_build.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
