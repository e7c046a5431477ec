# Everything runs in .venv, which is made on first use. PYTHON=python3.12 make run picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
# an order of magnitude above the slowest cell: a hanging kernel fails within minutes, not hours
CELL_TIMEOUT := 600
# files of tests, or notebooks, at a time, each in a process that computes on one thread: two threads that wait for one another
# make a small model hardly faster, and on a machine that does something else, many times slower
WORKERS ?= 2
ONE := OMP_NUM_THREADS=1
PYTEST := $(ONE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=5
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=$(CELL_TIMEOUT) $(NOTEBOOKS)

.PHONY: setup run lab test lint unit nbval planted colab first-hour checkpoints benchmarks clean

setup: .venv/installed

.venv/installed: pyproject.toml tools/ipython_kernel_config.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e ".[dev]"
	@mkdir -p .venv/etc/ipython && cp tools/ipython_kernel_config.py .venv/etc/ipython/
	@touch $@

run: setup  ## execute every notebook and write build/*.ipynb, build/*.html and build/index.html
	$(ONE) $(BIN)/python tools/pages.py --workers $(WORKERS) --output_dir build --timeout $(CELL_TIMEOUT) $(NOTEBOOKS)

lab: setup  ## open JupyterLab on the first notebook
	$(BIN)/jupyter lab notebooks/01_toy_data.ipynb

# in one go, notebooks first, which take longest: at the end no process waits long for another one
test: lint  ## everything that CI runs
	$(PYTEST) $(NBVAL) tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: setup
	$(PYTEST) tests

nbval: setup  ## execute every notebook and compare its outputs with the committed ones
	$(PYTEST) $(NBVAL)

planted: setup  ## plant every fault of tests/planted/faults.toml in a copy; each has to turn its tests red
	$(BIN)/python tests/planted/run.py

colab: setup  ## the notebooks on an imitation of Google Colab, in an environment of its own
	$(BIN)/python tools/colab.py

first-hour:  ## follow the README as a stranger: nothing but its first commands, in a folder of its own; needs root
	$(PYTHON) tools/first_hour.py

checkpoints: setup  ## train again what ships in data/checkpoints, and draw the README picture
	$(BIN)/python tools/checkpoints.py
	$(BIN)/python tools/picture.py

benchmarks: setup  ## measure the README's tables again, into runs/; hours. Those of CIFAR-10 want its pictures
	$(BIN)/python benchmarks/toy_recovery.py --seeds 10 --without all
	for rows in 2 4 5; do $(BIN)/python benchmarks/toy_recovery.py --seeds 10 --grid_size $$rows || exit; done
	for colour in 0 1 2 4 5; do \
		$(BIN)/python benchmarks/toy_recovery.py --seeds 10 --class_idx $$colour && \
		$(BIN)/python benchmarks/toy_recovery.py --seeds 2 --grid_size 4 --class_idx $$colour || exit; \
	done
	$(BIN)/python benchmarks/minimality.py data/checkpoints/toy/diffmask
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/speed.py --size small --image_size 32 --patch_size 4 --batch_size 64 --rounds 11 --methods all --table runs/speed_small.csv
	$(BIN)/python benchmarks/oracle.py toy shapes digits-count --table runs/oracle.csv
	$(BIN)/python benchmarks/shortcut.py
	$(BIN)/python benchmarks/deletion.py shapes --fills all --dial --table runs/deletion_shapes.csv
	$(BIN)/python benchmarks/refinement.py shapes --images 100 --seeds 2 --eps 0.1 --table runs/refinement_shapes.csv
	$(BIN)/python benchmarks/refinement.py shapes --from_nothing --images 100 --seeds 2 --eps 0.1 --table runs/refinement_shapes_nothing.csv
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/orders.py shapes --table runs/orders_shapes.csv
	$(BIN)/python benchmarks/randomisation.py --table runs/randomisation.csv
	$(BIN)/python benchmarks/deletion.py cifar10 --refine 50 --fills "mean colour" "token removal" noise --table runs/deletion_cifar10.csv
	$(BIN)/python benchmarks/deletion.py cifar10 --part diffmask-votes --refine 50 --starts gates --fills "mean colour" "token removal" noise --table runs/deletion_cifar10_votes.csv
	$(BIN)/python benchmarks/refinement.py cifar10 --from_nothing --images 60 --table runs/refinement_cifar10.csv
	$(BIN)/python benchmarks/depths.py shapes cifar10 --table runs/depths.csv
	$(BIN)/python benchmarks/oracle.py cifar10-count --table runs/oracle_cifar10.csv
	$(BIN)/python benchmarks/counting.py cifar10-count --table runs/counting_cifar10.csv
	$(BIN)/python benchmarks/orders.py cifar10 --table runs/orders_cifar10.csv
	$(BIN)/python benchmarks/stability.py --table runs/stability_cifar10.csv

clean:
	rm -rf build runs .pytest_cache .ruff_cache
