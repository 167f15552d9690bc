"""Too little memory: an error in one line that names the configuration keys that help."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attnres.errors import ConfigError, one_line

# Torch's own allocator on the CPU has no type for it.
_CPU_ALLOCATOR = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had too little memory.

    A subclass of RuntimeError, such as an error of NCCL, is not, whatever its message says.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return type(error) is RuntimeError and _CPU_ALLOCATOR in str(error)


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
