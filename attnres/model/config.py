"""Configuration of a Block AttnRes Qwen3."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Qwen3Config

from attnres.config import nearest
from attnres.depth.plan import DepthPlan

# What released configurations may name, and the one value of each that this model computes.
RELEASED = {"attnres_mode": "block", "attnres_gate_type": "bias"}
# Fields of ours begin with this; no other tool's do.
_OURS = "attnres_"


@strict
class Qwen3AttnResConfig(Qwen3Config):
    """Qwen3's configuration plus the depth routing.

    Args:
        attnres_sources: source convention: `"block_sum"` (the paper's equations), `"seeded_block_sum"`,
            `"cumulative"` or `"full"`; see `attnres.depth.plan`.
        attnres_num_blocks: blocks asked for; a block spans `ceil(num_hidden_layers / attnres_num_blocks)` layers.
        attnres_bias: `"newest"`: one bias a read, added to the newest source; `"sources"`: one a source.
        attnres_content: whether routing may depend on content; False freezes the queries at zero, so that the biases
            alone decide.
        attnres_exact_uniform: divide the eps of the norm after read j by `S_j^2`, which makes uniform routing equal
            to the additive residual exactly (the norm removes the factor `1/S_j`).
        attnres_recency_bias_init: initial bias of the newest source.

    Raises:
        ValueError: for a value that makes no model, and for a name that is meant to be a field and is none. Other names
            that transformers does not know it keeps as attributes: files of other tools hold many.
    """

    model_type = "qwen3_attnres"
    # Qwen3's plan passes one residual stream from stage to stage; depth sources are many.
    base_model_pp_plan = None  # type: ignore[assignment]

    attnres_sources: str = "block_sum"
    attnres_num_blocks: int = 8
    attnres_bias: str = "newest"
    attnres_content: bool = True
    attnres_exact_uniform: bool = False
    attnres_recency_bias_init: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        for name, known in RELEASED.items():
            if kwargs.get(name, known) != known:
                raise ValueError(f"{name}={kwargs[name]!r} is not supported, only {known!r}")
        super().__post_init__(**kwargs)
        if self.attnres_bias not in ("newest", "sources"):
            raise ValueError(f"attnres_bias: expected 'newest' or 'sources', received {self.attnres_bias!r}")
        self.plan()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Qwen3AttnResConfig":
        """As in transformers; a released configuration, which names no convention, is taken as `seeded_block_sum`.

        See `attnres.model.released`; `load_model` finds the convention from the tensors.
        """
        # The library drops the keywords that its callers do not ask back.
        if not kwargs.get("return_unused_kwargs"):
            cls._refuse_misspelt(kwargs)
        return super().from_dict({"attnres_sources": "seeded_block_sum", **config_dict}, **kwargs)

    @classmethod
    def _refuse_misspelt(cls, names: Iterable[str]) -> None:
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in names:
            ours = name.startswith(_OURS) and name not in RELEASED
            guess = nearest(name, fields, 0.5 if ours else 0.9)
            if name not in fields and (ours or guess):
                raise ValueError(f"unknown field {name!r}" + (f"; did you mean {guess!r}?" if guess else ""))

    def plan(self) -> DepthPlan:
        """The depth plan that this configuration describes."""
        convention: Literal["block_sum", "seeded_block_sum", "cumulative", "full"] = self.attnres_sources  # type: ignore[assignment]
        return DepthPlan(self.num_hidden_layers, self.attnres_num_blocks, convention)


AutoConfig.register(Qwen3AttnResConfig.model_type, Qwen3AttnResConfig, exist_ok=True)
