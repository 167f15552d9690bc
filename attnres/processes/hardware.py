"""The machine that a result came from."""

import os
import platform
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and accelerators."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
