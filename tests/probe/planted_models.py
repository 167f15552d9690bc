"""Models whose causal sites are known because their weights are set by hand, with documents that they predict.

A token is a one-hot vector in a subspace of its own. A *lookup* sublayer reads one-hots in one subspace and writes
permuted ones to another; the readout sees one subspace only, which a lookup fills. All other sublayers write random
vectors of their input to `junk`, a subspace that no lookup and no readout sees, except through a small `leak`.
Lookups write with a large gain, so that the norms before and behind them saturate: what masking does to the length of
a mix then changes nothing. Routing is a bias for each source, and a random query on top.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.data import ProbeWindows

TOKENS, DIGITS = 16, 3
CODE, ANSWER, BETWEEN, JUNK = (slice(16 * k, 16 * (k + 1)) for k in range(4))
WIDTH, UNITS = 64, 32
LAYERS, BLOCKS = 6, 3
# Documents of the two splits, tokens of a window, share of tokens that nothing predicts.
PILOT, CONFIRM, WINDOW, NOISE = 16, 32, 24, 0.1
GAIN = 300.0
# The norm in front of the readout: a one-hot alone comes out as sqrt(WIDTH).
LENGTH = math.sqrt(WIDTH)


@dataclass(frozen=True)
class Planted:
    """A model, its documents, and what is known of it by construction.

    Attributes:
        causal: ids of the cells whose masking takes the answer away.
        without_role: ids of cells of more mass than their share, whose masking changes nothing.
    """

    name: str
    model: Qwen3AttnResForCausalLM
    windows: dict[str, ProbeWindows]
    causal: frozenset[str]
    without_role: frozenset[str] = field(default_factory=frozenset)


@torch.no_grad()
def blank(
    seed: int,
    convention: str = "block_sum",
    blocks: int = BLOCKS,
    vocabulary: int = TOKENS,
    junk: float = 0.1,
    content: float = 0.02,
) -> Qwen3AttnResForCausalLM:
    """Sublayers that write junk only; attention averages over the positions so far; tokens are one-hots."""
    torch.manual_seed(seed)
    config = Qwen3AttnResConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        attnres_sources=convention,
        attnres_num_blocks=blocks,
        attnres_bias="sources",
    )
    model = Qwen3AttnResForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.zero_()
        if "_res_proj" in name:
            parameter.normal_(std=content)
    for layer in model.model.layers:
        junk_mlp(layer.mlp, junk)
        attention = layer.self_attn
        attention.v_proj.weight[:, JUNK].normal_(std=0.1)
        attention.v_proj.weight[:, CODE].normal_(std=0.1)
        attention.o_proj.weight[JUNK].normal_(std=junk)
    weight = model.model.embed_tokens.weight
    weight[:, JUNK].normal_(std=0.1)
    if weight.shape[0] == TOKENS:
        weight[:, CODE] = 4.0 * torch.eye(TOKENS)
    return model


def junk_mlp(mlp: torch.nn.Module, size: float) -> None:
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight.zero_()
        part.weight[:, JUNK].normal_(std=0.2)
        part.weight[:, CODE].normal_(std=0.2)
    mlp.down_proj.weight.zero_()
    mlp.down_proj.weight[JUNK].normal_(std=size)


def lookup_mlp(
    mlp: torch.nn.Module, source: slice, target: slice, permutation: Tensor, gain: float, leak: float = 0.0
) -> None:
    """`target[permutation[i]] = gain * silu(4 x) x` of the normed `x = source[i]`; junk leaks into every unit."""
    count = len(permutation)
    units = torch.arange(count)
    for part, scale in ((mlp.gate_proj, 4.0), (mlp.up_proj, 1.0)):
        part.weight.zero_()
        part.weight[units, source.start + units] = scale
        part.weight[:count, JUNK] = leak * torch.randn(count, 16)
    mlp.down_proj.weight.zero_()
    mlp.down_proj.weight[target.start + permutation, units] = gain


def lookup_attention(attention: torch.nn.Module, source: slice, target: slice, gain: float) -> None:
    """`target = gain * the mean of the normed source` over the positions so far."""
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:, source] = torch.eye(16)
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[target] = gain * torch.eye(16)


def set_mix(model: Qwen3AttnResForCausalLM, read: int, weights: Sequence[float]) -> None:
    """Routing weights of a read before the random query: one a source, oldest first."""
    layer, prefix = model.model.layers[read // 2], ("attn", "mlp")[read % 2]
    getattr(layer, f"{prefix}_res_bias").copy_(torch.tensor(weights).log())


def read_answer(model: Qwen3AttnResForCausalLM, certainty: float) -> None:
    """Logits that give the token in `ANSWER` this probability."""
    gap = math.log(certainty * (TOKENS - 1) / (1 - certainty))
    model.lm_head.weight[:, ANSWER] = torch.eye(TOKENS) * gap / LENGTH


def documents(rows: Tensor, pilot: int) -> dict[str, ProbeWindows]:
    """`rows [2 N, T + 1]`, two windows a document; the first `pilot` documents are the pilot split."""
    order = torch.arange(len(rows))
    splits = {"pilot": slice(None, 2 * pilot), "confirm": slice(2 * pilot, None)}
    return {
        split: ProbeWindows(rows[some, :-1], rows[some, 1:], order[some] * rows.shape[1], order[some] // 2)
        for split, some in splits.items()
    }


def _topical() -> Tensor:
    """`[2 N, T + 1]`: in a document, one token fills 0.7 of all places."""
    topics = torch.randint(TOKENS, (PILOT + CONFIRM, 1)).repeat_interleave(2, dim=0).expand(-1, WINDOW + 1)
    return torch.where(torch.rand(topics.shape) < 0.7, topics, torch.randint(TOKENS, topics.shape))


def chain_of(successor: Tensor, count: int, length: int, noise: float) -> Tensor:
    """`[count, length]`: each token is its predecessor's successor, or with probability `noise` any token."""
    tokens = torch.randint(TOKENS, (count, length))
    kept = torch.rand(count, length) >= noise
    for t in range(1, length):
        tokens[:, t] = torch.where(kept[:, t], successor[tokens[:, t - 1]], tokens[:, t])
    return tokens


