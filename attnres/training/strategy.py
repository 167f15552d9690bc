"""How ranks share one model: replicated (DDP) or sharded (FSDP2), and what a sharded checkpoint looks like."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from attnres.processes.peers import GROUP_TIMEOUT
from attnres.training.config import TrainerConfig


def strategy(config: TrainerConfig) -> str | Strategy:
    """Lightning's strategy for `trainer.strategy`."""
    if config.strategy == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, timeout=GROUP_TIMEOUT)
    if config.strategy == "fsdp2":
        devices = config.devices if isinstance(config.devices, int) else max(1, torch.cuda.device_count())
        return ShardedStrategy(data_parallel_size=devices * config.num_nodes)
    return "auto"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, with gathered checkpoints.

    A checkpoint is one file of whole tensors, collected on rank 0, the same as that of an unsharded run: it resumes on
    any number of ranks, replicated or sharded, and needs no distributed metadata, which is a pickle.

    Args:
        data_parallel_size: number of ranks. Left to itself, Lightning chooses tensor parallelism on one node.
    """

    def __init__(self, data_parallel_size: int) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=GROUP_TIMEOUT,
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors under the parameter numbers of an unsharded run; empty on all ranks but the first.

        Lightning's own numbers parameters in the model's order instead of the optimizer's, and cannot read it back.
        """
        first = self.global_rank == 0
        gathered = _gather(getattr(optimizer, "optimizer", optimizer).state_dict(), keep=first)
        return gathered if first else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads and checks the file, and keeps its shards."""
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        assert self.model is not None
        saved = checkpoint["state_dict"]
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(_scatter(saved[name], value))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            entries = {
                number: {
                    key: _scatter(value, parameters[number]) if value.shape == parameters[number].shape else value
                    for key, value in entry.items()
                }
                for number, entry in state["state"].items()
            }
            optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As other strategies do: Lightning's own refuses a path that is a folder, which a step's checkpoint is."""
        path = Path(self.broadcast(filepath))
        Strategy.save_checkpoint(self, checkpoint, path, storage_options)


def _gather(value: Any, keep: bool) -> Any:
    """Containers with every sharded tensor made whole, on the CPU of the ranks that keep it; all ranks must call it."""
    if isinstance(value, dict):
        return {key: _gather(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [_gather(item, keep) for item in value]
    if not isinstance(value, Tensor):
        return value
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu() if keep else None


def _scatter(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return value
    whole = value.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def shard(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> None:
    """Shards a causal language model over `mesh`, sublayer by sublayer.

    Norms, routing parameters and the embedding stay with the root, which is whole during a forward pass: the model
    reads the routing parameters of a block's layers together, before those layers run. Master weights, gradients and
    optimizer state are fp32 shards.

    Args:
        bf16: gather the sublayers' weights in bf16, which is what autocast would make of them; gradients are still
            reduced in fp32. The root's are gathered in fp32: the reads and norms compute in it.
    """
    # Inputs stay what autocast made them, so that a sharded run computes what a replicated one does.
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = half if bf16 else MixedPrecisionPolicy()
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer.self_attn, mesh=mesh, mp_policy=policy)
        fully_shard(layer.mlp, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
