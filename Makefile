# Short names for the usual commands. `make ci` is what a change must pass.
.PHONY: install test lint format bench demo compile docs ci

install:
	pip install -e '.[test,bench,dev]'

test:
	pytest -n 2

lint:
	ruff format --check .
	ruff check .

format:
	ruff format .
	ruff check --fix .

bench:
	pytest bench/ --benchmark-only

demo:
	mace-triton demo

# Registers, shared memory and spills of every kernel, compiled without a GPU.
compile:
	mace-triton dev compile

# The pages that are made from data: benchmark tables and plots, the water model's card.
docs:
	mace-triton bench report
	python -m mace_triton.models.card

ci:
	.ci/run
