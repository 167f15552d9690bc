"""What one of two ranks does with a model that a library has spread over both: compares it with the whole one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from attnres import Qwen3AttnResForCausalLM

IDS = torch.arange(20)[None]


def logits_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter that has one, by its name."""
    output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()
        for name, value in {"logits": output.logits, **gradients}.items()
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model, and what it computes as a whole."""
    model.save_pretrained(folder)
    save_file(logits_and_gradients(model), folder / "expected.safetensors")


def compare(folder: Path, spread: Callable[[Path], Any]) -> None:
    """Both ranks see the same tokens, so that averaged gradients are those of one."""
    dist.init_process_group("gloo")
    found, expected = logits_and_gradients(spread(folder)), load_file(folder / "expected.safetensors")
    assert expected.keys() <= found.keys(), expected.keys() - found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")
    dist.destroy_process_group()


def child_sharded_by_layer(folder: Path, checkpointed: bool) -> None:
    """A layer is the unit of sharding, as accelerate's plugin makes it from `_no_split_modules`."""

    def spread(folder: Path) -> Any:
        model: Any = Qwen3AttnResForCausalLM.from_pretrained(folder)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        return model

    compare(folder, spread)


def child_with_the_librarys_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Spread by `from_pretrained` itself."""
    from transformers.distributed import DistributedConfig

    compare(
        folder,
        lambda folder: Qwen3AttnResForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**plan)),
    )
