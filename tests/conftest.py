"""Set before anything imports torch or Triton: one thread a test process, and kernels interpreted without a GPU."""

import os

# Two workers (pytest-xdist) on few cores: more threads than cores spin, and steps get many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
