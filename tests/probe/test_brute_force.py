"""Every intervention against a recomputation in fp64: no state, no blocks, no prefix, no edits of the model."""

import math

import pytest
import torch
from torch import Tensor

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.data import ProbeWindows
from attnres.depth.families import FAMILIES, SUBLAYERS, Cell, grid
from attnres.depth.plan import CONVENTIONS
from attnres.interventions.donors import donors, noise
from attnres.interventions.edits import edit
from attnres.interventions.ids import KINDS, Intervention, parse
from attnres.ops import reference
from attnres.probe.subjects import Subject
from tests.probe.in_memory import measure_cells

LAYERS, LENGTH, SEED = 6, 8, 5
MODEL = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, attnres_num_blocks=3)  # fmt: skip


def build(convention: str, eps: float = 1e-6) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(**MODEL, attnres_sources=convention, rms_norm_eps=eps)
    model = Qwen3AttnResForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.5 * torch.randn_like(parameter)) if "_res_" in name else None
            parameter.mul_(6.0) if parameter.ndim == 2 and "_res_" not in name else None
    return model


def draw(count: int, first: int) -> ProbeWindows:
    tokens = torch.randint(0, 40, (count, LENGTH + 1), generator=torch.Generator().manual_seed(first))
    order = torch.arange(count) + first
    return ProbeWindows(tokens[:, :-1], tokens[:, 1:], order * 100, order // 2)


def rms_norm(x: Tensor, norm) -> Tensor:
    """In fp64; the library's own module computes in fp32 whatever it is given."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def recompute(model, ids, change=lambda read, weights, vectors: (weights, vectors)):
    """Log probabilities, and at every read its weights and vectors, from sublayers and the plan's own sources."""
    decoder, outputs, seen = model.model, [], []
    embeddings = decoder.embed_tokens(ids)
    context = decoder.context(embeddings)

    def of(source) -> Tensor:
        return sum(outputs[source.start : source.stop], embeddings * source.embedding)

    for read in decoder.plan.reads:
        layer = decoder.layers[min(read.layer, LAYERS - 1)]
        norms = {"attn": layer.input_layernorm, "mlp": layer.post_attention_layernorm, "final": decoder.norm}
        vectors = [of(source) for source in read.sources]
        _, weights = reference.depth_mix(vectors, *context.reads[read.index](), eps=model.config.rms_norm_eps)
        seen.append((weights, vectors))
        weights, vectors = change(read, weights, vectors)
        mix = sum(weights[..., i : i + 1] * vector for i, vector in enumerate(vectors))
        x = rms_norm(mix, norms[read.sublayer])
        if read.sublayer == "attn":
            mask, rotary = context.attention_mask, context.position_embeddings
            outputs.append(layer.self_attn(hidden_states=x, position_embeddings=rotary, attention_mask=mask)[0])
        elif read.sublayer == "mlp":
            outputs.append(layer.mlp(x))
    if not decoder.plan.has_final_read:
        x = rms_norm(embeddings + sum(outputs), decoder.norm)
    return torch.log_softmax(model.lm_head(x), -1), seen


def members(family: str, num_sources: int) -> list[int]:
    last = num_sources - 1
    return {"embedding": [0], "current": [last], "recent": [last - 1], "older": list(range(1, last - 1))}[family]


class Recomputed:
    """What an intervention means, said a second time: per token and source, in loops."""

    def __init__(self, model, pilot: ProbeWindows, drawn: ProbeWindows) -> None:
        self.pilot_reads = recompute(model, pilot.input_ids)[1]
        self.donor = donors(drawn, "confirm", pilot, SEED)
        self.drawn = drawn
        self.own_reads = recompute(model, drawn.input_ids)[1]

    def change(self, item: Intervention, cell: Cell):
        def at(read, weights, vectors):
            if read.index not in cell.reads or item.kind == "noop":
                return weights, vectors
            size, weights = len(vectors), weights.clone()
            others_weights, others_vectors = self.pilot_reads[read.index]
            if item.family is not None:
                inside = members(item.family, size)
            if item.kind in ("mask", "scale"):
                factor = 0.0 if item.kind == "mask" else item.argument
                weights[..., inside] *= factor
                weights /= weights.sum(-1, keepdim=True)
            elif item.kind == "keep":
                weights[..., [i for i in range(size) if i not in inside]] = 0.0
                weights /= weights.sum(-1, keepdim=True)
            elif item.kind == "rescue":
                vectors = [self.own_reads[read.index][1][i] if i in inside else v for i, v in enumerate(vectors)]
            elif item.kind == "values":
                vectors = [others_vectors[i][self.donor] if i in inside else v for i, v in enumerate(vectors)]
            elif item.kind == "matched":
                weights = self.matched(read.index, weights, inside)
            elif item.kind == "resample":
                weights = others_weights[self.donor]
            elif item.kind == "mean":
                weights = others_weights.mean((0, 1)).expand_as(weights)
            elif item.kind == "uniform":
                weights = torch.full_like(weights, 1 / size)
            elif item.kind == "schedule":
                newest = math.exp(item.argument) / (math.exp(item.argument) + size - 1)
                weights[..., :-1], weights[..., -1] = (1 - newest) / (size - 1), newest
            return weights, vectors

        return at

    def matched(self, read: int, weights: Tensor, inside: list[int]) -> Tensor:
        drawn = noise(self.drawn.window_ids.tolist(), "confirm", read, LENGTH, weights.shape[-1], SEED)
        result = weights.clone()
        for row in range(weights.shape[0]):
            for token in range(LENGTH):
                held = float(weights[row, token, inside].sum())
                left = min(held, 0.9 * (1 - held))
                outside = [i for i in range(weights.shape[-1]) if i not in inside]
                for i in sorted(outside, key=lambda i: float(drawn[row, token, i])):
                    taken = min(left, float(weights[row, token, i]))
                    result[row, token, i] -= taken
                    left -= taken
        return result / result.sum(-1, keepdim=True)


def everything(plan) -> list[Intervention]:
    """Every kind, at bands and at single reads, wherever it can be judged."""
    family = ["mask:{}", "scale:0:{}", "scale:0.3:{}", "scale:4:{}", "keep:{}", "values:{}", "rescue:{}", "matched:{}"]
    texts = [
        f"{what.format(name)}@{place}" for what in family for name in FAMILIES for place in ("attn.late", "mlp.mid")
    ]
    whole = ("mean", "uniform", "schedule:2", "resample", "noop")
    texts += [f"{what}@{place}" for what in whole for place in ("attn.early", "mlp.layer3", "attn.block2", "read12")]
    return [item for item in map(parse, texts) if item.cell(plan).eligible]


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_every_intervention_equals_its_recomputation(convention):
    model, pilot, drawn = build(convention), draw(4, 10), draw(5, 50)
    plan, again = model.model.plan, Recomputed(model, pilot, drawn)
    items = [item for item in everything(plan) if item.kind != "matched" or available(again, item, plan)]
    assert {item.kind for item in items} == set(KINDS)
    tables = measure_cells(Subject("attnres", model), items, {"pilot": pilot, "confirm": drawn}, 4, seed=SEED)
    clean, _ = recompute(model, drawn.input_ids)
    effects = tables.effects[tables.effects["split"] == "confirm"]
    for item in items:
        edited, _ = recompute(model, drawn.input_ids, again.change(item, item.cell(plan)))
        rows = effects[effects["cell"] == item.id].sort_values("window")
        labels = drawn.labels.unsqueeze(-1)
        wanted = {
            "dnll": (clean - edited).gather(-1, labels).squeeze(-1).mean(-1),
            "kl": (clean.exp() * (clean - edited)).sum(-1).mean(-1),
            "flips": (clean.argmax(-1) != edited.argmax(-1)).double().mean(-1),
        }
        for name, values in wanted.items():
            # The measurement itself is in fp32.
            measured = torch.tensor(rows[name].to_numpy()).double()
            torch.testing.assert_close(measured, values, rtol=1e-4, atol=3e-6, msg=lambda m, i=item.id: f"{i}: {m}")
        if item.kind in ("noop", "rescue"):  # behind nothing, a rescue puts back what is there
            assert bool((rows[["dnll", "kl", "flips"]] == 0).all(axis=None))
        else:
            assert float(wanted["kl"].max()) > 1e-6, item.id


def available(again: Recomputed, item: Intervention, plan) -> bool:
    """Whether the family holds at most half of the mass, on average over reads and pilot documents."""
    held = [
        again.pilot_reads[j][0][..., members(item.family, plan.reads[j].num_sources)].sum(-1).mean()
        for j in item.cell(plan).reads
    ]
    return float(torch.stack(held).mean()) <= 0.5


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_compositions_equal_their_recomputation(convention):
    model, pilot, drawn = build(convention), draw(4, 10), draw(3, 50)
    plan, again = model.model.plan, Recomputed(model, pilot, drawn)
    texts = ("mask:embedding@mlp.mid+scale:3:current@mlp.mid", "uniform@attn.layer4+mask:embedding@attn.late",
             "values:embedding@mlp.mid+resample@mlp.layer3+mask:recent@read8",
             "mask:embedding@mlp.mid+rescue:current@mlp.late",
             "keep:embedding@mlp.mid+rescue:current@attn.late")  # fmt: skip
    specs = [parse(text) for text in texts]
    drawn_from = {"pilot": pilot, "confirm": drawn}
    tables = measure_cells(Subject("attnres", model), specs, drawn_from, 3, excluding=False, seed=SEED)
    clean, _ = recompute(model, drawn.input_ids)
    for spec in specs:
        changes = [again.change(member, member.cell(plan)) for member in spec.members]

        def change(read, weights, vectors, changes=changes):
            for one in changes:
                weights, vectors = one(read, weights, vectors)
            return weights, vectors

        edited, _ = recompute(model, drawn.input_ids, change)
        rows = tables.effects[(tables.effects["cell"] == spec.id) & (tables.effects["split"] == "confirm")]
        kl = (clean.exp() * (clean - edited)).sum(-1).mean(-1)
        measured = torch.tensor(rows.sort_values("window")["kl"].to_numpy()).double()
        torch.testing.assert_close(measured, kl, rtol=1e-4, atol=3e-6)
        assert float(kl.min()) > 1e-5


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_zero_is_mask_without_eps_and_not_with_a_large_one(convention):
    """Zeroing a family's part of the mix, not renormalised, equals masking it: RMSNorm follows."""
    for eps, same in ((0.0, True), (1e-1, False)):
        model, drawn = build(convention, eps), draw(3, 50)
        for cell in (cell for cell in grid(model.model.plan) if cell.eligible and cell.band == "mid"):
            mask = Intervention("mask", cell.family, cell.sublayer, cell.band)

            def zero(read, weights, vectors, cell=cell):
                if read.index in cell.reads:
                    inside = members(cell.family, len(vectors))
                    vectors = [vector * (i not in inside) for i, vector in enumerate(vectors)]
                return weights, vectors

            zeroed, _ = recompute(model, drawn.input_ids, zero)
            masked = torch.log_softmax(model(drawn.input_ids, edit=edit(mask, model.model.plan)).logits, -1)
            # Attention's norms of queries and keys, and the final one without a read, are the library's, in fp32.
            assert bool((zeroed - masked).abs().max() < 1e-6) == same, cell


@torch.no_grad()
def test_scale_by_zero_is_bitwise_mask():
    model, drawn = build("block_sum"), draw(4, 50)
    cells = [cell for cell in grid(model.model.plan) if cell.eligible]
    assert {cell.sublayer for cell in cells} == set(SUBLAYERS)
    for cell in cells:
        mask, scale = (
            Intervention(kind, cell.family, cell.sublayer, cell.band, argument)
            for kind, argument in (("mask", None), ("scale", 0.0))
        )
        logits = [model(drawn.input_ids, edit=edit(item, model.model.plan)).logits for item in (mask, scale)]
        assert torch.equal(*logits)
