# All that is made lies in .venv/ (packages) and .cache/ (every cache); `make clean` removes both.

# The first of these that is a fitting Python is used. To choose one: make clean test PYTHON=python3.12
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11

# On Linux, PyPI's torch brings gigabytes of CUDA: where no NVIDIA GPU is seen, the PyTorch project's CPU
# wheels are tried first. To take PyPI's all the same: TORCH_INDEX=
TORCH_INDEX ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
                       echo https://download.pytorch.org/whl/cpu)

NOTEBOOK     ?= notebooks/00_one_token.ipynb
NOTEBOOKS    ?= notebooks/*.ipynb
JUPYTER_ARGS ?=
PYTEST_ARGS  ?=
BENCH_ARGS   ?=

PY     := .venv/bin/python
PIP    := $(PY) -m pip install --constraint constraints.txt
NBMAKE := --nbmake --nbmake-timeout=120# seconds a cell
RUNS   := .cache/notebooks# shipped/ and solved/: the notebooks as they are, and with their exercises done
MKDOCS := NO_MKDOCS_2_WARNING=1 GPTOSS_LAB_NOTEBOOKS=$(RUNS)/shipped $(PY) -m mkdocs
CACHE  := $(CURDIR)/.cache

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CACHE_DIR          ?= $(CACHE)/pip
export MPLCONFIGDIR           := $(CACHE)/matplotlib
export IPYTHONDIR             := $(CACHE)/ipython
export JUPYTER_CONFIG_DIR     := $(CACHE)/jupyter/config
export JUPYTER_CONFIG_PATH    := $(CURDIR)/etc/jupyter
export JUPYTER_DATA_DIR       := $(CACHE)/jupyter/data
export JUPYTER_RUNTIME_DIR    := $(CACHE)/jupyter/runtime
export PYTEST_DEBUG_TEMPROOT  := $(CACHE)
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/torchinductor
export TRITON_CACHE_DIR       := $(CACHE)/triton
export GPTOSS_LAB_CACHE       := $(CACHE)/gptoss_lab
unexport PYTHONPATH PYTHONHOME

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

lab: .venv/ok ## open JupyterLab on the first notebook (NOTEBOOK=..., JUPYTER_ARGS=--port=9999)
	@$(PY) -m nbformat.sign notebooks/*.ipynb >/dev/null
	@echo 'Starting JupyterLab; its address follows. Ctrl-C stops it.'
	@$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/$(NOTEBOOK) \
	    --log-level=WARN -y $(NO_BROWSER) $(ALLOW_ROOT) $(JUPYTER_ARGS)

test: .venv/ok .venv/kernels ## check the style, run every notebook and every test (PYTEST_ARGS='-k sink': those tests alone)
	$(PY) -m ruff check .
	$(if $(PYTEST_ARGS),,$(MAKE) --no-print-directory $(RUNS)/ok)
	$(if $(PYTEST_ARGS),,GPTOSS_LAB_NOTEBOOKS=$(RUNS)/shipped) $(PY) -m pytest tests $(PYTEST_ARGS)

# Triton is 700 MB, and only the tests of the GPU's kernels need it where there is no GPU.
.venv/kernels: .venv/ok
	@$(PIP) -qq --editable '.[kernels]'
	@touch $@

# Every notebook twice: as it is, and with each exercise answered wrongly and then rightly. One thread each, side by side.
$(RUNS)/ok: .venv/ok tests/runs.py $(wildcard notebooks/*.ipynb) $(shell find gptoss_lab -type f ! -name '*.pyc')
	$(PY) tests/runs.py make $(RUNS)
	GPTOSS_LAB_STILL=1 $(PY) -m pytest $(NBMAKE) --overwrite $(RUNS)/shipped/*.ipynb & shipped=$$!; \
	$(PY) -m pytest -o cache_dir=.cache/pytest-solved $(NBMAKE) $(RUNS)/solved/*.ipynb; solved=$$?; wait $$shipped && exit $$solved
	@touch $@

docs: .venv/ok $(RUNS)/ok ## build the site from a fresh run of the notebooks, into .cache/site
	$(MKDOCS) build --strict --site-dir .cache/site

docs-serve: .venv/ok $(RUNS)/ok ## show the site on this machine, and follow what changes
	$(MKDOCS) serve

bench: .venv/ok ## time it against other libraries, where they are installed (BENCH_ARGS=...)
	$(PY) -m bench $(BENCH_ARGS)

notebooks: .venv/ok ## run them and keep their outputs, less what differs from run to run (NOTEBOOKS=...)
	$(PY) -m pytest $(NBMAKE) --overwrite $(NOTEBOOKS)
	$(PY) tests/runs.py clean $(NOTEBOOKS)

clean: ## remove .venv and .cache
	rm -rf .venv .cache

# A notebook opened by `make lab` may load a checkpoint: those stay where Hugging Face keeps them (HF_HOME).
lab: export TIKTOKEN_CACHE_DIR ?= $(CACHE)/tiktoken
# Kernels run in notebooks/: a folder named from here is made whole, a name on the hub stays as it is.
lab: export GPTOSS_LAB_MODEL := $(or $(realpath $(GPTOSS_LAB_MODEL)),$(GPTOSS_LAB_MODEL))
test bench notebooks docs docs-serve: export HF_HOME := $(CACHE)/huggingface
test bench notebooks docs docs-serve: export XDG_CACHE_HOME := $(CACHE)
$(RUNS)/ok notebooks: export OMP_NUM_THREADS := 1# sums in the same order on every machine
notebooks: export GPTOSS_LAB_STILL := 1# explorers are kept as pictures: a widget without its kernel shows an error

NO_BROWSER = $(shell [ "$$(uname -s)" = Linux ] && [ -z "$$DISPLAY$$WAYLAND_DISPLAY" ] \
                     || [ -n "$$SSH_CONNECTION" ] && echo --no-browser)
ALLOW_ROOT = $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

# .venv/ok names the folder it was made in: a .venv that was copied or moved, or whose Python is gone, is no
# longer up to date.
ifneq ("$(shell $(PY) -c 'import pip' 2>/dev/null && cat .venv/ok 2>/dev/null)","$(CURDIR)")
.PHONY: .venv/ok
endif

.venv/ok: pyproject.toml constraints.txt
	@if $(PY) -c 'import pip' 2>/dev/null && [ ! -e .venv/unfinished ] && \
	    [ "$$(cat .venv/ok 2>/dev/null || pwd -P)" = "$$(pwd -P)" ]; then echo 'Updating .venv.'; exit 0; fi; \
	seen=; bare=; \
	for python in $(PYTHON); do \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    case $$version in \
	        3.11|3.12|3.13|3.14) ;; \
	        *) seen="$$seen ($$python is $$version)"; continue ;; \
	    esac; \
	    if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "Setting up .venv with $$python ($$version): about 1.4 GB, a few minutes, once."; \
	        exec "$$python" -m venv --clear .venv; \
	    fi; \
	    bare="$$bare $${python##*/}-venv"; \
	done; \
	if [ -n "$$bare" ]; then \
	    echo "Python is here but cannot make an environment: it has no ensurepip. On Debian or Ubuntu:"; \
	    echo "    apt install$$bare"; \
	else \
	    echo "Python 3.11, 3.12, 3.13 or 3.14 is needed and was not found$$seen."; \
	    echo "Install one, or say where it is: make PYTHON=/path/to/python3.12 ..."; \
	fi >&2; exit 1
	@rm -f $@; touch .venv/unfinished
	@$(PIP) -qq --no-index --no-deps torch 2>/dev/null || [ -z "$(TORCH_INDEX)" ] || { \
	    timeout 12 $(PY) -m pip index versions --retries 0 --timeout 10 --index-url $(TORCH_INDEX) torch \
	        >/dev/null 2>&1 && $(PIP) --no-deps --index-url $(TORCH_INDEX) torch; } || \
	    echo "$(TORCH_INDEX) gave no torch: taking it from the default index, which may bring CUDA."
	@$(PIP) -qq --editable '.[notebooks,hub,tests,docs]'
	@rm .venv/unfinished; pwd -P >$@

.PHONY: help lab test docs docs-serve bench notebooks clean
