"""Set-up for the Triton kernels: on a GPU where there is one, else on the CPU through Triton's interpreter."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


def rounded_bf16(bits: np.ndarray) -> np.ndarray:
    """fp32 bit patterns -> bf16 bit patterns, to nearest even, NaN kept."""
    with np.errstate(over="ignore"):
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(0x7FC0), rounded).astype(np.uint16)


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where kernels run. The interpreter truncates fp32 to bf16 where a GPU rounds: here it rounds."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    import triton.language as tl
    from triton.runtime import interpreter

    from attnres.ops.triton_common import interpreted

    if not interpreted():
        pytest.fail("the kernels were imported before TRITON_INTERPRET was set; run pytest with TRITON_INTERPRET=1")
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return rounded_bf16(np.ascontiguousarray(data).view(np.uint32))
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return original(data, source, target, rounding)

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter, "_convert_float", convert)
    yield torch.device("cpu")
    patch.undo()


@pytest.fixture
def poison() -> Iterator[None]:
    """Every `torch.empty` is full of NaN: an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)
