"""The processes that share one command's work, as many as there are devices, and what they agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from attnres.errors import AttnResError, ConfigError, one_line
from attnres.processes.memory import is_of_the_machine

# A process that has finished its work waits this long for the others.
_PATIENCE = timedelta(hours=24)
_CPU = torch.device("cpu")


class Ranks:
    """The processes that share the work; by default this one alone. The first writes what is not shared.

    Args:
        fabric: Lightning's, launched; None for one process.
        device: of a process that is alone.
    """

    def __init__(self, fabric: Fabric | None = None, device: torch.device = _CPU) -> None:
        self._fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.size = 1 if fabric is None else fabric.world_size
        self.device = device if fabric is None else fabric.device

    @classmethod
    def launch(cls, devices: int, device: torch.device) -> "Ranks":
        """As many processes as there are devices, unless torchrun has started them already.

        Raises:
            ConfigError: the machine does not have so many.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if devices == started == 1:
            return cls(device=device)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
        try:
            fabric = Fabric(
                accelerator=device.type,
                devices=here,
                num_nodes=max(1, started // here),
                strategy=DDPStrategy(timeout=_PATIENCE),
            )
            fabric.launch()
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            if is_of_the_machine(error):
                raise
            raise ConfigError(f"devices={devices}: {one_line(error, most=None)}") from error
        return cls(fabric)

    def agree(self, error: AttnResError | None = None) -> None:
        """Waits for all processes, and raises in each of them the error of the first that has one."""
        if self._fabric is None:
            if error is not None:
                raise error
            return
        mine = torch.tensor(float(self.size if error is None else self.rank), device=self._fabric.device)
        first = int(self._fabric.all_reduce(mine, reduce_op="min"))  # type: ignore[arg-type]
        if first < self.size:
            shared = self._fabric.broadcast(error, src=first)
            assert shared is not None
            raise shared

    def first(self, work: Callable[[], object]) -> None:
        """Work of the first process alone, which the others wait for; an error in it is raised in all of them."""
        failure: AttnResError | None = None
        try:
            if self.rank == 0:
                work()
        except AttnResError as error:
            failure = error
        self.agree(failure)


@contextmanager
def launched(devices: int, device: str) -> Iterator[Ranks]:
    """The processes that share the work under this block.

    The first one reports an error of the project, and ends with its code: a launcher kills it if another one fails
    before it does. In the others the error ends the block and nothing more.

    Args:
        device: `"auto"`, `"cpu"` or `"cuda"`.

    Raises:
        ConfigError: the machine does not have the devices.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError("device=cuda: this machine offers no CUDA device; use device=auto or device=cpu")
    ranks = Ranks.launch(devices, torch.device("cuda" if device != "cpu" and cuda else "cpu"))
    try:
        yield ranks
    except AttnResError:
        if ranks.rank == 0:
            raise
