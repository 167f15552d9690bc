"""Block AttnRes Qwen3: transformers' own Qwen3 sublayers, fed by a routed mix of depth sources.

The model is `embed -> step(state) per layer -> finish`, and `DepthState` is a value: whoever keeps the state in front
of a layer can start again from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.utils import can_return_tuple

from attnres.depth.plan import DepthPlan
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.released import released_weights
from attnres.model.routing import (
    FINAL,
    PREFIXES,
    StoredRead,
    added,
    attach_read,
    freeze_unreachable,
    init_read,
    is_apart,
    open_block,
    parameters_of,
    route,
    scored_together,
    stored_read,
)
from attnres.model.state import Context, DepthState, Edit, Observer, Trace, checkpointed


@dataclass
class AttnResModelOutput(BaseModelOutputWithPast):
    """`routing`: one `[B, T, S_j]` fp32 tensor per read, oldest source first; None unless asked for."""

    routing: tuple[Tensor, ...] | None = None


@dataclass
class AttnResCausalLMOutput(CausalLMOutputWithPast):
    """`routing`: one `[B, T, S_j]` fp32 tensor per read, oldest source first; None unless asked for."""

    routing: tuple[Tensor, ...] | None = None


class Qwen3AttnResDecoderLayer(GradientCheckpointingLayer):
    """Qwen3's two sublayers, each behind a read of depth sources in place of the additive residual."""

    _checkpoint: Callable[..., Any]

    def __init__(self, config: Qwen3AttnResConfig, plan: DepthPlan, layer_idx: int) -> None:
        super().__init__()
        self.config, self.plan, self.layer_idx = config, plan, layer_idx
        self.self_attn = Qwen3Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for prefix, read in zip(PREFIXES, plan.layer_reads(layer_idx), strict=True):
            attach_read(self, prefix, config, read)

    def forward(self, state: DepthState, context: Context, backend: str = "auto") -> DepthState:
        """The state after both sublayers."""
        norms = (self.input_layernorm, self.post_attention_layernorm)
        for read, norm in zip(self.plan.layer_reads(self.layer_idx), norms, strict=True):
            state = open_block(state, read, self.plan, context, self.config.rms_norm_eps, backend)
            state, x = route(state, read, norm, self.config, context, backend)
            out = self._attend(x, context) if read.sublayer == "attn" else self.mlp(x)
            state = state._replace(update=out.to(x.dtype))
        return state

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., DepthState]:
        """What the library calls with this layer's forward and its arguments, where it has set a checkpoint."""
        return partial(checkpointed, self._checkpoint)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    def _attend(self, x: Tensor, context: Context) -> Tensor:
        out, _ = self.self_attn(
            hidden_states=x,
            position_embeddings=context.position_embeddings,
            attention_mask=context.attention_mask,
            past_key_values=context.past_key_values,
            position_ids=context.position_ids,
            **(context.attention_kwargs or {}),
        )
        return out


