"""The probe walk: checkpoint and baseline -> checks -> grid -> tables -> statistics -> report."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Qwen3ForCausalLM

from attnres.config import build, to_plain
from attnres.data import Corpus, DataConfig, ProbeWindows, prepare, probe_windows
from attnres.errors import CheckpointError, ConfigError, StorageError
from attnres.model.families import grid
from attnres.model.loading import load_model, wrap_qwen3
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.provenance import collect, write_json, write_text
from attnres.probe.checks import Check, check_subject, require_passed
from attnres.probe.claims import study_claims
from attnres.probe.config import ProbeConfig, config_hash
from attnres.probe.dissociation import dissociation_table, spearman_table
from attnres.probe.inference import StatisticsConfig
from attnres.probe.interventions import Intervention
from attnres.probe.locate import Located, locate, locate_baseline
from attnres.probe.report import write_report
from attnres.probe.runner import Split, Subject, Tables, eligibility_table, run_grid
from attnres.probe.statistics import cell_table, contrast_table

log = logging.getLogger(__name__)

TRAINED = "attnres"
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
            row.verdict if row.verdict == "excluded" else f"{row.verdict} {row.dnll:+.4f}"
            for row in cells.itertuples()
        ]
    ).pivot(index="cell", columns="model", values="told")
    order = list(dict.fromkeys(cells["cell"]))
    return wide.loc[order, list(dict.fromkeys(cells["model"]))].fillna("-").rename_axis(columns=None).to_string()


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
    windows = _windows(config, corpus)
    trained, vanilla = _load(config, trained_at, baseline_at, corpus)
    subjects = _subjects(config, trained, vanilla)
    folder = Path(config.runs_dir) / f"probe_{trained_at.run}-{config_hash(config, [trained_at.digest, baseline_at.digest])}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be created ({error.strerror}); choose another runs_dir") from error
    ids, labels = (tensor[:CHECK_WINDOWS].to(trained.device) for tensor in _checked(windows))
    checks = [check for subject in subjects for check in check_subject(subject, vanilla, ids, labels)]
    require_passed(checks)
    log.info("%d checks passed; writing to %s", len(checks), folder)

    chosen = _interventions(config)
    eligibility = pd.concat([eligibility_table(subject) for subject in subjects], ignore_index=True)
    statistics = StatisticsConfig(**to_plain(config.statistics) | {"grid_cells": config.statistics.grid_cells or len(grid(trained.model.plan))})
    provenance = collect(
        command,
        {"probe": config.probe.seed, "statistics": statistics.seed},
        {"data": corpus.fingerprint, "tokenizer": corpus.tokenizer_sha256, "checkpoint": trained_at.digest, "baseline": baseline_at.digest},
    )
    write_json(folder / "preregistration.json", _preregistration(config, statistics, chosen, windows, provenance))
    tables = _run(config, subjects, chosen, windows)
    return _write(config, folder, tables, eligibility, statistics, checks, subjects, (trained_at, baseline_at), windows, provenance)


def _data_config(config: ProbeConfig, trained: Located) -> DataConfig:
    """The corpus of the checkpoint, with the keys that the probe overrides."""
    stored = dict(trained.data.get("config", {}))
    if not stored and not config.data:
        raise ConfigError(
            f"data: {trained.folder} does not say which text it was trained on; name one, e.g. data=pystdlib or data=files"
        )
    merged = stored | config.data | {"cache_dir": config.cache_dir}
    if not stored and merged.get("tokenizer") is None:
        merged["tokenizer"] = str(trained.folder)
    return build(DataConfig, merged, "data")


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
    trained = load_model(trained_at.folder, bias=config.probe.bias, dtype=torch.float32).to(device)
    vanilla = load_model(baseline_at.folder, dtype=torch.float32).to(device)
    if not isinstance(trained, Qwen3AttnResForCausalLM):
        raise CheckpointError(f"ckpt: {trained_at.folder} holds a vanilla Qwen3; name an AttnRes run, and this one as baseline=")
    if not isinstance(vanilla, Qwen3ForCausalLM):
        raise CheckpointError(f"baseline: {baseline_at.folder} holds no vanilla Qwen3; name a vanilla run")
    tokenizers = {where.data.get("tokenizer_sha256") for where in (trained_at, baseline_at)} - {None}
    if len(tokenizers) > 1:
        raise ConfigError(f"baseline: {baseline_at.run} uses another tokenizer than {trained_at.run}; effects would not compare")
    for name, model in (("ckpt", trained), ("baseline", vanilla)):
        if model.config.vocab_size < corpus.vocab_size:
            raise ConfigError(f"{name}: vocabulary of {model.config.vocab_size} is smaller than the tokenizer's {corpus.vocab_size}")
    if vanilla.config.num_hidden_layers != trained.config.num_hidden_layers:
        raise ConfigError(
            f"baseline: {vanilla.config.num_hidden_layers} layers against {trained.config.num_hidden_layers}; bands would not compare"
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


def _preregistration(
    config: ProbeConfig,
    statistics: StatisticsConfig,
    chosen: list[Intervention],
    windows: dict[Split, ProbeWindows],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """What is fixed before any result is seen."""
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "cells": [item.id for item in chosen],
        "candidate_cells": statistics.grid_cells,
        "primary_metric": "dnll (nats/token), edited - clean on the same path",
        "other_metrics": ["kl (clean || edited), nats/token", "top-1 flips"],
        "unit": "document",
        "statistics": to_plain(statistics),
        "probe": to_plain(config.probe),
        "splits": {
            split: {"documents": len(set(drawn.document_ids.tolist())), "windows": len(drawn)}
            for split, drawn in windows.items()
        },
        "hashes": provenance["hashes"],
        "seeds": provenance["seeds"],
    }


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


def _write(
    config: ProbeConfig,
    folder: Path,
    tables: Tables,
    eligibility: pd.DataFrame,
    statistics: StatisticsConfig,
    checks: list[Check],
    subjects: list[Subject],
    located: tuple[Located, Located],
    windows: dict[Split, ProbeWindows],
    provenance: dict[str, Any],
) -> Result:
    settings = config.probe
    clean_nll = tables.clean.groupby("model")["nll"].mean().to_dict()
    run = eligibility[
        eligibility["family"].isin(settings.families)
        & eligibility["sublayer"].isin(settings.sublayers)
        & eligibility["band"].isin(settings.bands)
    ].reset_index(drop=True)
    told = [check.as_dict() for check in checks]
    cells = cell_table(tables.effects, tables.mass, run, statistics)
    contrasts = contrast_table(tables.effects, run, statistics, TRAINED)
    dissociation = dissociation_table(tables.effects, tables.mass, run, statistics)
    spearman = spearman_table(tables.effects, tables.mass, run, statistics)
    claims = study_claims(tables.effects, cells, contrasts, dissociation, told, statistics)
    candidates = statistics.grid_cells or 0
    ran = len(_interventions(config))
    summary = {
        "title": f"Does the routing of {located[0].run} tell the truth?",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": provenance["command"],
        "models": [
            _describe(subject, located[0 if subject.schedule is None else 1]) | {"clean_nll": clean_nll[subject.name]}
            for subject in subjects
        ],
        "checks": told,
        "grid": {
            "candidate_cells": candidates,
            "run_cells": ran,
            "complete": ran >= candidates,
            "families": list(settings.families),
            "sublayers": list(settings.sublayers),
            "bands": list(settings.bands),
            "note": "",
        },
        "statistics": to_plain(statistics)
        | {
            "documents": {split: len(set(drawn.document_ids.tolist())) for split, drawn in windows.items()},
            "windows": {split: len(drawn) for split, drawn in windows.items()},
            "window_length": settings.length,
        },
        "claims": claims,
        "dissociation": _dissociation_rows(dissociation),
        "spearman": _records(spearman),
        "recency": {
            "bias": settings.recency_bias,
            "kl_to_vanilla": next((c.value for c in checks if c.name == "distance to the unwrapped model"), None),
        },
        "provenance": provenance,
        "plan_notes": _plan_notes(subjects),
    }
    try:
        tables.effects.to_parquet(folder / "effects.parquet", index=False)
        tables.effects.to_csv(folder / "effects.csv", index=False)
        tables.mass.to_parquet(folder / "mass.parquet", index=False)
        for name, frame in (("cells", cells), ("contrasts", contrasts), ("routing", tables.routing), ("dissociation", dissociation)):
            write_text(folder / f"{name}.csv", frame.to_csv(index=False))
        write_json(folder / "summary.json", summary)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); free space or choose another runs_dir") from error
    return Result(folder, write_report(folder), cells)


def _describe(subject: Subject, where: Located) -> dict[str, Any]:
    model: PreTrainedModel = subject.model
    return {
        "name": subject.name,
        "path": str(where.folder),
        "kind": "trained AttnRes" if subject.schedule is None else f"vanilla Qwen3, {subject.schedule} wrap",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "convention": subject.plan.convention,
        "layers": subject.plan.num_layers,
        "blocks": subject.plan.num_real_blocks,
        "step": where.training.get("step"),
        "tokens": where.training.get("tokens"),
        "val_loss": where.training.get("val_loss"),
        "verified": where.verified,
        "finished": where.finished,
    }


def _plan_notes(subjects: Iterable[Subject]) -> list[str]:
    notes = []
    for subject in subjects:
        plan = subject.plan
        if plan.num_real_blocks != plan.num_blocks:
            notes.append(
                f"{subject.name}: {plan.num_layers} layers in {plan.num_blocks} blocks of {plan.layers_per_block} layers "
                f"make {plan.num_real_blocks} real blocks"
            )
    return notes


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain containers, NaN as None."""
    return json.loads(frame.to_json(orient="records"))


def _dissociation_rows(dissociation: pd.DataFrame) -> list[dict[str, Any]]:
    rows = _records(dissociation[dissociation["model"] == TRAINED])
    for row in rows:
        row |= {"largest_mass": row["mass_cell"], "largest_effect": row["effect_cell"], "detail": row["reason"] or ""}
    return rows
