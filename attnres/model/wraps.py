"""The wraps that make a vanilla Qwen3 routable, and the weights that their schedules prescribe."""

import logging
import math
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, Qwen3ForCausalLM

from attnres.config import strict_keywords
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.loading import load_model
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.model.routing import is_routing
from attnres.model.weights import head_differs

logger = logging.getLogger(__name__)

Schedule = Literal["recency", "uniform"]
SCHEDULES: tuple[Schedule, ...] = ("recency", "uniform")


@strict_keywords
def wrap_qwen3(
    model_or_path: PreTrainedModel | str | Path,
    schedule: Schedule = "recency",
    num_blocks: int = 8,
    recency_bias: float = 10.0,
) -> Qwen3AttnResForCausalLM:
    """A vanilla Qwen3 as a routable model with content-independent weights.

    Args:
        model_or_path: a `Qwen3ForCausalLM`, or what `load_model` takes. Its weights are copied.
        schedule: `"recency"`: cumulative sources, zero queries, `recency_bias` on the newest; equal to the vanilla
            model only as the bias grows. `"uniform"`: block sums, zero queries and biases, each norm's eps divided by
            `S^2`; equal to the vanilla model exactly.
        num_blocks: blocks asked for, at most the number of layers.
        recency_bias: bias b of the newest source, in nats.

    Raises:
        ValueError: for an unknown schedule, or a model that is not a vanilla Qwen3.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, received {schedule!r}")
    base = model_or_path if isinstance(model_or_path, PreTrainedModel) else load_model(model_or_path)
    if not isinstance(base, Qwen3ForCausalLM):
        raise ValueError(f"wrap_qwen3: expected a vanilla Qwen3ForCausalLM, received {type(base).__name__}")
    stored = {k: v for k, v in base.config.to_dict().items() if k not in ("model_type", "architectures")}
    weights = base.state_dict()
    tied = base.config.tie_word_embeddings and not head_differs(weights)
    if base.config.tie_word_embeddings and not tied:
        logger.warning(
            "wrap_qwen3: the configuration ties the head to the embedding, the model holds a head of its own; that one "
            "is kept, with tie_word_embeddings: false"
        )
    recency = schedule == "recency"
    config = Qwen3AttnResConfig.from_dict(
        stored
        | {
            "tie_word_embeddings": tied,
            "attnres_sources": "cumulative" if recency else "block_sum",
            "attnres_num_blocks": num_blocks,
            "attnres_exact_uniform": not recency,
            "attnres_recency_bias_init": float(recency_bias) if recency else 0.0,
        }
    )
    wrapped = Qwen3AttnResForCausalLM(config)
    follow(wrapped, base)
    # Queries and biases keep the start that the class gives them (zero, and `recency_bias` on the newest source).
    missing, unexpected = wrapped.load_state_dict(weights, strict=False)
    strange = [name for name in missing if not is_routing(name)] + list(unexpected)
    if strange:
        raise ValueError(f"wrap_qwen3: parameters do not match the vanilla model: {', '.join(strange[:3])}")
    return wrapped.train(base.training)


def follow(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Gives a model the dtype and the device of another with the same decoder, and its buffers, in place.

    A cast of the whole module would round the rotary frequencies too. They are fp32 in a bf16 model that was loaded.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(base.device, base.dtype)
    buffers = dict(base.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].clone()


def schedule_weights(num_sources: int, schedule: Schedule, recency_bias: float = 10.0) -> list[float]:
    """Analytic routing weights of a wrap at a read of S sources, oldest first.

    Recency with N = S - 1 others: `e^b / (e^b + N)` on the newest, `1 / (e^b + N)` on each of the rest.
    """
    if schedule == "uniform":
        return [1.0 / num_sources] * num_sources
    # Divided through by e^b, so that a large bias does not overflow.
    small = math.exp(-recency_bias)
    total = 1.0 + (num_sources - 1) * small
    return [small / total] * (num_sources - 1) + [1.0 / total]
