"""Too little memory: an error in one line that names the configuration keys that help."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attnres.errors import ConfigError, one_line

# Torch's own allocator on the CPU, and cuBLAS, have no type for it.
_WITHOUT_TYPE = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# What CUDA says where torch's allocator is not asked, for example while a context is made.
_CUDA = "CUDA error: out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had too little memory.

    Any other subclass of RuntimeError, such as an error of NCCL, is not, whatever its message says.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if torch is not None and isinstance(error, torch.AcceleratorError):
        return str(error).startswith(_CUDA)
    return type(error) is RuntimeError and any(sign in str(error) for sign in _WITHOUT_TYPE)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether memory, a device or the network failed, and not what a person configured or a file holds."""
    torch = sys.modules.get("torch")
    failures = () if torch is None else (torch.AcceleratorError, getattr(torch.distributed, "DistError", ()))
    return is_out_of_memory(error) or isinstance(error, failures)


@contextmanager
def out_of_memory(remedy: str) -> Iterator[None]:
    """Turns such an error into a `ConfigError` that ends with `remedy`; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = one_line(error, most=200)
        raise ConfigError(f"out of memory ({message}); {remedy}") from error
