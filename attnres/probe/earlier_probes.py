"""Earlier probes: those of the same checkpoint whose results lay beside this one before it was registered.

A margin, a metric or a seed that is chosen after a look at the results is no longer chosen before them. Nothing here
forbids that: a preregistration says it.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres.errors import one_line
from attnres.files.whole_files import read_object
from attnres.tables.folder import PREREGISTRATION

log = logging.getLogger(__name__)

# The last file that a probe writes.
RESULTS = "report.html"


def earlier_probes(folder: Path, registered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Probes beside `folder` that have results for some of the same cells of the same checkpoint.

    Members of one swept grid share no cell, and are not earlier than each other.

    Args:
        folder: of the probe that is being registered.
        registered: its preregistration.

    Returns:
        By name of the folder: `folder`, `written`, `cells` (how many are shared), `same_windows`, and `differs`, what
        it set otherwise: key -> its value. A folder whose preregistration cannot be read is skipped with a warning.
    """
    earlier = []
    for path in sorted(folder.parent.glob(f"probe_*/{RESULTS}")):
        if path.parent == folder:
            continue
        try:
            other = read_object(path.parent / PREREGISTRATION)
            shared = set(registered["cells"]) & set(other["cells"])
            if shared and other["hashes"]["checkpoint"] == registered["hashes"]["checkpoint"]:
                earlier.append(
                    {
                        "folder": path.parent.name,
                        "written": other["written"],
                        "cells": len(shared),
                        "same_windows": other["splits"]["sha256"] == registered["splits"]["sha256"],
                        "differs": _differs(registered, other),
                    }
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is no preregistration (%s): skipped", path.parent / PREREGISTRATION, one_line(error))
    return earlier


def _differs(registered: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the other probe that is not this one's."""
    plain = json.loads(json.dumps(registered))
    ours, theirs = (dict(probe["statistics"]) | dict(probe["probe"]) for probe in (plain, other))
    return {key: value for key, value in theirs.items() if ours.get(key) != value}
