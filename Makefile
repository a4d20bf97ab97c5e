# Two commands: `make demo` trains a retrieval model and shows what it does, `make test` runs the tests.
.DEFAULT_GOAL := help
.PHONY: help demo demo-clips test check format clean

PYTHON ?= python3.11
BIN := .venv/bin
# uv does not read pip's settings: hand over where this machine keeps its wheels and certificates.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
# More settings for the two commands of a demo, such as TRAIN="trainer.stages.adapt.epochs=10".
PREPARE ?=
TRAIN ?=

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv

.venv/demo.installed: .venv/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv/dev.installed: .venv/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@ .venv/demo.installed

demo: .venv/demo.installed ## train VSE-infinity with LoRA, then LoRA + ReSoRA, on real pictures and sentences; print the report's path
	$(BIN)/python scripts/prepare_data.py data=openmoji $(PREPARE)
	$(BIN)/python scripts/train_retrieval.py data=openmoji model=vse_infty adapter=lora regularizer=linear seed=0 $(TRAIN)

demo-clips: .venv/demo.installed ## the same for video: CLIP4Clip on H.264 clips
	$(BIN)/python scripts/prepare_data.py data=openmoji_clips $(PREPARE)
	$(BIN)/python scripts/train_retrieval.py data=openmoji_clips model=clip4clip adapter=lora regularizer=linear seed=0 $(TRAIN)

test: .venv/dev.installed ## install what is missing and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: .venv/dev.installed ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches; data and runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
