# Two commands on a fresh machine (Python 3.11+, make): `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
CORES  ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
GPUS   ?= $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
SWEEP  ?= sweeps/quick.yaml
SEARCH ?= searches/ucb_digits.yaml
JOBS   ?= 1

.PHONY: demo test lint bench explore report sweep search checkpoint clean
.DEFAULT_GOAL := demo

# pip leaves alone what is there; the stamp keeps a second call from asking it at all.
$(VENV)/ready: requirements.lock pyproject.toml
	test -x "$(BIN)/python" || $(PYTHON) -m venv $(VENV)
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: SWEEP = sweeps/quick.yaml
demo: sweep

sweep: $(VENV)/ready
	PATH="$(BIN):$$PATH" snakemake --profile profiles/local --cores $(CORES) $(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS)) --configfile $(SWEEP)

search: $(VENV)/ready
	"$(BIN)/python" -m lib.search $(SEARCH) $(if $(TRIALS),--trials $(TRIALS)) --jobs $(JOBS)

test: $(VENV)/ready lint
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 pytest -n $(CORES) $(TESTS)

lint: $(VENV)/ready
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/nbstripout" --verify --extra-keys "metadata.papermill metadata.widgets cell.metadata.papermill" notebooks/*.ipynb

explore: $(VENV)/ready
	"$(BIN)/jupyter" lab notebooks/explore.ipynb

bench: $(VENV)/ready
	"$(BIN)/python" benchmarks/speed.py
	"$(BIN)/python" benchmarks/avit.py
	"$(BIN)/python" benchmarks/acdc.py
	"$(BIN)/python" benchmarks/tokens.py
	"$(BIN)/python" benchmarks/compare.py

report: $(VENV)/ready
	"$(BIN)/python" report/build.py outputs

clean:
	rm -rf outputs .snakemake

# The checkpoint that the project ships, from scratch (about an hour on one core).
checkpoint: $(VENV)/ready
	"$(BIN)/papermill" notebooks/dense.ipynb out.ipynb -k python3 -f sweeps/vit_digits.yaml
	cp outputs/dense/vit_digits/model.safetensors checkpoints/vit_digits.safetensors
	cp outputs/dense/vit_digits/model.json checkpoints/vit_digits.json
	cp outputs/dense/vit_digits/metrics.json checkpoints/vit_digits.metrics.json
	cp outputs/dense/vit_digits/provenance.json checkpoints/vit_digits.provenance.json
