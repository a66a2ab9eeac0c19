# make demo   install, build and pretrain a small ViT on an embedded data set; prints what it learned
# make test   install, build and run the tests
# make clients  run the package inside other people's programs: timm, torchvision, Lightning, accelerate, ONNX Runtime
# make lint   style and types
# make docs   build docs/ and the API reference into build/site
# make bench  measure, write benchmarks/results and docs/benchmarks.md: 20 to 25 minutes on 2 cores, most of it the whole step
# make gpu    for a CUDA torch without a network: install without dependencies, build, probe the device, measure the step and what
#             may make it faster, GPU tests, data, compute-sanitizer, with $(PYTHON) or .venv, whichever sees a GPU; in calls of
#             at most 9 minutes, each of which goes on where the one before ended; results go to $OUT or benchmarks/results;
#             PARTS="step data" runs these parts alone, with all of the time; PARTS=--rehearse all of them, tiny, on the CPU
# Everything goes into .venv; a torch that python3 already has is used, otherwise TORCH is installed there.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --quiet --disable-pip-version-check

HAS_TORCH := -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)" 2>/dev/null
SITE := $(shell $(PYTHON) $(HAS_TORCH) && echo --system-site-packages)
CODE := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: demo test clients lint docs bench gpu install clean

demo: install
	$(RUN) -m dinofast demo

test: $(VENV)/test-tools
	$(RUN) -m pytest -n auto --dist worksteal --ignore tests/clients

clients: $(VENV)/clients
	$(RUN) -m pytest -n auto --dist worksteal tests/clients

lint: $(VENV)/test-tools
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/installed
	$(PIP) --config-settings editable_mode=compat --editable ".[docs]"
	$(RUN) -m sphinx -q -b html docs build/site
	@echo "built: build/site/index.html"

bench: $(VENV)/test-tools
	$(RUN) -m pytest benchmarks/ --save-results
	$(RUN) benchmarks/report.py

gpu:
	@for python in $(PYTHON) $(RUN); do \
	  $$python -c "import torch; assert torch.cuda.is_available()" 2>/dev/null && exec $$python benchmarks/gpu.py $(PARTS); \
	done; test -x $(RUN) && exec $(RUN) benchmarks/gpu.py $(PARTS); exec $(PYTHON) benchmarks/gpu.py $(PARTS)

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(SITE) $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(CODE)
	$(RUN) $(HAS_TORCH) || $(PIP) "$(TORCH)"
	$(PIP) --config-settings editable_mode=compat --editable .
	@$(RUN) -c "from dinofast import _C" 2>/dev/null || echo "note: the C++ core was not built (no C++17 compiler?); plain torch is used instead"
	@touch $@

$(VENV)/test-tools: $(VENV)/installed
	$(PIP) --config-settings editable_mode=compat --editable ".[test]"
	@touch $@

# The torch that is there stays: of the packages around it, what fits it. PyPI's torchvision needs a CUDA torch's libraries; the
# last version that is imported without its own C++ library serves these tests as well.
$(VENV)/clients: $(VENV)/test-tools
	$(PIP) --config-settings editable_mode=compat --editable ".[test,clients]" \
	  "torch==$$($(RUN) -c 'import torch; print(torch.__version__)')"
	@$(RUN) -W ignore -c "import torchvision" 2>/dev/null || $(PIP) --no-deps torchvision==0.15.2 2>/dev/null \
	  || echo "note: no torchvision that can be imported here; the tests of its models are skipped"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info dinofast/*.so
