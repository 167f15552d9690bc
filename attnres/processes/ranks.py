"""Processes that share independent work: one by default, one a device otherwise, and errors that all of them raise."""

import os
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from attnres.errors import AttnResError, ConfigError

# A process that has finished its share waits this long for the others.
_PATIENCE = timedelta(hours=24)


class Ranks:
    """The processes that share the work, and which of them this is; rank 0 writes what is not a piece of the work."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.size = 1 if fabric is None else fabric.world_size

    @classmethod
    def launch(cls, devices: int, accelerator: str) -> "Ranks":
        """As many processes as there are devices, unless torchrun has started them already.

        Raises:
            ConfigError: the machine does not have so many.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if devices == started == 1:
            return cls()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
        try:
            fabric = Fabric(
                accelerator=accelerator,
                devices=here,
                num_nodes=max(1, started // here),
                strategy=DDPStrategy(timeout=_PATIENCE),
            )
            fabric.launch()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"devices={devices}: {' '.join(str(error).split())}") from error
        return cls(fabric)

    @property
    def device(self) -> torch.device | None:
        """The device of this process; None where it is alone and free to choose."""
        return None if self._fabric is None else self._fabric.device

    def agree(self, error: AttnResError | None = None) -> None:
        """Waits for all processes, and raises in each of them the error of the lowest rank that has one."""
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
