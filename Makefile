# Each target makes .venv by itself. PYTHON is the interpreter it is made from (3.10 or newer).
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo demo-sd21 demo-dit demo-sd3 demo-sdxl test quality bench endings evidence

demo: .venv/installed  ## train a small teacher of digits, distil it four ways, write a report (10 minutes on 2 cores)
	$(PY) demos/digits.py --output_dir demo

demo-sd21: .venv/installed  ## the same for a small Stable Diffusion of garments (half an hour)
	$(PY) demos/fashion_sd21.py --output_dir demo-sd21

demo-dit: .venv/installed  ## the same for a small DiT of garments, distilled in depth
	$(PY) demos/fashion_dit.py --output_dir demo-dit

demo-sd3: .venv/installed  ## the same for a small Stable Diffusion 3 of garments
	$(PY) demos/fashion_sd3.py --output_dir demo-sd3

demo-sdxl: .venv/installed  ## the same for a small Stable Diffusion XL of garments
	$(PY) demos/fashion_sdxl.py --output_dir demo-sdxl

test: .venv/installed
	$(PY) -m pytest --numprocesses 2 --dist worksteal --durations 30

quality: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# With these glibc keeps freed memory, as the CUDA allocator does. Otherwise page faults are timed with the work.
bench: export MALLOC_MMAP_THRESHOLD_ = 8589934592
bench: export MALLOC_TRIM_THRESHOLD_ = 17179869184
bench: export MALLOC_TOP_PAD_ = 268435456
bench: .venv/installed  ## time the loss and training steps
	$(PY) benchmarks/loss.py
	$(PY) benchmarks/step.py

endings: .venv/installed  ## kill and interrupt runs of every script everywhere, and look at how they end (hours)
	$(PY) benchmarks/kills.py
	$(PY) benchmarks/endings.py

evidence: .venv/installed  ## run the experiments that are left (days), and write the page of those that are finished
	$(PY) benchmarks/evidence.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --requirement requirements.txt
	touch $@
