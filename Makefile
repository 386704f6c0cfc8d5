# `make run` and `make test` do all the set-up themselves, in the virtual environment VENV.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= def
PEERS ?= .venv-peers

.PHONY: run test prove check setup setup-dev bench-peers clean

run: setup
	$(VENV)/bin/ferrum-rt run "$(PROMPT) "

test: setup-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

prove: setup-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m proof

check: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hub]'
	# Tests compare our calls with FlashInfer's signatures. What else it wants is for kernels that we do not use.
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		flashinfer-python nvidia-ml-py
	touch $@

# The engines that bench/cpu_peers.py measures beside ours. llama.cpp takes minutes to build, for this machine's processor.
bench-peers:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r bench/cpu_peers_requirements.txt
	# It wants torchvision, which it imports only for models with images, and which must match how torch was built.
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps optimum-intel==2.2.0 optimum==2.3.0

clean:
	rm -rf $(VENV) .venv-peers .hypothesis .mypy_cache .pytest_cache .ruff_cache
