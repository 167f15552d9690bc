"""The probe walk: checkpoint and baseline -> checks -> grid -> tables -> statistics -> report."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM

from attnres import faults
from attnres.config import build, to_plain
from attnres.data import Corpus, DataConfig, ProbeWindows, prepare, probe_windows
from attnres.errors import AttnResError, CheckpointError, ConfigError, DataError, Stopped
from attnres.files.hashes import content_hash
from attnres.files.provenance import collect, source_digest
from attnres.files.run_folder import LOCK, refuse_links, refuse_unsafe_loading
from attnres.files.whole_files import locked, storage_errors
from attnres.interventions.grid import candidates, whole_grid
from attnres.interventions.ids import Spec
from attnres.model.loading import load_model
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.model.wraps import wrap_qwen3
from attnres.probe.attribution import attribution_table, run_attribution
from attnres.probe.baseline import Located, locate, locate_baseline
from attnres.probe.checks import check_subject, require_passed
from attnres.probe.config import ProbeConfig, config_hash
from attnres.probe.earlier_probes import earlier_looks
from attnres.probe.outputs import TRAINED, Setting, preregistration, register, write_tables
from attnres.probe.passes import Subject
from attnres.probe.pieces import Parts
from attnres.probe.runner import (
    Execution,
    Split,
    Tables,
    eligibility_table,
    pilot_of,
    run_cells,
    run_pilot,
    tables_of,
)
from attnres.probe.subjects import further_subjects, locate_controls
from attnres.probe.token_viewer import write_viewer
from attnres.processes.memory import out_of_memory
from attnres.processes.ranks import Ranks
from attnres.processes.signals import StopSignals
from attnres.report.report import write_report

log = logging.getLogger(__name__)

_PROMISE = "finishing the current cell, then stopping"
_SMALLER = "lower probe.batch_size (the result stays the same)"
_FREE = "free space or choose another runs_dir"

# Windows that the checks look at; more would say the same more slowly.
CHECK_WINDOWS = 4
# Where finished pieces are kept until the tables are written.
PARTS = "parts"


@dataclass(frozen=True)
class Result:
    """Where a probe wrote, and its table of cells."""

    folder: Path
    report: Path
    cells: pd.DataFrame


def verdict_table(cells: pd.DataFrame) -> str:
    """Verdicts for a terminal: a line per cell, a column per model."""
    wide = cells.assign(
        told=[
            row.verdict if row.verdict == "excluded" else f"{row.verdict} {row.dnll:+.4f}" for row in cells.itertuples()
        ]
    ).pivot(index="cell", columns="model", values="told")
    order, models = cells["cell"].drop_duplicates(), cells["model"].drop_duplicates()
    return wide.loc[list(order), list(models)].fillna("-").rename_axis(columns=None).to_string()


def probe(config: ProbeConfig, command: str) -> Result | None:
    """Run a probe and write its folder.

    Returns:
        What was found; None in all but the first of several processes.

    Raises:
        ConfigError: no baseline, settings that do not fit the models, or a folder in use.
        DataError: no windows.
        CheckpointError: a checkpoint that is missing or unreadable.
        NumericsError: a check that fails, or an effect that is not finite.
        StorageError: a folder that cannot be written.
        Stopped: a signal came; what is finished is kept, and the same command resumes.
    """
    refuse_unsafe_loading()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config)
    ranks = Ranks.launch(config.devices, device.type)
    try:
        return _probe(config, command, ranks, ranks.device or device)
    except AttnResError:
        if ranks.rank == 0:
            raise
        # The first process tells it, and ends with its code: a launcher kills it if another one fails before it does.
        return None


def _probe(config: ProbeConfig, command: str, ranks: Ranks, device: torch.device) -> Result | None:
    trained_at = locate(config.ckpt)
    baseline_at = locate_baseline(config.baseline, trained_at)
    controls_at = locate_controls(config, trained_at)
    faults.point("probe.located")
    corpus = _corpus(config, trained_at, ranks)
    _same_text(config, corpus, trained_at)
    windows = _windows(config, corpus)
    trained, vanilla = _load(config, trained_at, baseline_at, corpus, device)
    further = further_subjects(config, controls_at, trained, trained_at, corpus)
    subjects = [*_subjects(config, trained, vanilla), *(one.subject for one in further)]
    digests = [where.digest for where in (trained_at, baseline_at, *controls_at.values())]
    folder = Path(config.runs_dir) / f"probe_{trained_at.run}-{config_hash(config, digests)}"
    chosen, whole = (make(config.probe, trained.model.plan) for make in (candidates, whole_grid))
    with _only_probe_in(folder, ranks), out_of_memory(_SMALLER):
        ids, labels = (tensor[:CHECK_WINDOWS].to(trained.device) for tensor in _checked(windows))
        checks = []
        for subject in subjects:
            eligible = [spec for spec in chosen if spec.cell(subject.plan).eligible]
            checks += check_subject(subject, vanilla, ids, labels, eligible)
        require_passed(checks)
        faults.point("probe.checked")
        if ranks.rank == 0:
            log.info("%d checks passed; writing to %s", len(checks), folder)
        statistics = dataclasses.replace(
            config.statistics, grid_cells=config.statistics.grid_cells or len(set(whole) | set(chosen))
        )
        hashes = {
            "data": corpus.fingerprint,
            "tokenizer": corpus.tokenizer_sha256,
            "checkpoint": trained_at.digest,
            "baseline": baseline_at.digest,
            **{f"control {name}": where.digest for name, where in controls_at.items()},
        }
        provenance = collect(command, {"probe": config.probe.seed, "statistics": statistics.seed}, hashes)
        located = (trained_at, baseline_at)
        setting = Setting(config.probe, statistics, subjects, located, windows, checks, provenance, further)
        code = [provenance["versions"], source_digest(), device.type]
        measured_on = [to_plain(config.probe), hashes, code]
        parts_folder = folder / PARTS / content_hash(measured_on)[:16]
        with storage_errors(folder, _FREE):
            if ranks.rank == 0:
                registered = preregistration(setting, [spec.id for spec in chosen])
                looks = {"earlier_looks": earlier_looks(folder, registered)}
                register(folder / "preregistration.json", registered | looks)
            faults.point("probe.registered")
            tables, eligibility = _run(config, subjects, chosen, windows, parts_folder, ranks)
            if ranks.rank > 0:
                return None
            faults.point("probe.tables")
            judged = write_tables(folder, setting, tables, eligibility, len(chosen))
            write_viewer(folder, subjects[0], windows["confirm"], corpus)
            report = write_report(folder)
            shutil.rmtree(folder / PARTS)
    return Result(folder, report, judged)


@contextmanager
def _only_probe_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """The folder, made and locked by the first process for all of them.

    Raises:
        ConfigError: another probe is at work in it.
    """
    with ExitStack() as stack:
        taken: AttnResError | None = None
        if ranks.rank == 0:
            with storage_errors(folder, _FREE):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                busy = f"{folder} is in use by another probe; wait for it or change the settings"
                stack.enter_context(locked(folder / LOCK, busy))
            except ConfigError as error:
                taken = error
        ranks.agree(taken)
        refuse_links(folder)
        yield


def _data_config(config: ProbeConfig, trained: Located) -> DataConfig:
    """The corpus of the checkpoint, with the keys that the probe overrides."""
    stored = dict(trained.data.get("config", {}))
    if not stored and not config.data:
        raise ConfigError(
            f"data: {trained.folder} does not say which text it was trained on; name one, e.g. data=pystdlib"
        )
    merged = stored | config.data | {"cache_dir": config.cache_dir}
    if not stored and merged.get("tokenizer") is None:
        merged["tokenizer"] = str(trained.folder)
    return build(DataConfig, merged, "data")


def _corpus(config: ProbeConfig, trained: Located, ranks: Ranks) -> Corpus:
    """The corpus; the first process makes it if need be, and the others then find it."""
    settings = _data_config(config, trained)
    corpus = prepare(settings) if ranks.rank == 0 else None
    ranks.agree()
    return corpus or prepare(settings)


def _same_text(config: ProbeConfig, corpus: Corpus, trained: Located) -> None:
    """The checkpoint's splits, or none: other splits would probe on documents that it was trained on."""
    stored = trained.data.get("fingerprint")
    if stored and not config.data and stored != corpus.fingerprint:
        raise DataError(
            f"data: the text that {trained.run} was trained on is not the text found now ({stored[:8]} against "
            f"{corpus.fingerprint[:8]}; another Python or other packages?); probe where it was trained, or name other "
            "text with data="
        )


