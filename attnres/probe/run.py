"""The probe walk: checkpoint and baseline -> checks -> grid -> tables -> statistics -> report."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM

from attnres.config import build
from attnres.data import Corpus, DataConfig, ProbeWindows, prepare, probe_windows
from attnres.errors import CheckpointError, ConfigError, DataError, StorageError
from attnres.model.families import grid
from attnres.model.loading import load_model, wrap_qwen3
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.probe.checks import check_subject, require_passed
from attnres.probe.config import ProbeConfig, config_hash
from attnres.probe.interventions import Intervention
from attnres.probe.locate import Located, locate, locate_baseline
from attnres.probe.outputs import TRAINED, Setting, preregistration, write_tables
from attnres.probe.report import write_report
from attnres.probe.runner import Split, Subject, Tables, eligibility_table, run_grid
from attnres.probe.viewer import write_viewer
from attnres.provenance import collect, write_json

log = logging.getLogger(__name__)

# Windows that the checks look at; more would say the same more slowly.
CHECK_WINDOWS = 4


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


def probe(config: ProbeConfig, command: str) -> Result:
    """Run a probe and write its folder.

    Raises:
        ConfigError: no baseline, or settings that do not fit the models.
        DataError: no windows.
        CheckpointError: a checkpoint that is missing or unreadable.
        NumericsError: a check that fails, or an effect that is not finite.
        StorageError: a folder that cannot be written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trained_at = locate(config.ckpt)
    baseline_at = locate_baseline(config.baseline, trained_at)
    corpus = prepare(_data_config(config, trained_at))
    _same_text(config, corpus, trained_at)
    windows = _windows(config, corpus)
    trained, vanilla = _load(config, trained_at, baseline_at, corpus)
    subjects = _subjects(config, trained, vanilla)
    folder = (
        Path(config.runs_dir) / f"probe_{trained_at.run}-{config_hash(config, [trained_at.digest, baseline_at.digest])}"
    )
    with _storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ids, labels = (tensor[:CHECK_WINDOWS].to(trained.device) for tensor in _checked(windows))
    checks = [check for subject in subjects for check in check_subject(subject, vanilla, ids, labels)]
    require_passed(checks)
    log.info("%d checks passed; writing to %s", len(checks), folder)

    chosen = _interventions(config)
    eligibility = pd.concat([eligibility_table(subject, chosen) for subject in subjects], ignore_index=True)
    statistics = dataclasses.replace(
        config.statistics, grid_cells=config.statistics.grid_cells or len(grid(trained.model.plan))
    )
    provenance = collect(
        command,
        {"probe": config.probe.seed, "statistics": statistics.seed},
        {
            "data": corpus.fingerprint,
            "tokenizer": corpus.tokenizer_sha256,
            "checkpoint": trained_at.digest,
            "baseline": baseline_at.digest,
        },
    )
    setting = Setting(config.probe, statistics, subjects, (trained_at, baseline_at), windows, checks, provenance)
    cells = [item.id for item in chosen]
    with _storage_errors(folder):
        write_json(folder / "preregistration.json", preregistration(setting, cells))
    tables = _run(config, subjects, chosen, windows)
    with _storage_errors(folder):
        judged = write_tables(folder, setting, tables, eligibility, len(cells))
        write_viewer(folder, subjects[0], windows["confirm"], corpus)
        report = write_report(folder)
    return Result(folder, report, judged)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror}); free space or choose another runs_dir"
        ) from error


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
    config: ProbeConfig, trained_at: Located, baseline_at: Located, corpus: Corpus
) -> tuple[Qwen3AttnResForCausalLM, Qwen3ForCausalLM]:
    # fp32 whatever was stored: effects are differences of small numbers.
    device = _device(config)
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


def _interventions(config: ProbeConfig) -> list[Intervention]:
    settings = config.probe
    return [
        Intervention(settings.intervention, family, sublayer, band)
        for band in settings.bands
        for sublayer in settings.sublayers
        for family in settings.families
    ]


def _run(
    config: ProbeConfig, subjects: list[Subject], chosen: list[Intervention], windows: dict[Split, ProbeWindows]
) -> Tables:
    size = config.probe.batch_size
    per_subject = {
        subject.name: [item for item in chosen if item.edit(subject.plan).removed and _eligible(subject, item)]
        for subject in subjects
    }
    rounds = sum(-(-len(drawn) // size) for drawn in windows.values())
    total = rounds * sum(len(items) for items in per_subject.values())
    found = []
    with tqdm(total=total, unit="cell", desc="probe", mininterval=1.0) as bar:
        for subject in subjects:
            bar.set_postfix_str(subject.name)
            found.append(run_grid(subject, per_subject[subject.name], windows, size, bar.update))
    parts = zip(*((t.effects, t.mass, t.routing, t.clean) for t in found), strict=True)
    return Tables(*(pd.concat(part, ignore_index=True) for part in parts))


def _eligible(subject: Subject, item: Intervention) -> bool:
    return any(
        cell.eligible and (cell.family, cell.sublayer, cell.band) == (item.family, item.sublayer, item.band)
        for cell in grid(subject.plan)
    )
