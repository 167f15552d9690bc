"""Block AttnRes Qwen3: transformers' own Qwen3 sublayers, fed by a routed mix of depth sources.

The model is `embed -> step(state) per layer -> finish`, and `DepthState` is a value: whoever keeps the state in front
of a layer can start again from there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from attnres.depth.plan import DepthPlan
from attnres.model.config import Qwen3AttnResConfig
from attnres.model.keywords import CACHE, OTHER_CACHE, attention_arguments, cache_keyword, one_cache
from attnres.model.masks import attention_mask_for
from attnres.model.released import weights_read_here
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
from attnres.model.state import Context, DepthState, Edit, Observer, Trace, VectorEdit, checkpointed


class _BothCacheNames:
    """The cache of an output under the name that it has in other releases of the library, too."""

    def __getattr__(self, name: str) -> Any:
        if name == OTHER_CACHE:
            return getattr(self, CACHE)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(CACHE if key == OTHER_CACHE else key)  # type: ignore[misc]


@dataclass
class AttnResModelOutput(_BothCacheNames, BaseModelOutputWithPast):
    """`routing`: one `[B, T, S_j]` fp32 tensor per read, oldest source first; None unless asked for."""

    routing: tuple[Tensor, ...] | None = None


@dataclass
class AttnResCausalLMOutput(_BothCacheNames, CausalLMOutputWithPast):
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
            state = DepthState(state.finished, state.current, out.to(x.dtype), state.prepared)
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
            position_ids=context.position_ids,
            **cache_keyword(context.past_key_values),
            **(context.attention_kwargs or {}),
        )
        return out


def mixed(trace: Trace, edit: Edit | None) -> Tensor:
    """What a read mixed, `h [B, T, D]`: its sources under its weights, both after an edit."""
    sources = trace.sources
    if isinstance(edit, VectorEdit) and edit.names(trace.site):
        sources = edit.vectors(trace.site, sources)
    weights = torch.exp(trace.log_weights)
    terms = (source * weights[..., index, None] for index, source in enumerate(sources))
    return sum(terms, start=torch.zeros_like(weights[..., :1])).to(sources[0].dtype)


_HEADS = ("lm_head.", "score.", "qa_outputs.")


class Qwen3AttnResPreTrainedModel(Qwen3PreTrainedModel):
    """Loading, saving and initialisation; a class of transformers."""

    config: Qwen3AttnResConfig
    config_class = Qwen3AttnResConfig
    _no_split_modules = ["Qwen3AttnResDecoderLayer"]
    _skip_keys_device_placement = [CACHE, OTHER_CACHE]
    # Names that begin with these may be missing from a checkpoint (the untrained head of a new task), or left over (the
    # head of another task).
    _own_head: tuple[str, ...] = ()
    _other_heads: tuple[str, ...] = _HEADS
    _can_record_outputs: dict[str, Any] = {"attentions": OutputRecorder(Qwen3Attention, index=1)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but strict: a checkpoint that does not fit the configuration is an error.

        Heads aside: that of a new task may be missing, and that of another may be left over. Whoever asks for
        `output_loading_info`, or gives a `state_dict`, is told what does not fit, or knows it, and gets the model.

        Raises:
            ValueError: naming the parameters that are missing, unexpected or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        strict = not wants_info and "state_dict" not in kwargs
        other_shapes = kwargs.get("ignore_mismatched_sizes", False)
        weights = weights_read_here(pretrained_model_name_or_path, kwargs.get("subfolder", ""), kwargs.get("variant"))
        if weights is not None and "state_dict" not in kwargs:
            subfolder = kwargs.pop("subfolder", "")
            config = kwargs.pop("config", None) or cls.config_class.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder
            )
            kwargs.update(config=config, state_dict=weights)
            pretrained_model_name_or_path = None
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        allowed = {"missing_keys": cls._own_head, "unexpected_keys": cls._other_heads}
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(name) for name in info[what] if not str(name).startswith(allowed.get(what, ())))
            if names and strict and not (other_shapes and what == "mismatched_keys"):
                raise ValueError(
                    f"checkpoint: {len(names)} {what.replace('_', ' ')} ({', '.join(names[:3])}, ...) for "
                    f"attnres_sources={model.config.attnres_sources!r}; attnres.load_model finds the convention"
                )
        if model.config.tie_word_embeddings and model._tied_weights_keys and not model.all_tied_weights_keys:
            # The file holds a head of its own. The library keeps it, says so, and leaves the configuration as it was.
            model.config.tie_word_embeddings = False
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
        # No padding row: it would never learn, and the padding token often is the separator of documents.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
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
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Context:
        """What the layers share: reads, rotary embeddings, causal mask, edit."""
        # Positions that the caller did not give are searched for no documents.
        mask = attention_mask_for(self.config, inputs_embeds, attention_mask, position_ids, past_key_values)
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

    @capture_outputs
    def forward(  # type: ignore[misc]  # position_ids stands in TransformersKwargs, too
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        edit: Edit | None = None,
        observe: Observer | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResModelOutput:
        """See `Qwen3AttnResForCausalLM.forward`."""
        past_key_values = one_cache(past_key_values, cache)
        arguments = attention_arguments(kwargs, _forward_names, self.config._attn_implementation, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if not isinstance(output_hidden_states, bool):
            raise ValueError("output_hidden_states: give True or False; a selection of layers is not supported")
        state = self.embed(inputs_embeds)
        routing: list[Tensor] = []
        hidden_states = list(state.finished)

        def record(trace: Trace) -> None:
            if output_routing:
                routing.append(torch.exp(trace.log_weights))
            if output_hidden_states and trace.site.sublayer == "attn" and trace.site.layer > 0:
                hidden_states.append(mixed(trace, edit))
            if observe is not None:
                observe(trace)

        with self._weights_at_hand(bool(output_attentions)):
            context = self.context(
                inputs_embeds,
                attention_mask,
                position_ids,
                past_key_values,
                edit,
                record if output_routing or output_hidden_states else observe,
                arguments,
            )
            for layer in range(self.config.num_hidden_layers):
                state = self.step(state, layer, context)
        last = self.finish(state, context)
        return AttnResModelOutput(
            last_hidden_state=last,
            hidden_states=(*hidden_states, last) if output_hidden_states else None,
            routing=tuple(routing) if output_routing else None,
            **cache_keyword(past_key_values if use_cache else None),
        )

    @contextmanager
    def _weights_at_hand(self, wanted: bool) -> Iterator[None]:
        """Attention whose weights `capture_outputs` can record: only the eager function returns them."""
        implementation = self.config._attn_implementation
        if not wanted or implementation == "eager":
            yield
            return
        if self.training and self.gradient_checkpointing:
            raise ValueError(
                f"output_attentions: {implementation} gives none, and the recomputation of gradient checkpointing "
                "cannot change it; load the model with attn_implementation='eager'"
            )
        self.config._attn_implementation = "eager"
        try:
            yield
        finally:
            self.config._attn_implementation = implementation


class Qwen3AttnResForCausalLM(Qwen3AttnResPreTrainedModel, GenerationMixin):
    """Block AttnRes Qwen3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan, _fsdp_plan = Qwen3ForCausalLM._tp_plan, Qwen3ForCausalLM._fsdp_plan
    _other_heads = ()

    def __init__(self, config: Qwen3AttnResConfig) -> None:
        super().__init__(config)
        self.model = Qwen3AttnResModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids stands in TransformersKwargs, too
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
        observe: Observer | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResCausalLMOutput:
        """Logits, and on request the routing.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, as in transformers; None for unpadded batches.
            position_ids: `[B, T]`; positions that restart separate packed documents, whatever the mask. A cache then
                holds several documents, none of which can be continued.
            past_key_values, cache: the cache, under either of the names that transformers has for it.
            labels: `[B, T]`, shifted inside as in transformers; -100 is ignored. As there, `shift_labels` among
                `kwargs` are shifted already, and the loss is the sum over targets divided by `num_items_in_batch`,
                where that is given, in place of their mean.
            logits_to_keep: compute logits for the last so many positions only; 0 for all.
            output_routing: add `routing`, one `[B, T, S_j]` fp32 tensor per read, oldest source first.
            edit: an intervention on routing; see `attnres.model.state.Edit`.
            observe: called with a `Trace` of every read.
            kwargs: other words of transformers, such as `output_attentions`: `attentions`, one `[B, heads, T, T]`
                tensor per layer. `output_hidden_states` adds `hidden_states`, L + 1 tensors `[B, T, D]`: the embedding;
                for each further layer the mix of sources that its attention reads, in front of its norm; and the output
                of the last norm. Each is thus what the additive model has there, and the last norm and the head make a
                logit lens of it.

        Raises:
            TypeError: an unknown argument, with the nearest known one.
            ValueError: an argument of transformers that is not supported.
        """
        # Not in the signature: the library's Trainer takes every argument called something with "label" for one that a
        # batch must hold.
        words: dict[str, Any] = dict(kwargs)
        of_loss = {name: words.pop(name, None) for name in ("num_items_in_batch", "shift_labels")}
        of_loss = {name: value for name, value in of_loss.items() if value is not None}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing,
            edit=edit,
            observe=observe,
            return_dict=True,
            **words,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None or "shift_labels" in of_loss:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return AttnResCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing=outputs.routing,
            **cache_keyword(getattr(outputs, CACHE)),
        )


