# make            the list of targets
# make demo       sets up .venv with pinned versions and runs `stepdistill demo`
# make test       installs the test tools, too, and runs the tests
# make faults     tests kills, damage and bad input, and a soak; writes the table of docs/lab/reliability.md
#
# PYTHON=python3.12   interpreter for .venv (3.11 to 3.13; default: the first one found)
# PIP_FLAGS=...       additional flags for pip install, e.g. for a mirror
# PYTEST_FLAGS=...    additional flags for pytest
# MUTANTS_FLAGS=...   flags of tests/mutants.py, e.g. "--part 1/4" or "--only B1,B2"
# BENCH_FLAGS=...     flags of benchmarks/run_all.py, e.g. "--only input,startup --data-dir DIR"

VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
PYTEST_FLAGS ?=
MUTANTS_FLAGS ?=
BENCH_FLAGS ?=
# Tests compile many small programs and run each a few times: optimising them costs more than it saves, and
# XLA's older fusion emitters compile a decoding loop in a third of the time
TEST_ENV := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1"
# pyright's wrapper would ask PyPI for a newer version at each run
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# parts of the slow tests, each at most 40 minutes on 2 idle cores
SLOW_model := tests/batches tests/data tests/formats tests/models tests/parity tests/tasks tests/training
SLOW_answers := tests/decoding tests/inference tests/serving tests/teacher
SLOW_hosts := tests/distributed tests/launch tests/planning tests/runtime tests/test_remote_workdir.py
SLOW_road := tests/commands tests/docs tests/experiments $(filter-out %_remote_workdir.py,$(wildcard tests/test_*.py))
SLOW_faults := tests/faults
PACKAGE := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
SLOW_PARTS := $(addprefix test-slow-,model answers hosts road faults)
.PHONY: help demo test test-slow test-slow-properties $(SLOW_PARTS) faults mutants lint types audit format bench experiments experiments-gsm test-gsm reference docs constraints clean

help:
	@echo "make demo         install the pinned versions into $(VENV) and run the demo (minutes on 2 CPU cores)"
	@echo "make test         install the test tools, too, and run the tests"
	@echo "make test-slow    run the slow tests, part by part; a single part: make test-slow-PART,"
	@echo "                  PART one of model, answers, hosts, road, faults, properties"
	@echo "make test-gsm     install reasoning-gym, too, and run the tests of its dataset"
	@echo "make faults       run all fault tests (32 minutes) and rewrite the table of docs/lab/reliability.md"
	@echo "make mutants      plant the bugs of tests/mutants.py one by one: a test must fail on each (15 minutes)"
	@echo "make lint         check formatting and run ruff and pyright"
	@echo "make types        run pyright only"
	@echo "make audit        list known vulnerabilities in the pinned packages (pip-audit; needs the network)"
	@echo "make format       format the source files"
	@echo "make bench        compare speed with SeqIO, transformers and CTranslate2 (50 minutes on 2 quiet cores)"
	@echo "                  and rewrite docs/lab/benchmarks.md"
	@echo "make experiments  test the claim and its controls, 190 small runs (about an hour); rewrite docs/lab/experiments.md"
	@echo "make experiments-gsm  test the claim on word problems, 27 small runs (about half an hour); rewrite docs/lab/experiments_gsm.md"
	@echo "make reference    write docs/reference from the settings' docstrings and the commands' flags"
	@echo "make docs         build the documentation site into site/"
	@echo "make constraints  resolve the versions of constraints.txt again (needs uv)"
	@echo "make clean        remove $(VENV) and build folders"

# The stamps make a second run cheap: pip runs again only when the pins or the metadata have changed.
$(BIN)/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then for p in python3 python3.12 python3.13 python3.11; do \
	  "$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	    >/dev/null 2>&1 && python="$$p" && break; done; fi; \
	if [ -z "$$python" ]; then \
	  echo "no Python 3.11, 3.12 or 3.13 with venv on PATH (tensorflow-text has no wheels for others);" \
	    "install one, or pass its path: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "== making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)

$(VENV)/.installed: $(PACKAGE) | $(BIN)/python
	@echo "== installing the package and its pinned dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "== installing the test tools into $(VENV)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "== installing the libraries to compare with into $(VENV)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/.installed-gsm: $(VENV)/.installed
	@echo "== installing reasoning-gym into $(VENV)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[gsm]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "== installing MkDocs into $(VENV)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	@touch $@

# these tests need the package reasoning-gym; without it, all other targets skip them
test-gsm: $(VENV)/.installed-gsm $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m pytest tests/data/test_gsm_symbolic.py $(PYTEST_FLAGS)

demo: $(VENV)/.installed
	@echo "== stepdistill demo"
	$(BIN)/stepdistill demo

test: $(VENV)/.installed-test
	@echo "== tests, without those marked slow"
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not faults" $(PYTEST_FLAGS)

test-slow: $(SLOW_PARTS) test-slow-properties

test-slow-properties: $(VENV)/.installed-test
	@echo "== property tests, with many examples each"
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist worksteal -m "hypothesis and not faults" --hypothesis-profile many \
	  $(PYTEST_FLAGS)

$(SLOW_PARTS): test-slow-%: $(VENV)/.installed-test
	@echo "== slow tests: $*"
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not faults" $(SLOW_$*) $(PYTEST_FLAGS)

faults: $(VENV)/.installed-test
	@echo "== fault tests: kills, damage, bad input, a soak"
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist worksteal tests/faults --faults-table docs/lab/reliability.md $(PYTEST_FLAGS)

mutants: $(VENV)/.installed-test
	@echo "== mutants: planted bugs that the tests must catch"
	$(TEST_ENV) $(BIN)/python tests/mutants.py $(MUTANTS_FLAGS)

lint: types
	@echo "== formatting and lint"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-test
	@echo "== types"
	$(BIN)/pyright

audit: $(BIN)/python
	@echo "== known vulnerabilities in constraints.txt"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) 'pip-audit>=2.10,<3'
	$(BIN)/python -m pip_audit --no-deps --disable-pip -r constraints.txt

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench
	@echo "== benchmarks, one after another; docs/lab/benchmarks.md gets their results"
	$(BIN)/python benchmarks/run_all.py $(BENCH_FLAGS)

experiments: $(VENV)/.installed
	$(BIN)/python benchmarks/claim.py --workdir runs/claim

experiments-gsm: $(VENV)/.installed-gsm
	$(BIN)/python benchmarks/claim_gsm.py --workdir runs/claim_gsm

reference: $(VENV)/.installed
	$(BIN)/python docs/reference/write.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the site is in site/; to read it with its search: $(BIN)/python -m http.server -d site"

constraints:
	uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --all-extras --upgrade \
	  --no-annotate --custom-compile-command "make constraints" pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
