"""Set before anything imports Triton, which decides then whether kernels are interpreted on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
