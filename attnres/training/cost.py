"""What a run will need before a GPU is asked for: parameters, FLOPs, memory and time on a given cluster.

    python -m attnres.commands.plan +experiment=attnres_0p6b cluster.gpus=8 cluster.gpu=h200 cluster.mfu=0.4

Nothing is allocated: the model and one micro-batch run as fake tensors, and what autograd would keep for the backward
pass is counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, Qwen3Config

from attnres.config import require
from attnres.data import accumulation_steps
from attnres.model.routing import is_routing
from attnres.training.config import TrainConfig, TrainerConfig
from attnres.training.flops import GPUS, flops_per_token, known_gpu
from attnres.training.initial_weights import freeze
from attnres.training.loss import LOGITS_BYTES, choose
from attnres.training.models import KINDS, model_config

_GIB = 2**30


@dataclass(frozen=True)
class ClusterConfig:
    """The machines to estimate for.

    Attributes:
        gpu: one of the known GPUs, unless `peak_tflops` and `memory_gib` describe it.
        mfu: model FLOPs utilisation that is assumed, a fraction of the peak.
        peak_tflops: dense TFLOP/s of one GPU.
        memory_gib: usable memory of one GPU.
    """

    gpus: int = 8
    gpu: str = "h200"
    mfu: float = 0.4
    peak_tflops: float | None = None
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        require(self.gpus >= 1, f"gpus: expected an integer >= 1, got {self.gpus}")
        require(0 < self.mfu <= 1, f"mfu: expected a fraction of the peak, 0 to 1, got {self.mfu}")
        described = self.peak_tflops is not None and self.memory_gib is not None
        require(
            described or known_gpu(self.gpu) is not None,
            f"gpu: expected one of {', '.join(GPUS)}, got {self.gpu!r}; or set cluster.peak_tflops and"
            " cluster.memory_gib",
        )

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU."""
        return 1e12 * (self.peak_tflops or known_gpu(self.gpu)[0])  # type: ignore[index]

    @property
    def memory(self) -> float:
        """GiB of one GPU."""
        return self.memory_gib or known_gpu(self.gpu)[1]  # type: ignore[index]


@dataclass(frozen=True)
class CostEstimate:
    """Counts, bytes of one GPU and seconds of a run.

    Attributes:
        parameters: of the model, tied ones once.
        routing_parameters: how many of these belong to the routing.
        accumulation: micro-batches that a GPU adds up in a step.
        memory: bytes by what they hold.
        tokens_per_second: of one GPU, at the MFU that is assumed.
    """

    parameters: int
    routing_parameters: int
    tokens: int
    tokens_per_step: int
    flops_per_token: float
    accumulation: int
    memory: dict[str, float]
    tokens_per_second: float
    seconds: float


def estimate_cost(config: TrainConfig, cluster: ClusterConfig) -> CostEstimate:
    """What a run would need on these machines.

    Raises:
        ConfigError: the batch does not divide over the GPUs, or the model cannot be built.
    """
    trainer, length = config.trainer, config.data.sequence_length
    accumulation = accumulation_steps(trainer.global_batch_size, trainer.micro_batch_size, cluster.gpus)
    vocab_size = config.model.get("vocab_size") or config.data.vocab_size
    architecture = model_config(config.model, vocab_size, eos_id=0, sequence_length=length)
    with FakeTensorMode():
        model = KINDS[config.model["kind"]][1](architecture)
        freeze(model, config.trainable)
        activations = saved_bytes(model, trainer, length)
    per_token = flops_per_token(model, architecture, length)
    tokens_per_step = trainer.global_batch_size * length
    tokens = trainer.max_steps * tokens_per_step
    rate = cluster.peak * cluster.mfu / per_token
    return CostEstimate(
        parameters=sum(p.numel() for p in model.parameters()),
        routing_parameters=sum(p.numel() for name, p in model.named_parameters() if is_routing(name)),
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        flops_per_token=per_token,
        accumulation=accumulation,
        memory=_memory(model, architecture, trainer, length, cluster.gpus, activations),
        tokens_per_second=rate,
        seconds=tokens / (rate * cluster.gpus),
    )