def _chained(successor: Tensor) -> dict[str, ProbeWindows]:
    return documents(chain_of(successor, 2 * (PILOT + CONFIRM), WINDOW + 1, NOISE), PILOT)


def _masked(family: str, sublayer: str, layer: int) -> str:
    return f"mask:{family}@{sublayer}.{('early', 'mid', 'late')[layer * 3 // LAYERS]}"


@torch.no_grad()
def one_mlp(seed: int, layer: int) -> Planted:
    """The MLP of `layer` looks the next token up in the embedding.

    In its band the other sources hold more than their share of mass, and no role.
    """
    model, permutation = blank(seed), torch.randperm(TOKENS)
    lookup_mlp(model.model.layers[layer].mlp, CODE, ANSWER, permutation, GAIN, leak=0.02)
    read_answer(model, 1 - NOISE)
    band, without_role = [layer - layer % 2, layer - layer % 2 + 1], set()
    for other in band:
        size = model.model.plan.reads[2 * other + 1].num_sources
        heavy = size - 1 if size < 3 else size - 2
        weights = [0.6 if i == heavy else 0.4 / (size - 1) for i in range(size)]
        set_mix(model, 2 * other + 1, weights)
        without_role.add(_masked("current" if size < 3 else "recent", "mlp", layer))
    causal = frozenset({_masked("embedding", "mlp", layer)})
    return Planted(f"one_mlp layer {layer}", model, _chained(permutation), causal, frozenset(without_role))


@torch.no_grad()
def two_mlps(seed: int, layer: int, family: str) -> Planted:
    """Layer 0's MLP writes a code that the MLP of `layer` reads from `family` and turns into the answer."""
    model, first, second = blank(seed), torch.randperm(TOKENS), torch.randperm(TOKENS)
    lookup_mlp(model.model.layers[0].mlp, CODE, BETWEEN, first, 0.1)
    lookup_mlp(model.model.layers[layer].mlp, BETWEEN, ANSWER, second, GAIN, leak=0.02)
    read_answer(model, 1 - NOISE)
    causal = frozenset({_masked("embedding", "mlp", 0), _masked(family, "mlp", layer)})
    return Planted(f"two_mlps layer {layer}", model, _chained(second[first]), causal)


@torch.no_grad()
def one_attention(seed: int, layer: int) -> Planted:
    """The attention of `layer` averages the tokens so far, which tells a document's frequent token."""
    model = blank(seed, junk=0.01)
    lookup_attention(model.model.layers[layer].self_attn, CODE, ANSWER, GAIN)
    read_answer(model, 0.7)
    return Planted(
        f"one_attention layer {layer}",
        model,
        documents(_topical(), PILOT),
        frozenset({_masked("embedding", "attn", layer)}),
    )


