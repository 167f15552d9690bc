"""Which errors are called out of memory."""

import pytest
import torch

from attnres.errors import ConfigError
from attnres.processes.memory import out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_remedy(error: Exception) -> None:
    with pytest.raises(ConfigError, match=r"^out of memory \(.*\); use less$"), out_of_memory("use less"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.distributed.DistBackendError("NCCL error: can't allocate memory on the wire"),
        NotImplementedError("no kernel"),
        ValueError("wrong"),
    ],
)
def test_out_of_memory_lets_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory("use less"):
        raise error
    assert caught.value is error