def _without_routing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A head of the library, whose output has no room for the routing."""

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_routing"):
            raise ValueError("output_routing: this head's output has no room for it; call its decoder, `model.model`")
        return forward(self, *args, **kwargs)

    return run


class Qwen3AttnResForSequenceClassification(GenericForSequenceClassification, Qwen3AttnResPreTrainedModel):
    """The library's head over the last token of each sequence."""

    # The head's loss is the mean of a batch: the Trainer divides it by the number of batches that it accumulates.
    accepts_loss_kwargs = False
    _own_head = ("score.",)
    forward = _without_routing(GenericForSequenceClassification.forward)


class Qwen3AttnResForTokenClassification(GenericForTokenClassification, Qwen3AttnResPreTrainedModel):
    """The library's head over every token."""

    accepts_loss_kwargs = False
    _own_head = ("score.",)
    forward = _without_routing(GenericForTokenClassification.forward)


class Qwen3AttnResForQuestionAnswering(GenericForQuestionAnswering, Qwen3AttnResPreTrainedModel):
    """The library's head for the span of an answer."""

    accepts_loss_kwargs = False
    _own_head = ("qa_outputs.",)
    forward = _without_routing(GenericForQuestionAnswering.forward)


def _forward_names() -> set[str]:
    """The arguments that a forward pass names."""
    return {
        name for model in (Qwen3AttnResModel, Qwen3AttnResForCausalLM) for name in signature(model.forward).parameters
    }


AutoModel.register(Qwen3AttnResConfig, Qwen3AttnResModel, exist_ok=True)
AutoModelForCausalLM.register(Qwen3AttnResConfig, Qwen3AttnResForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(Qwen3AttnResConfig, Qwen3AttnResForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(Qwen3AttnResConfig, Qwen3AttnResForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(Qwen3AttnResConfig, Qwen3AttnResForQuestionAnswering, exist_ok=True)