@torch.no_grad()
def duplicated_source(seed: int, layer: int) -> Planted:
    """Cumulative sources, a block a layer: at attention reads the newest two are one vector.

    The attention of `layer` writes a code that its MLP reads. Only the running state holds that code; the embedding is
    in every source, so that no source of it is needed.
    """
    model = blank(seed, "cumulative", LAYERS)
    attention, permutation = model.model.layers[layer].self_attn, torch.randperm(TOKENS)
    lookup_attention(attention, CODE, BETWEEN, 1.0)
    lookup_mlp(model.model.layers[layer].mlp, BETWEEN, ANSWER, permutation, GAIN)
    read_answer(model, 0.7)
    # The frequent token predicts itself; the readout undoes the lookup's permutation.
    model.lm_head.weight[:, ANSWER] = model.lm_head.weight[:, ANSWER][:, permutation.argsort()]
    causal = frozenset({_masked("current", "mlp", layer)})
    return Planted(f"duplicated_source layer {layer}", model, documents(_topical(), PILOT), causal)


@torch.no_grad()
def backup(seed: int) -> Planted:
    """Layer 0's MLP copies the embedding's code into the first block; a late MLP reads the code from either.

    Neither source is needed while the other is there.
    """
    model, permutation = blank(seed), torch.randperm(TOKENS)
    lookup_mlp(model.model.layers[0].mlp, CODE, CODE, torch.arange(TOKENS), 0.1)
    lookup_mlp(model.model.layers[5].mlp, CODE, ANSWER, permutation, GAIN, leak=0.02)
    read_answer(model, 1 - NOISE)
    return Planted("backup", model, _chained(permutation), frozenset())


@torch.no_grad()
def norm_trap(seed: int) -> Planted:
    """A token is three digits; an MLP in each band looks one of them up in the embedding.

    The embedding is a long vector of small mass, everything else short vectors of large mass: mass says the opposite
    of the effect, and the share of the mix that a family makes up says it right. Digits are noisy to different
    degrees, so effects are graded; shares are graded likewise.
    """
    model = blank(seed, vocabulary=DIGITS**3, junk=0.005)
    noise, shares, live = (0.05, 0.3, 0.6), (0.3, 0.2, 0.12), (1, 3, 5)
    tokens = torch.arange(DIGITS**3)
    digits = torch.stack([tokens // DIGITS**k % DIGITS for k in range(3)])
    for k in range(3):
        model.model.embed_tokens.weight[tokens, CODE.start + DIGITS * k + digits[k]] = 300.0
    successors = [torch.randperm(DIGITS) for _ in range(3)]
    for k, layer in enumerate(live):
        source, target = (slice(part.start + DIGITS * k, part.stop) for part in (CODE, ANSWER))
        lookup_mlp(model.model.layers[layer].mlp, source, target, successors[k], 0.04)
        right = 1 - noise[k] + noise[k] / DIGITS
        gap = math.log(right * DIGITS / noise[k])
        model.lm_head.weight[tokens, ANSWER.start + DIGITS * k + digits[k]] = gap * math.sqrt(3) / LENGTH
    for read in model.model.plan.reads[1:-1]:
        size, small = read.num_sources, shares[read.layer * 3 // LAYERS]
        if size > 1 and read.sublayer == "mlp":
            set_mix(model, read.index, [small / size] + [(1 - small / size) / (size - 1)] * (size - 1))
    # The readout sees the answer and not the long embedding; the final read is in no cell.
    model.model.final_res_bias.copy_(torch.tensor([1e-6, 1.0, 1.0, 1.0]).log())
    count, length = 2 * (PILOT + CONFIRM), WINDOW + 1
    sequences = torch.randint(DIGITS, (3, count, length))
    for k in range(3):
        kept = torch.rand(count, length) >= noise[k]
        for t in range(1, length):
            sequences[k, :, t] = torch.where(kept[:, t], successors[k][sequences[k, :, t - 1]], sequences[k, :, t])
    rows = sum(sequences[k] * DIGITS**k for k in range(3))
    causal = frozenset(_masked("embedding", "mlp", layer) for layer in live)
    assert isinstance(rows, Tensor)
    return Planted("norm_trap", model, documents(rows, PILOT), causal)
