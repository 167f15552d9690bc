"""Earlier looks: probes of the same checkpoint whose results lay beside this one before it was registered.

A margin, a metric or a seed that is chosen after a look at the results is no longer chosen before them. Nothing here
forbids that: a preregistration tells it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The last file that a probe writes.
RESULTS = "report.html"


def earlier_looks(folder: Path, registered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Probes beside `folder` that have results for some of the same cells of the same checkpoint.

    Parts of one swept grid share no cell, and are no look at each other.

    Args:
        folder: of the probe that is being registered.
        registered: its preregistration.

    Returns:
        By name of the folder: `folder`, `written`, `cells` (how many are shared), `same_windows`, and `differs`, what
        it set otherwise: key -> its value. Folders whose preregistration cannot be read are passed over.
    """
    found = []
    for path in sorted(folder.parent.glob(f"probe_*/{RESULTS}")):
        if path.parent == folder:
            continue
        try:
            other = json.loads((path.parent / "preregistration.json").read_text(encoding="utf-8"))
            shared = set(registered["cells"]) & set(other["cells"])
            if shared and other["hashes"]["checkpoint"] == registered["hashes"]["checkpoint"]:
                found.append(
                    {
                        "folder": path.parent.name,
                        "written": other["written"],
                        "cells": len(shared),
                        "same_windows": other["splits"]["sha256"] == registered["splits"]["sha256"],
                        "differs": _differs(registered, other),
                    }
                )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _differs(registered: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the other probe that are not those of this one."""
    ours, theirs = (dict(one["statistics"]) | dict(one["probe"]) for one in (json.loads(json.dumps(registered)), other))
    return {key: value for key, value in theirs.items() if ours.get(key) != value}
