"""Parts of a probe: killed, damaged, shared and packed runs give the tables of one undisturbed run."""

import os
import signal
from dataclasses import replace

import pandas as pd
import pytest
import torch

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.data import ProbeWindows
from attnres.errors import ConfigError, StorageError
from attnres.files import provenance
from attnres.files.run_folder import LOCK
from attnres.files.whole_files import locked
from attnres.interventions.config import GridConfig
from attnres.interventions.donors import donors
from attnres.interventions.grid import candidates, whole_grid
from attnres.interventions.ids import parse
from attnres.probe import runner
from attnres.probe.passes import Subject
from attnres.probe.pieces import Parts
from attnres.probe.run import _only_probe_in
from attnres.probe.runner import Execution, Ranks, eligibility_table, pilot_of, run_cells, run_pilot, tables_of
from attnres.processes.signals import StopSignals

SPECS = [parse(text) for text in ("mask:embedding@mlp.late", "mask:current@attn.layer2", "matched:embedding@mlp.late",
                                  "mean@read4", "resample@mlp.mid", "values:embedding@mlp.late")]  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    config = Qwen3AttnResConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, attnres_num_blocks=2,
    )  # fmt: skip
    model = Qwen3AttnResForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Subject("attnres", model)


def draw(count: int, first: int) -> ProbeWindows:
    tokens = torch.randint(0, 32, (count, 7), generator=torch.Generator().manual_seed(first))
    order = torch.arange(count) + first
    return ProbeWindows(tokens[:, :-1], tokens[:, 1:], order * 100, order // 2)


WINDOWS = {"pilot": draw(5, 10), "confirm": draw(6, 50)}


def execution(parts: Parts, **changes) -> Execution:
    return Execution(WINDOWS, batch_size=2, seed=3, parts=parts, **changes)


def walk(subject: Subject, execution: Execution) -> list[bytes]:
    """Measure what is missing, and the tables as bytes."""
    assert run_pilot(subject, SPECS, execution)
    assert run_cells(subject, SPECS, pilot_of(subject, execution), execution)
    return as_bytes(subject, execution)


def as_bytes(subject: Subject, execution: Execution) -> list[bytes]:
    tables = tables_of(subject, SPECS, execution)
    return [table.to_parquet(index=False) for table in (tables.effects, tables.mass, tables.routing, tables.clean)]


@pytest.fixture(scope="module")
def undisturbed(subject) -> list[bytes]:
    return walk(subject, execution(Parts()))


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Ids of the cells that are measured, as often as they are; each becomes a part at once."""
    monkeypatch.setattr(runner, "_SECONDS_BETWEEN_PARTS", -1.0)
    seen, original = [], runner.run_edited

    def run_edited(model, clean, spec, materials):
        seen.append(spec.id)
        return original(model, clean, spec, materials)

    monkeypatch.setattr(runner, "run_edited", run_edited)
    return seen


TOTAL = len(SPECS) * 6


@pytest.mark.parametrize("after", [1, 9, TOTAL])
def test_killed_run_resumes_without_measuring_again(subject, undisturbed, measured, tmp_path, after):
    done = 0

    def die(count: int) -> None:
        nonlocal done
        done += count
        if done >= after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            walk(subject, execution(Parts(tmp_path), progress=die))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # The cell that was finished last may have been on its way to the disk.
    left = sum(table["cell"].nunique() for table in map(pd.read_parquet, tmp_path.glob("*.effects.*")))
    assert after - 1 <= left <= after
    assert walk(subject, execution(Parts(tmp_path))) == undisturbed
    assert len(measured) == TOTAL - left
    assert walk(subject, execution(Parts(tmp_path))) == undisturbed
    assert len(measured) == TOTAL - left


def test_damaged_part_is_measured_again(subject, undisturbed, measured, tmp_path, caplog):
    walk(subject, execution(Parts(tmp_path)))
    for kind in ("effects", "mass", "clean"):
        path = sorted(tmp_path.glob(f"*.{kind}.*"))[1]
        whole = path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    assert walk(subject, execution(Parts(tmp_path))) == undisturbed
    assert "sha256 differs" in caplog.text
    assert len(measured) == TOTAL + 1


def test_part_that_vanishes_before_the_tables_is_an_error_with_a_remedy(subject, tmp_path):
    done = execution(Parts(tmp_path))
    walk(subject, done)
    sorted(tmp_path.glob("*.effects.*"))[0].unlink()
    done.parts.refresh()
    with pytest.raises(StorageError, match="run the same command"):
        as_bytes(subject, done)


def test_stopped_run_keeps_the_cells_it_finished(subject, undisturbed, measured, tmp_path):
    parts = Parts(tmp_path)
    walking = execution(parts, stop=lambda: len(measured) >= 4)
    assert run_pilot(subject, SPECS, walking)
    assert not run_cells(subject, SPECS, pilot_of(subject, walking), walking)
    assert len(measured) == 4
    # Other processes see it too, until the probe is started again.
    assert execution(Parts(tmp_path)).stopping()
    parts.clear()
    assert walk(subject, execution(Parts(tmp_path))) == undisturbed
    assert len(measured) == TOTAL


def test_shared_run_gives_the_tables_of_one_process(subject, undisturbed, measured, tmp_path):
    ranks = []
    for rank in range(2):
        ranks.append(Ranks())
        ranks[rank].rank, ranks[rank].size = rank, 2
    walks = [execution(Parts(tmp_path), ranks=each) for each in ranks]
    for phase in (run_pilot, lambda s, specs, w: run_cells(s, specs, pilot_of(s, w), w)):
        for each in walks:
            each.parts.refresh()
            assert phase(subject, SPECS, each)
        for each in walks:
            each.parts.refresh()
    assert len(measured) == TOTAL
    assert as_bytes(subject, walks[0]) == undisturbed


def test_cells_that_share_a_pass_give_the_same_effects(subject, undisturbed):
    packed = execution(Parts(), cells_per_pass=3)
    walk(subject, packed)
    keys = ["cell", "split", "window"]
    one, other = (
        tables_of(subject, SPECS, each).effects.set_index(keys)[["dnll", "kl", "flips"]]
        for each in (packed, _walked(subject))
    )
    pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=1e-3, atol=2e-6)


def _walked(subject: Subject) -> Execution:
    done = execution(Parts())
    walk(subject, done)
    return done


def test_donors_are_other_documents_and_depend_on_the_window_alone():
    pilot = WINDOWS["pilot"]
    chosen = donors(pilot, "pilot", pilot, 3)
    assert bool((pilot.document_ids[chosen] != pilot.document_ids).all())
    last = ProbeWindows(*(getattr(pilot, name)[-2:] for name in ("input_ids", "labels", "window_ids", "document_ids")))
    assert torch.equal(donors(last, "pilot", pilot, 3), chosen[-2:])
    assert not torch.equal(
        donors(WINDOWS["confirm"], "confirm", pilot, 3), donors(WINDOWS["confirm"], "confirm", pilot, 4)
    )


def test_what_a_text_or_a_model_makes_impossible_is_an_excluded_row(subject):
    specs = [*SPECS, parse("matched:current@mlp.late")]
    one = ProbeWindows(
        *(getattr(WINDOWS["pilot"], name)[:1] for name in ("input_ids", "labels", "window_ids", "document_ids"))
    )
    walking = replace(execution(Parts()), windows={"pilot": one})
    run_pilot(subject, specs, walking)
    pilot = pilot_of(subject, walking)
    pilot.mass["current", "mlp", "late"] = 0.625
    table = eligibility_table(subject, specs, pilot, one).set_index("cell")
    assert "1 document(s)" in table.loc["resample@mlp.mid", "reason"]
    assert "1 document(s)" in table.loc["values:embedding@mlp.late", "reason"]
    assert "holds 0.62 of the mass" in table.loc["matched:current@mlp.late", "reason"]
    assert table.loc["matched:embedding@mlp.late", "eligible"] and table.loc["mean@read4", "eligible"]
    without = eligibility_table(subject, specs).set_index("cell")
    assert set(without.index[without["eligible"]]) == {"mask:embedding@mlp.late", "mask:current@attn.layer2"}


def test_source_digest_sees_code_that_was_not_committed(tmp_path, monkeypatch):
    for room in ("files", "probe"):
        (tmp_path / room).mkdir()
    for name in ("files/provenance.py", "probe/runner.py", "probe/notes.md"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "files/provenance.py"))
    before = provenance.source_digest()
    (tmp_path / "probe/notes.md").write_text("2")
    assert provenance.source_digest() == before
    (tmp_path / "probe/runner.py").write_text("2")
    assert provenance.source_digest() != before


def test_second_probe_in_a_folder_is_refused(tmp_path):
    with (
        locked(tmp_path / LOCK, "taken"),
        pytest.raises(ConfigError, match="in use by another probe"),
        _only_probe_in(tmp_path, Ranks()),
    ):
        pass
    with _only_probe_in(tmp_path, Ranks()):
        pass


def test_signals_become_a_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals("finishing", "", can_save=True) as signals:
        assert not signals.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked()
    assert signal.getsignal(signal.SIGTERM) is before


def test_candidates_come_once_each_and_controls_stand_beside_the_motifs(subject):
    plan = subject.plan
    default = candidates(GridConfig(), plan)
    assert len(default) == 28
    assert {spec.id for spec in default if spec.kind == "matched"} == {
        "matched:embedding@mlp.early", "matched:current@attn.early", "matched:current@mlp.early",
        "matched:older@attn.late",
    }  # fmt: skip
    part = GridConfig(families="older", bands="late", interventions="mask,scale:0.5,mean,schedule", controls="all")
    assert [spec.id for spec in candidates(part, plan)] == [
        "mask:older@attn.late", "mask:older@mlp.late", "scale:0.5:older@attn.late", "scale:0.5:older@mlp.late",
        "mean@attn.late", "mean@mlp.late", "schedule:10@attn.late", "schedule:10@mlp.late",
        "matched:older@attn.late", "matched:older@mlp.late",
    ]  # fmt: skip
    assert len(whole_grid(part, plan)) == 24 + 24 + 6 + 6 + 24
    layers = GridConfig(places="layers", cells="mask:older@attn.layer3,mask:older@attn.layer3+mask:recent@mlp.layer3")
    assert len(candidates(layers, plan)) == 4 * 2 * 4 + 1
    assert len(candidates(GridConfig(places="reads", interventions="uniform"), plan)) == 9
    assert len(candidates(GridConfig(places="reads", sublayers="mlp", interventions="uniform"), plan)) == 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"interventions": "masc"}, "did you mean 'mask'"),
        ({"interventions": "scale"}, "expected kind"),
        ({"interventions": "mask:older"}, "expected kind"),
        ({"interventions": ""}, "probe.interventions"),
        ({"cells": "mask:older@attn.first"}, "band"),
        ({"places": "layers", "bands": "early"}, "probe.bands"),
        ({"cells_per_pass": 0}, "probe.cells_per_pass"),
    ],
)
def test_grid_config_refuses(settings, told):
    with pytest.raises(ConfigError, match=told):
        GridConfig(**settings)
