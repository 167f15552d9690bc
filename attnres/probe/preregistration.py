"""Preregistration: everything about a probe that is fixed before its first result, written before a cell is measured.

One that says the same as an earlier one stays; where it says something else, the earlier one is kept beside it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from attnres.config import to_plain
from attnres.depth.families import BANDS, band_layers
from attnres.errors import ConfigError
from attnres.files import formats
from attnres.files.provenance import collect
from attnres.files.whole_files import read_object, storage_errors, write_json, write_text
from attnres.interventions.config import GridConfig
from attnres.interventions.grid import Grid
from attnres.probe.checks import Check
from attnres.probe.earlier_probes import earlier_probes
from attnres.probe.subjects import Subjects
from attnres.processes.hardware import hardware
from attnres.statistics.looks import resolved
from attnres.tables.folder import PREREGISTRATION, windows_digest

log = logging.getLogger(__name__)

# What is tested, and over which family of tests each is corrected.
TESTS = {
    "cell": "dNLL: two-sided sign flips over documents, and TOST at the margin; KL: one-sided tests at the margin; "
    "verdicts in the order excluded, negligible, causal, inconclusive",
    "cell family": "Holm within a model and an intervention over its cells at bands; Benjamini-Hochberg within a "
    "model, an intervention and a kind of place over maps of layers, blocks or reads",
    "contrast": "trained less baseline on the same windows, dNLL and mass apart; families as for cells, of the cells "
    "eligible in both, for each baseline separately",
    "motif": "causal; exceeds its family's other cells and its matched control (one-sided sign flips, the larger p), "
    "and none without a control; Holm over the grid, and over the study's four motifs",
    "dissociation": "cells picked on the pilot split; mass and effect both ordered on the confirmatory split "
    "(one-sided sign flips, the larger p); Holm over the sublayer types",
    "what predicts effect": "Spearman over cells of the mask, bootstrap over documents; differences from mass, Holm "
    "over norm-aware share and displacement",
    "looks": "every test is read after each of the registered numbers of documents, at a share of its level (spending "
    "function of documents); what is decided is measured no further; comparisons whose conditional power falls below a "
    "limit are given up as inconclusive; rank correlations on the last look within statistics.rank_look documents",
    "seeds": "each is shown; no p over seeds with fewer than six",
}
# What a preregistration says of the moment at which it was written, and of its file.
_OF_ITS_TIME = ("written", "amends", "earlier_looks", formats.KEY)


@dataclass(frozen=True)
class Fixed:
    """Everything about a probe that is fixed before its first result.

    Attributes:
        statistics: configuration of the statistics as plain containers, with `grid_cells` filled in.
        subjects: the models and their text.
        grid: every cell in every model, as the depth plans decide on it.
        checks: all passed.
    """

    config: GridConfig
    statistics: Mapping[str, Any]
    subjects: Subjects
    grid: Grid
    checks: Sequence[Check]
    command: str

    @property
    def looks(self) -> dict[str, tuple[int, ...]]:
        """Per split, after how many documents each look is taken; empty where all are measured at once.

        On the pilot split nothing is tested, and looks only end what cannot be picked: they are those asked for.
        """
        asked = self.statistics["looks"]
        if asked is None:
            return {}
        documents = self.subjects.text.counts["documents"]
        return {split: resolved(asked, number) or () for split, number in documents.items()}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the results come from: code, versions, hardware, seeds, hashes."""
        seeds = {"probe": self.config.seed, "statistics": self.statistics["seed"]}
        return collect(self.command, hardware(), seeds, self.subjects.hashes)