def _windows(config: ProbeConfig, corpus: Corpus) -> dict[Split, ProbeWindows]:
    settings = config.probe
    counts: dict[Split, int] = {"pilot": settings.documents_pilot, "confirm": settings.documents_confirm}
    return {
        split: probe_windows(
            corpus,
            f"probe_{split}",
            settings.length,
            max_documents=count,
            windows_per_document=settings.windows_per_document,
            seed=settings.seed,
        )
        for split, count in counts.items()
    }


def _checked(windows: dict[Split, ProbeWindows]) -> tuple[torch.Tensor, torch.Tensor]:
    return windows["confirm"].input_ids, windows["confirm"].labels


def _device(config: ProbeConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine offers no CUDA device; use device=auto or device=cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _load(
    config: ProbeConfig, trained_at: Located, baseline_at: Located, corpus: Corpus, device: torch.device
) -> tuple[Qwen3AttnResForCausalLM, Qwen3ForCausalLM]:
    # fp32 whatever was stored: effects are differences of small numbers.
    trained: nn.Module = load_model(trained_at.folder, bias=config.probe.bias, dtype=torch.float32)
    vanilla: nn.Module = load_model(baseline_at.folder, dtype=torch.float32)
    trained, vanilla = trained.to(device), vanilla.to(device)
    if not isinstance(trained, Qwen3AttnResForCausalLM):
        raise CheckpointError(
            f"ckpt: {trained_at.folder} holds a vanilla Qwen3; name an AttnRes run, and this one as baseline="
        )
    if not isinstance(vanilla, Qwen3ForCausalLM):
        raise CheckpointError(f"baseline: {baseline_at.folder} holds no vanilla Qwen3; name a vanilla run")
    tokenizers = {where.data.get("tokenizer_sha256") for where in (trained_at, baseline_at)} - {None}
    if len(tokenizers) > 1:
        raise ConfigError(
            f"baseline: {baseline_at.run} uses another tokenizer than {trained_at.run}; effects would not compare"
        )
    for name, model in (("ckpt", trained), ("baseline", vanilla)):
        if model.config.vocab_size < corpus.vocab_size:
            raise ConfigError(
                f"{name}: vocabulary of {model.config.vocab_size} is smaller than the tokenizer's {corpus.vocab_size}"
            )
    if vanilla.config.num_hidden_layers != trained.config.num_hidden_layers:
        raise ConfigError(
            f"baseline: {vanilla.config.num_hidden_layers} layers against {trained.config.num_hidden_layers}, so bands "
            "would not compare; name a vanilla model of the same depth"
        )
    return trained, vanilla


def _subjects(config: ProbeConfig, trained: Qwen3AttnResForCausalLM, vanilla: Qwen3ForCausalLM) -> list[Subject]:
    blocks, bias = trained.config.attnres_num_blocks, config.probe.recency_bias
    wraps = [
        Subject(schedule, wrap_qwen3(vanilla, schedule, blocks, bias), schedule, bias if schedule == "recency" else 0.0)
        for schedule in config.probe.schedules
    ]
    return [Subject(TRAINED, trained), *wraps]


def _run(
    config: ProbeConfig,
    subjects: list[Subject],
    chosen: list[Spec],
    windows: dict[Split, ProbeWindows],
    parts_folder: Path,
    ranks: Ranks,
) -> tuple[Tables, pd.DataFrame]:
    """Tables of all models and the table of eligibility; both are of use to the first process only."""
    settings = config.probe
    parts = Parts(parts_folder)
    if ranks.rank == 0:
        parts.clear()
    ranks.agree()
    with (
        StopSignals(_PROMISE, "", can_save=True) as signals,
        tqdm(unit="cell", desc="probe", mininterval=1.0, disable=ranks.rank > 0) as bar,
    ):
        execution = Execution(
            windows,
            settings.batch_size,
            settings.seed,
            settings.cells_per_pass,
            parts,
            ranks,
            bar.update,
            signals.asked,
        )

        def together(phase: Callable[[], bool]) -> None:
            """One phase in all processes; an error or a signal in one of them ends it in all."""
            failure: AttnResError | None = None
            try:
                if not phase():
                    name = signals.received.name if signals.received else "a signal to another process"
                    failure = Stopped(f"stopped by {name}; what is finished is kept, the same command resumes")
            except AttnResError as error:
                parts.ask_to_stop()
                failure = error
            ranks.agree(failure)
            parts.refresh()

        planned = {subject.name: [spec for spec in chosen if spec.cell(subject.plan).eligible] for subject in subjects}
        bar.total = len(execution.mine()) * sum(map(len, planned.values()))
        found, listed, attribution = [], [], pd.DataFrame()
        for subject in subjects:
            bar.set_postfix_str(subject.name)
            together(partial(run_pilot, subject, planned[subject.name], execution))
            pilot = pilot_of(subject, execution)
            listed.append(eligibility_table(subject, chosen, pilot, windows.get("pilot")))
            possible = set(listed[-1].loc[listed[-1]["eligible"], "cell"])
            specs = [spec for spec in planned[subject.name] if spec.id in possible]
            bar.total -= len(execution.mine()) * (len(planned[subject.name]) - len(specs))
            together(partial(run_cells, subject, specs, pilot, execution))
            found.append(tables_of(subject, specs, execution))
            if settings.attribution and subject.name == TRAINED:
                together(partial(run_attribution, subject, specs, execution))
                attribution = attribution_table(subject, specs, execution)
    parts_of_tables = zip(*((t.effects, t.mass, t.routing, t.clean) for t in found), strict=True)
    effects, mass, routing, clean = (pd.concat(some, ignore_index=True) for some in parts_of_tables)
    return Tables(effects, mass, routing, clean, attribution), pd.concat(listed, ignore_index=True)