def saved_bytes(model: PreTrainedModel, trainer: TrainerConfig, length: int) -> float:
    """Bytes that autograd keeps of one micro-batch below the head: activations, and low-precision weight copies."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    # Storages are told apart by address: none may be freed, and its address reused, while we count.
    alive: list[Tensor] = []
    ids = torch.zeros(trainer.micro_batch_size, length, dtype=torch.long)
    bf16 = trainer.precision == "bf16-mixed"
    decoder: nn.Module = model.model
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        decoder(input_ids=ids, use_cache=False)
    return float(sum(kept.values()))


def _memory(
    model: PreTrainedModel, config: Qwen3Config, trainer: TrainerConfig, length: int, gpus: int, saved: float
) -> dict[str, float]:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bf16 = trainer.precision == "bf16-mixed"
    sharded = trainer.strategy == "fsdp2"
    ranks = gpus if sharded else 1
    positions = trainer.micro_batch_size * length
    width = 2 if bf16 else 4
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    copies = 2 * layers if bf16 else 0
    activations = saved - copies
    if trainer.gradient_checkpointing:
        # Between layers: the running state and a sublayer's output; within, one layer at a time.
        activations = config.num_hidden_layers * 2 * positions * config.hidden_size * width
        activations += (saved - copies) / config.num_hidden_layers
    memory = {
        "parameters (fp32)": 4.0 * parameters / ranks,
        "gradients (fp32)": 4.0 * trained / ranks,
        "optimizer (two fp32 moments)": 8.0 * trained / ranks,
        "activations": activations,
    }
    if sharded:
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
        root = parameters - layers
        memory["gathered for the computation"] = 8.0 * root + 2 * largest * width
    elif bf16:
        memory["bf16 copies of the weights"] = float(copies)
    loss = choose(trainer.loss, positions, config.vocab_size)
    rows = positions if loss == "plain" else min(positions, LOGITS_BYTES // (4 * config.vocab_size))
    # The logits, in fp32 again where they were not, their log-softmax, and the gradients of both.
    memory["logits and their gradients"] = rows * config.vocab_size * (4 * 3 + (2 * width if bf16 else 0))
    if loss != "plain":
        memory["logits and their gradients"] += 4 * config.vocab_size * config.hidden_size
    return memory


def describe(config: TrainConfig, cluster: ClusterConfig, cost: CostEstimate) -> str:
    """The estimate as text."""
    trainer = config.trainer
    total = sum(cost.memory.values())
    hours = cost.seconds / 3600
    fits = "fits" if total <= 0.9 * cluster.memory * _GIB else "DOES NOT FIT with a tenth to spare"
    lines = [
        f"{config.name} on {cluster.gpus} x {cluster.gpu}, {trainer.strategy}, {trainer.precision}",
        "",
        f"parameters            {cost.parameters:>18,}",
        f"  of these, routing   {cost.routing_parameters:>18,}",
        f"tokens                {cost.tokens:>18,}   {trainer.max_steps:,} steps of {cost.tokens_per_step:,}",
        f"a step on one GPU     {cost.accumulation:>18,}   micro-batches of {trainer.micro_batch_size} windows",
        f"FLOP per token        {cost.flops_per_token:>18.4g}   3 (2 N + L 2 T H d + sum 6 D S_j)",
        f"FLOP                  {cost.flops_per_token * cost.tokens:>18.4g}",
        "",
        "memory of one GPU, GiB",
        *(f"  {name:<34}{value / _GIB:>8.2f}" for name, value in cost.memory.items()),
        f"  {'sum':<34}{total / _GIB:>8.2f}   of {cluster.memory:.0f}: {fits}",
        "",
        f"assumed MFU           {cluster.mfu:>18.2f}   of {cluster.peak / 1e12:,.0f} TFLOP/s",
        f"tokens/s per GPU      {cost.tokens_per_second:>18,.0f}",
        f"time                  {hours:>18.2f}   hours, {hours * cluster.gpus:,.1f} GPU hours",
    ]
    return "\n".join(lines)