class Qwen3AttnResPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, saving and initialisation; a class of transformers."""

    config: Qwen3AttnResConfig
    config_class = Qwen3AttnResConfig
    _no_split_modules = ["Qwen3AttnResDecoderLayer"]
    _can_record_outputs: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but strict: a checkpoint that does not fit the configuration is an error.

        Raises:
            ValueError: naming the parameters that are missing, unexpected or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        weights = released_weights(pretrained_model_name_or_path)
        if weights is not None and "state_dict" not in kwargs:
            config = kwargs.pop("config", None) or cls.config_class.from_pretrained(pretrained_model_name_or_path)
            kwargs.update(config=config, state_dict=weights)
            pretrained_model_name_or_path = None
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[what])):
                raise ValueError(
                    f"checkpoint: {len(names)} {what.replace('_', ' ')} ({', '.join(names[:3])}, ...) for "
                    f"attnres_sources={model.config.attnres_sources!r}; attnres.load_model finds the convention"
                )
        for module in model.modules():
            # Loading has made every parameter anew, and trainable.
            if isinstance(module, Qwen3AttnResModel):
                module.freeze_unreachable()
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Qwen3AttnResDecoderLayer):
            for prefix in PREFIXES:
                init_read(module, prefix, self.config)
        elif isinstance(module, Qwen3AttnResModel) and module.plan.has_final_read:
            init_read(module, FINAL, self.config)


class Qwen3AttnResModel(Qwen3AttnResPreTrainedModel):
    """The decoder. `backend` chooses how reads are computed (see `attnres.ops`)."""

    def __init__(self, config: Qwen3AttnResConfig) -> None:
        super().__init__(config)
        if "sliding_attention" in (config.layer_types or ()):
            raise ValueError("layer_types: sliding attention is not supported; set use_sliding_window to false")
        self.plan = config.plan()
        # Worked out here, before a compiled layer could: the cache takes a lock, which tracing refuses.
        assert self.plan.blocks
        self.backend = "auto"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            Qwen3AttnResDecoderLayer(config, self.plan, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.plan.has_final_read:
            attach_read(self, FINAL, config, self.plan.reads[-1])
        self.freeze_unreachable()
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, inputs_embeds: Tensor) -> DepthState:
        """The state in front of layer 0, from token embeddings `[B, T, D]`.

        Under autocast the embedding is cast like every sublayer output will be, so that all sources share a dtype.
        """
        device = inputs_embeds.device.type
        if torch.is_autocast_enabled(device):
            inputs_embeds = inputs_embeds.to(torch.get_autocast_dtype(device))
        return DepthState((inputs_embeds,), inputs_embeds if self.plan.seeded else None)

    def context(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        edit: Edit | None = None,
        observe: Observer | None = None,
        **attention_kwargs: Any,
    ) -> Context:
        """What the layers share: reads, rotary embeddings, causal mask, edit."""
        # Positions that the caller did not give stay out of the mask: they would be searched for packed documents.
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        rotary = self.rotary_emb(inputs_embeds, position_ids)
        reads = tuple(partial(parameters_of, owner, prefix) for owner, prefix in self._owners())
        apart = [is_apart(layer, Qwen3AttnResDecoderLayer) for layer in self.layers]
        together = scored_together(self.plan, [*apart, is_apart(self, Qwen3AttnResModel)])
        return Context(reads, together, rotary, mask, position_ids, past_key_values, edit, observe, attention_kwargs)

    def stored_reads(self) -> tuple[StoredRead, ...]:
        """The parameters of all reads, in the order of `plan.reads`."""
        return tuple(stored_read(owner, prefix) for owner, prefix in self._owners())

    def freeze_unreachable(self) -> None:
        """Turn off gradients of the read parameters that none can reach or that the configuration freezes."""
        for read, planned in zip(self.stored_reads(), self.plan.reads, strict=True):
            freeze_unreachable(read, self.plan.routing_is_trainable(planned), self.config.attnres_content)

    def _owners(self) -> list[tuple[nn.Module, str]]:
        """The module that each read's parameters lie on, and their prefix, in the order of `plan.reads`."""
        final = [(self, FINAL)] if self.plan.has_final_read else []
        return [(layer, prefix) for layer in self.layers for prefix in PREFIXES] + final

    def step(self, state: DepthState, layer: int, context: Context) -> DepthState:
        """The state behind a layer."""
        behind: DepthState = self.layers[layer](state, context, self.backend)
        return behind

    def finish(self, state: DepthState, context: Context) -> Tensor:
        """Last hidden state `[B, T, D]`: the final read where the convention has one, and the last norm."""
        if not self.plan.has_final_read:
            current = added(state)
            assert current is not None
            return self.norm(current)
        read = self.plan.reads[-1]
        state = open_block(state, read, self.plan, context, self.config.rms_norm_eps, self.backend)
        _, x = route(state, read, self.norm, self.config, context, self.backend)
        return x

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        observe: Observer | None = None,
        **shared: Any,
    ) -> AttnResModelOutput:
        """See `Qwen3AttnResForCausalLM.forward`; `shared` is for `context`: masks, positions, edit."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        routing: list[Tensor] = []

        def record(trace: Trace) -> None:
            routing.append(torch.exp(trace.log_weights))

        state = self.embed(inputs_embeds)
        observe = record if output_routing else observe
        context = self.context(inputs_embeds, past_key_values=past_key_values, observe=observe, **shared)
        for layer in range(self.config.num_hidden_layers):
            state = self.step(state, layer, context)
        hidden = self.finish(state, context)
        return AttnResModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            routing=tuple(routing) if output_routing else None,
        )


class Qwen3AttnResForCausalLM(Qwen3AttnResPreTrainedModel, GenerationMixin):
    """Block AttnRes Qwen3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan, _fsdp_plan = Qwen3ForCausalLM._tp_plan, Qwen3ForCausalLM._fsdp_plan

    def __init__(self, config: Qwen3AttnResConfig) -> None:
        super().__init__(config)
        self.model = Qwen3AttnResModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routing: bool = False,
        edit: Edit | None = None,
        **kwargs: Any,
    ) -> AttnResCausalLMOutput:
        """Logits, and on request the routing.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, as in transformers; None for unpadded batches.
            position_ids: `[B, T]`; positions that restart at 0 separate packed documents.
            labels: `[B, T]`, shifted inside as in transformers; -100 is ignored.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            output_routing: add `routing`, one `[B, T, S_j]` fp32 tensor per read, oldest source first.
            edit: an intervention on routing; see `attnres.model.state.Edit`.
            kwargs: for the decoder: `observe`, which is called with a `Trace` of every read (not with
                `output_routing`), and arguments of the attention function.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing,
            edit=edit,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return AttnResCausalLMOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, routing=outputs.routing
        )


AutoModelForCausalLM.register(Qwen3AttnResConfig, Qwen3AttnResForCausalLM, exist_ok=True)
