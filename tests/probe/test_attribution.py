"""Gradient attribution against finite differences and against a small exact dose, and its rank among exact effects."""

import dataclasses

import pytest
import torch
from scipy import stats

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.data import ProbeWindows
from attnres.depth.families import family_indices, grid
from attnres.errors import Stopped
from attnres.interventions.grid import Grid
from attnres.interventions.ids import Intervention, parse
from attnres.probe.attribution import attribution, run_attribution
from attnres.probe.execution import Execution
from attnres.probe.passes import run_clean, run_edited
from attnres.probe.runner import measure
from attnres.probe.subjects import Subject
from attnres.statistics.design import Design
from attnres.statistics.rank_correlation import against_exact
from tests.statistics.probed_tables import QUICK, SLICES, measured


def model(queries: float) -> Qwen3AttnResForCausalLM:
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attnres_num_blocks=3, attnres_bias="sources",
    )  # fmt: skip
    made = Qwen3AttnResForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("_res_bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif "_res_proj" in name:
                parameter.add_(queries * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(6.0)
    return made


def tokens(count: int = 4, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, 48, (count, length + 1), generator=torch.Generator().manual_seed(2))
    return drawn[:, :-1], drawn[:, 1:]


def exact(made: Qwen3AttnResForCausalLM, spec: str) -> torch.Tensor:
    """dNLL `[B]` of an intervention, fp64."""
    ids, labels = tokens()
    layers = range(made.config.num_hidden_layers)
    with torch.no_grad():
        clean = run_clean(made, ids, labels, layers)
        edited = torch.log_softmax(run_edited(made, clean, parse(spec)), -1)
        reference = torch.log_softmax(clean.logits, -1)
    return (reference - edited).gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)


@pytest.mark.parametrize("family", ["embedding", "current", "recent", "older"])
def test_attribution_is_the_derivative_of_scaling(family):
    """With weights that are one for all tokens, `-(1 - a_F)` times the estimate is d dNLL / d x of `scale:x` at 1."""
    made = model(queries=0.0)
    read = made.model.plan.reads[11]
    cell = Intervention("mask", family, None, f"read{read.index}").cell(made.model.plan)
    estimate = attribution(made, *tokens(), [cell])[cell]
    bias = made.model.layers[5].mlp_res_bias
    mass = torch.softmax(bias.detach(), -1)[list(family_indices(family, read.num_sources))].sum()
    step = 1e-4
    slope = (exact(made, f"scale:{1 + step}:{family}@read11") - exact(made, f"scale:{1 - step}:{family}@read11")) / (
        2 * step
    )
    torch.testing.assert_close(-(1 - mass) * estimate, slope, rtol=1e-5, atol=1e-9)
    assert slope.abs().min() > 1e-6


def test_attribution_ranks_cells_like_a_small_dose_of_ablation():
    """Where the edit is small the estimate holds for content-dependent weights and whole bands too."""
    made = model(queries=0.01)
    cells = [cell for cell in grid(made.model.plan) if cell.eligible]
    estimated = attribution(made, *tokens(), cells)
    pairs = []
    for cell in cells:
        intervention = f"scale:0.98:{cell.family}@{cell.sublayer}.{cell.band}"
        pairs.append((float(estimated[cell].mean()), float(exact(made, intervention).mean())))
    rho = stats.spearmanr(*zip(*pairs, strict=True))[0]
    print(f"\n{len(cells)} cells: Spearman {rho:.3f} of the estimate and the exact effect of scale:0.98")
    assert rho > 0.8


def test_estimates_by_window_are_kept_batch_by_batch_and_are_none_without_a_mask():
    made = model(queries=0.01).float()
    subject = Subject("attnres", made)
    ids, labels = tokens(5)
    windows = {"confirm": ProbeWindows(ids, labels, torch.arange(5) * 3, torch.arange(5) * 2)}
    specs = [parse("mask:embedding@mlp.late"), parse("mean@attn.early"), parse("mask:current@attn.mid")]
    grid, execution = Grid.of(specs, {"attnres": subject.plan}), Execution(windows, batch_size=2)
    table = measure([subject], grid, execution, estimated=["attnres"]).attribution
    estimates = table.set_index(["cell", "window"])["estimate"]
    assert len(estimates) == 10 and set(table["split"]) == {"confirm"}
    cell = specs[0].cell(made.model.plan)
    whole = attribution(made, ids, labels, [cell])[cell]
    identity = dict(zip(windows["confirm"].window_ids.tolist(), whole.tolist(), strict=True))
    assert estimates[specs[0].id].to_dict() == pytest.approx(identity, rel=1e-4)
    asked = Execution(windows, batch_size=2, stop=lambda: "SIGTERM")
    again = dataclasses.replace(asked, pieces=execution.pieces)
    # What is kept is not estimated again, so that nothing can be stopped.
    run_attribution(subject, {specs[0].id: cell}, again.batches[0], again)
    with pytest.raises(Stopped, match="SIGTERM"):
        run_attribution(subject, {specs[0].id: cell}, asked.batches[0], asked)
    none = Grid.of([parse("mean@attn.early")], {"attnres": subject.plan})
    assert measure([subject], none, Execution(windows, 2), estimated=["attnres"]).attribution.empty


def test_against_exact_ranks_cells_by_document():
    effects, *others = measured({("attnres", piece): 0.1 * place for place, piece in enumerate(SLICES)})
    design = Design.of(effects, *others)
    mine = effects[effects["model"] == "attnres"]
    estimates = mine[["model", "cell", "window", "document", "split"]].assign(estimate=2 - mine["dnll"] ** 3)
    judged = against_exact(estimates, design, QUICK)
    rank = judged["attribution_rank"]
    assert rank["rho"] == pytest.approx(-1) and rank["rho_lo"] == pytest.approx(-1) and rank["documents"] == 24
    confirm = mine[mine["split"] == "confirm"].groupby("cell", sort=False)["dnll"].mean()
    assert {row["cell"]: row["dnll"] for row in judged["attribution"]} == pytest.approx(confirm.to_dict())
    one = against_exact(estimates[estimates["cell"] == estimates["cell"].iloc[0]], design, QUICK)
    assert one["attribution_rank"]["rho"] is None
    with pytest.raises(ValueError, match="different documents"):
        against_exact(estimates[estimates["document"] != 20], design, QUICK)
