"""Which errors are called out of memory."""

import errno
from concurrent.futures.process import BrokenProcessPool
from subprocess import CalledProcessError

import pytest
import torch

from attnres.errors import ConfigError
from attnres.processes.memory import is_of_the_machine, out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
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
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        BrokenProcessPool("a compiler was killed: can't allocate memory"),
        CalledProcessError(-9, "cc"),
        OSError(errno.ENOSPC, "No space left on device"),
        NotImplementedError("no kernel"),
        ValueError("wrong"),
    ],
)
def test_out_of_memory_lets_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory("use less"):
        raise error
    assert caught.value is error


def test_out_of_memory_is_told_of_what_torch_really_raises() -> None:
    with pytest.raises(ConfigError, match="DefaultCPUAllocator: can't allocate memory"), out_of_memory("use less"):
        torch.empty(10**15, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "of_the_machine"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.distributed.DistNetworkError("the address is in use"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (RecursionError(), False),
    ],
)
def test_what_is_of_the_machine_is_no_fault_of_a_file(error: Exception, of_the_machine: bool) -> None:
    assert is_of_the_machine(error) == of_the_machine