def preregistration(fixed: Fixed) -> dict[str, Any]:
    """What is fixed before any result is seen, as plain containers; what the pilot split excludes comes later."""
    statistics, models, text = fixed.statistics, fixed.subjects.models, fixed.subjects.text
    rows = [candidate.row for candidate in fixed.grid.candidates]
    layers = fixed.subjects.trained.plan.num_layers
    return {
        "written": now(),
        "cells": [spec.id for spec in fixed.grid.specs],
        "candidate_cells": statistics["grid_cells"],
        "interventions": sorted({row["intervention"] for row in rows}),
        "families": sorted({row["family"] for row in rows}),
        "sublayers": sorted({row["sublayer"] for row in rows}),
        # [first, one past the last]
        "bands": {band: [span.start, span.stop] for band in BANDS for span in [band_layers(band, layers)]},
        "models": [
            {
                "name": subject.name,
                "convention": subject.plan.convention,
                "schedule": subject.schedule,
                "layers": subject.plan.num_layers,
                "routing_trained": subject.routing_trained,
            }
            for subject in models
        ],
        "exclusions": [{key: row[key] for key in ("model", "cell", "reason")} for row in rows if not row["eligible"]],
        "eligibility": rows,
        "primary_metric": "dnll (nats/token), edited - clean on the same path",
        "other_metrics": ["kl (clean || edited), nats/token", "top-1 flips"],
        "margins": {"dnll": statistics["margin"], "kl": statistics["margin"], "unit": "nats/token"},
        "unit": "document",
        "tests": TESTS,
        "statistics": dict(statistics),
        "probe": to_plain(fixed.config),
        "splits": text.counts
        | {
            "sha256": {
                split: windows_digest(drawn.window_ids.tolist(), drawn.document_ids.tolist())
                for split, drawn in text.windows.items()
            }
        }
        | ({"looks": _looks(fixed)} if fixed.looks else {}),
        "hashes": fixed.provenance["hashes"],
        "seeds": fixed.provenance["seeds"],
    }


def _looks(fixed: Fixed) -> dict[str, Any]:
    """Per split, the documents of each look and the digest of all windows up to it."""
    listed = {}
    for split, drawn in fixed.subjects.text.windows.items():
        windows, owners = drawn.window_ids.tolist(), drawn.document_ids.tolist()
        order = list(dict.fromkeys(owners))
        rows = []
        for documents in fixed.looks[split]:
            inside = set(order[:documents])
            chosen = [place for place, owner in enumerate(owners) if owner in inside]
            digest = windows_digest([windows[place] for place in chosen], [owners[place] for place in chosen])
            rows.append({"documents": documents, "sha256": digest})
        listed[split] = rows
    return listed


# The remedy where a probe's folder cannot be written.
FREE = "free space or choose another runs_dir"


def register(folder: Path, fixed: Fixed) -> dict[str, Any]:
    """Write what is fixed into a probe's folder, with the earlier probes that lie beside it.

    Raises:
        ConfigError: as `write_preregistration`.
        StorageError: the folder cannot be written.
    """
    registered = preregistration(fixed)
    # Here, so that the error reaches the processes that wait for the first one.
    with storage_errors(folder, FREE):
        return write_preregistration(
            folder / PREREGISTRATION, registered | {"earlier_looks": earlier_probes(folder, registered)}
        )


def write_preregistration(path: Path, registered: Mapping[str, Any]) -> dict[str, Any]:
    """Write a preregistration, and return the one that holds.

    One that says the same stays, with the time at which it was written. Where an earlier one says something else it is
    kept beside it under its hash, and the new one names it as amended.

    Raises:
        ConfigError: the earlier one is of another format.
    """
    plain = json.loads(json.dumps({**registered, formats.KEY: formats.VERSION}))
    earlier: dict[str, Any] = {}
    try:
        earlier = read_object(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.warning("%s cannot be read (%s): written anew", path, error)
    if earlier:
        formats.check_format(earlier, path, ConfigError, "use the version that wrote it, or choose another runs_dir")
        kept, said = ({k: v for k, v in each.items() if k not in _OF_ITS_TIME} for each in (earlier, plain))
        if kept == said:
            return earlier
        text = path.read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        write_text(path.with_name(f"{path.stem}-{digest[:8]}.json"), text.decode())
        plain["amends"] = {"sha256": digest, "written": earlier.get("written")}
        log.warning("%s: what was preregistered at %s is amended", path, earlier.get("written"))
    write_json(path, plain)
    return plain


def now() -> str:
    """The time, as it stands in a probe's files."""
    return datetime.now(UTC).isoformat(timespec="seconds")
