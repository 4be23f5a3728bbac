# What a newcomer types. Everything happens in .venv; nothing outside the clone is touched.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := zero,accelerate,ray,sweep,wandb,hub,data,remote,s3,gs,plots,export,translation,dev
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test soak check format bench peers parity results install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; say PYTHON=python3.12 or the like"; exit 1; }
	@test -x "$(BIN)/python" || $(PYTHON) -m venv .venv || \
	  { echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv"; rm -rf .venv; exit 1; }
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools packaging
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(BIN)/dist-train demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: install
	$(BIN)/python -m pytest -m soak

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: peers
	$(BIN)/python benchmarks/trainer.py
	PYTHONPATH=. .peers/bin/python benchmarks/reader.py
	PYTHONPATH=. .peers/bin/python benchmarks/shuffle.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/watch.py
	$(BIN)/python benchmarks/traffic.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/sweep.py cost

parity: install
	$(BIN)/python tests/parity_table.py

results: install
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/course.py

peers: .peers/installed

.peers/installed: benchmarks/peers.txt | install
	$(BIN)/python -m venv .peers
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$(.peers/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	.peers/bin/pip install -q --no-deps -r benchmarks/peers.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache
