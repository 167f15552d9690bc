"""Pieces of a probe: killed, damaged, shared, packed and staged runs give the tables of one undisturbed run."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch

from attnres import Qwen3AttnResConfig, Qwen3AttnResForCausalLM
from attnres.data import ProbeWindows
from attnres.errors import ConfigError, Stopped, StorageError
from attnres.files import provenance
from attnres.files.run_folder import LOCK
from attnres.files.whole_files import locked
from attnres.interventions.config import GridConfig
from attnres.interventions.donors import Pilot, donors, unavailable
from attnres.interventions.grid import Grid, candidates, make_grid
from attnres.interventions.ids import parse
from attnres.probe import runner
from attnres.probe.execution import Execution, only_probe_in
from attnres.probe.pieces import Pieces, pieces_folder
from attnres.probe.runner import Measured, everything, measure
from attnres.probe.subjects import Subject
from attnres.processes.ranks import Ranks
from attnres.processes.signals import StopSignals

SPECS = [parse(text) for text in ("mask:embedding@mlp.late", "mask:current@attn.layer2", "matched:embedding@mlp.late",
                                  "mean@read4", "resample@mlp.mid", "values:embedding@mlp.late",
                                  "keep:embedding@mlp.late",
                                  "mask:current@attn.layer1+rescue:embedding@mlp.late")]  # fmt: skip


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


def execution(pieces: Pieces, **changes) -> Execution:
    return Execution(WINDOWS, batch_size=2, seed=3, pieces=pieces, **changes)


def walked(subject: Subject, execution: Execution, specs=SPECS, **how) -> Measured:
    """Measure what is missing."""
    return measure([subject], Grid.of(specs, {subject.name: subject.plan}), execution, **how)


def walk(subject: Subject, execution: Execution) -> list[bytes]:
    """The tables as bytes."""
    tables = walked(subject, execution)
    return [table.to_parquet(index=False) for table in (tables.effects, tables.mass, tables.routing, tables.clean)]


@pytest.fixture(scope="module")
def undisturbed(subject) -> list[bytes]:
    return walk(subject, execution(Pieces()))


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Ids of the cells that are measured, as often as they are; each becomes a piece at once."""
    monkeypatch.setattr(runner, "_SECONDS_BETWEEN_PIECES", -1.0)
    seen, original = [], runner.run_edited

    def run_edited(model, clean, spec, inputs):
        seen.append(spec.id)
        return original(model, clean, spec, inputs)

    monkeypatch.setattr(runner, "run_edited", run_edited)
    return seen


class Progress:
    """A bar that calls `tick` with the number of cells finished."""

    total = 0

    def __init__(self, tick) -> None:
        self.update = tick

    def reset(self, total: int) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass


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
            walk(subject, execution(Pieces(tmp_path), progress=Progress(die)))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # The cell that was finished last may have been on its way to the disk.
    left = sum(table["cell"].nunique() for table in map(pd.read_parquet, tmp_path.glob("*.effects.*")))
    assert after - 1 <= left <= after
    assert walk(subject, execution(Pieces(tmp_path))) == undisturbed
    assert len(measured) == TOTAL - left
    assert walk(subject, execution(Pieces(tmp_path))) == undisturbed
    assert len(measured) == TOTAL - left


def test_damaged_piece_is_measured_again(subject, undisturbed, measured, tmp_path, caplog):
    walk(subject, execution(Pieces(tmp_path)))
    for kind in ("effects", "mass", "clean"):
        path = sorted(tmp_path.glob(f"*.{kind}.*"))[1]
        whole = path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    assert walk(subject, execution(Pieces(tmp_path))) == undisturbed
    assert "sha256 differs" in caplog.text
    assert len(measured) == TOTAL + 1


def test_piece_that_vanishes_before_the_tables_is_an_error_with_a_remedy(subject, tmp_path):
    class Vanishing(Pieces):
        """Loses a piece once the cells are measured: looked at when opened, after the pilot, after the cells."""

        looks = 0

        def refresh(self) -> None:
            self.looks += 1
            if self.looks == 3:
                sorted(tmp_path.glob("*.effects.*"))[0].unlink()
            super().refresh()

    with pytest.raises(StorageError, match="run the same command"):
        walk(subject, execution(Vanishing(tmp_path)))


def test_stopped_run_keeps_the_cells_it_finished(subject, undisturbed, measured, tmp_path):
    pieces = Pieces(tmp_path)
    with pytest.raises(Stopped, match="SIGTERM"):
        walk(subject, execution(pieces, stop=lambda: "SIGTERM" if len(measured) >= 4 else ""))
    assert len(measured) == 4
    # Other processes see it too, until the probe is started again.
    with pytest.raises(Stopped, match="another process"):
        walk(subject, execution(Pieces(tmp_path)))
    assert len(measured) == 4
    pieces.remove_leftovers()
    assert walk(subject, execution(Pieces(tmp_path))) == undisturbed
    assert len(measured) == TOTAL


class Twin(Ranks):
    """One of two processes, played by a thread that waits for the other one where processes agree."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self._barrier = rank, 2, barrier

    def agree(self, error=None) -> None:
        self._barrier.wait(timeout=60)
        super().agree(error)


def test_shared_run_gives_the_tables_of_one_process(subject, undisturbed, measured, tmp_path):
    barrier = threading.Barrier(2)
    twins = [execution(Pieces(tmp_path), ranks=Twin(rank, barrier)) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda each: walk(subject, each), twins)) == [undisturbed] * 2
    assert len(measured) == TOTAL


def test_cells_that_share_a_pass_give_the_same_effects(subject):
    keys = ["cell", "split", "window"]
    packed, alone = (
        walked(subject, execution(Pieces(), cells_per_pass=size)).effects.set_index(keys)[["dnll", "kl", "flips"]]
        for size in (3, None)
    )
    pd.testing.assert_frame_equal(packed, alone, check_exact=False, rtol=1e-3, atol=2e-6)


STAGES = ({"pilot": range(5), "confirm": range(2)}, {"confirm": range(2, 4)}, {"confirm": range(4, 6)})


def test_stages_measure_what_is_still_needed_and_resume(subject, measured, tmp_path):
    whole = walked(subject, execution(Pieces())).effects
    asked = []

    def what_next(grid: Grid, splits: set[str], so_far: Measured | None) -> dict[str, list[str]]:
        """All cells in the first stage, two in the second, nothing in the third."""
        if so_far is None:
            assert splits == {"pilot", "confirm"}
            return everything(grid, splits, so_far)
        assert splits == {"confirm"}
        asked.append(so_far.effects.groupby("cell", sort=False)["window"].nunique().to_dict())
        return {"attnres": [SPECS[0].id, SPECS[3].id]} if len(asked) % 2 else {}

    def staged() -> Measured:
        return walked(subject, execution(Pieces(tmp_path), stages=STAGES), what_next=what_next)

    del measured[:]
    tables = staged()
    assert asked == [
        {spec.id: 7 for spec in SPECS},
        {spec.id: 9 if spec in (SPECS[0], SPECS[3]) else 7 for spec in SPECS},
    ]
    # Four batches of the first stage, one of the second, none of the third.
    assert len(measured) == 4 * len(SPECS) + 2
    keys = ["cell", "split", "window"]
    subset = whole.set_index(keys).loc[pd.MultiIndex.from_frame(tables.effects[keys])]
    assert dict(tables.effects.groupby(["split", "window"])["look"].first().groupby("split").max()) == {
        "pilot": 1, "confirm": 2
    }  # fmt: skip
    pd.testing.assert_frame_equal(tables.effects.set_index(keys).drop(columns="look"), subset, check_exact=True)
    assert sorted(tables.clean["window"]) == sorted(WINDOWS["confirm"].window_ids[:4].tolist())
    pd.testing.assert_frame_equal(staged().effects, tables.effects, check_exact=True)
    assert len(measured) == 4 * len(SPECS) + 2


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
    control = parse("matched:current@mlp.late")
    one = ProbeWindows(
        *(getattr(WINDOWS["pilot"], name)[:1] for name in ("input_ids", "labels", "window_ids", "document_ids"))
    )
    tables = walked(subject, Execution({"pilot": one}, 2), [*SPECS, control])
    table = tables.eligibility.set_index("cell")
    assert "1 document(s)" in table.loc["resample@mlp.mid", "reason"]
    assert "1 document(s)" in table.loc["values:embedding@mlp.late", "reason"]
    assert table.loc["matched:embedding@mlp.late", "eligible"] and table.loc["mean@read4", "eligible"]
    assert set(tables.effects["cell"]) == set(table.index[table["eligible"]])
    heavy = Pilot({}, {("current", "mlp", "late"): 0.625})
    assert "holds 0.62 of the mass" in unavailable(control, subject.plan, heavy, one)
    without = walked(subject, Execution({"confirm": one}, 2)).eligibility.set_index("cell")
    assert set(without.index[without["eligible"]]) == {
            "mask:embedding@mlp.late", "mask:current@attn.layer2", "keep:embedding@mlp.late",
            "mask:current@attn.layer1+rescue:embedding@mlp.late",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("report/words.py", True),
        ("statistics/claims.py", True),
        ("probe/README.md", True),
        ("ops/reference.py", False),
        ("probe/runner.py", False),
        ("data/windows/windows.py", False),
    ],
)
def test_pieces_depend_on_the_code_that_measures_committed_or_not(tmp_path, monkeypatch, name, same):
    package = tmp_path / "attnres"
    for file in ("files/provenance.py", name):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(package / "files/provenance.py"))
    key = lambda: pieces_folder(Path("probe"), GridConfig(), {"data": "abc"}, "cpu")  # noqa: E731
    before = key()
    (package / name).write_text("2")
    assert (key() == before) == same


def test_pieces_of_another_version_are_named_in_one_line(tmp_path, caplog):
    Pieces(tmp_path / "other").remove_leftovers()
    assert caplog.messages == []
    Pieces(tmp_path / "mine").remove_leftovers()
    (warning,) = caplog.messages
    assert "pieces of another version or configuration are measured anew" in warning


def test_second_probe_in_a_folder_is_refused(tmp_path):
    with (
        locked(tmp_path / LOCK, "taken"),
        pytest.raises(ConfigError, match="in use by another probe"),
        only_probe_in(tmp_path, Ranks()),
    ):
        pass
    with only_probe_in(tmp_path, Ranks()):
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
    assert len(default) == 32
    motifs = {"embedding@mlp.early", "current@attn.early", "current@mlp.early", "older@attn.late"}
    for kind in ("matched", "keep"):
        assert {spec.id for spec in default if spec.kind == kind} == {f"{kind}:{motif}" for motif in motifs}
    assert candidates(GridConfig(sufficiency="none"), plan) == default[:28]
    assert not [spec for spec in candidates(GridConfig(controls="none"), plan) if spec.kind == "keep"]
    assert len(candidates(GridConfig(controls="all", sufficiency="all"), plan)) == 24 * 3
    rescued = candidates(GridConfig(cells="mask:older@attn.layer2+rescue:recent@mlp.late"), plan)
    assert [spec.id for spec in rescued[32:]] == [
        "mask:older@attn.layer2", "mask:older@attn.layer2+rescue:recent@mlp.late",
    ]  # fmt: skip
    part = GridConfig(families="older", bands="late", interventions="mask,scale:0.5,mean,schedule", controls="all",
                      sufficiency="none")  # fmt: skip
    assert [spec.id for spec in candidates(part, plan)] == [
        "mask:older@attn.late", "mask:older@mlp.late", "scale:0.5:older@attn.late", "scale:0.5:older@mlp.late",
        "mean@attn.late", "mean@mlp.late", "schedule:10@attn.late", "schedule:10@mlp.late",
        "matched:older@attn.late", "matched:older@mlp.late",
    ]  # fmt: skip
    assert make_grid(part, {"attnres": plan}).whole == 24 + 24 + 6 + 6 + 24
    layers = GridConfig(places="layers", cells="mask:older@attn.layer3,mask:older@attn.layer3+mask:recent@mlp.layer3")
    assert len(candidates(layers, plan)) == 4 * 2 * 4 + 1
    assert len(candidates(GridConfig(places="reads", interventions="uniform"), plan)) == 9
    assert len(candidates(GridConfig(places="reads", sublayers="mlp", interventions="uniform"), plan)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interventions": "masc"}, "did you mean 'mask'"),
        ({"interventions": "scale"}, "expected kind"),
        ({"interventions": "mask:older"}, "expected kind"),
        ({"interventions": ""}, "probe.interventions"),
        ({"interventions": "rescue"}, "a rescue is asked for by its id"),
        ({"cells": "rescue:older@mlp.late"}, r"write mask:\.\.\.\+rescue:older@mlp\.late"),
        ({"cells": "mask:older@attn.first"}, "band"),
        ({"places": "layers", "bands": "early"}, "probe.bands"),
        ({"cells_per_pass": 0}, "probe.cells_per_pass"),
    ],
)
def test_grid_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        GridConfig(**changes)
