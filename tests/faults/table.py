"""What the suite found, as `summary.json` and `README.md`; no machine's paths."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnres.files.provenance import git_state, versions
from attnres.files.whole_files import write_text
from tests.faults.runner import Outcome


def write_table(
    folder: Path, outcomes: Sequence[Outcome], command: str, work: Path, parts: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes both files; `command` made them, `work` is where things were broken; `parts` ran side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(w for w in command.split(" ") if not w.startswith(("--work", "--out", "/")))
    rows = [{k: _clean(v, work) for k, v in o.as_dict().items()} for o in outcomes]
    kept = {name: version for name, version in versions().items() if version}
    record = {"command": command, "git": git_state(), "versions": kept, "parts": list(parts), "outcomes": rows}
    write_text(folder / "summary.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    total, good = Counter(o.row for o in outcomes), Counter(o.row for o in outcomes if o.ok)
    lines = [
        "# Faults, corruption and hostile files",
        "",
        f"Made by `{command}`; every line of it in `summary.json`.",
        "",
        *(f"* `{part['command']}` at commit {str(part['git']['sha'])[:10]}" for part in parts),
        *([""] if parts else []),
        f"{sum(good.values())} of {sum(total.values())} as promised.",
        "",
        "| promise | played | as promised |",
        "|---|---|---|",
        *(f"| {row} | {total[row]} | {good[row]} |" for row in total),
        "",
        "| part | what | expected | found | s |",
        "|---|---|---|---|---|",
        *(
            f"| {o['part']} | {o['name']} | {o['expected']} | {o['found']}{'' if o['ok'] else ' **not as promised**'} |"
            f" {o['seconds']:.1f} |"
            for o in rows
        ),
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def main(arguments: Sequence[str]) -> None:
    """`python -m tests.faults.table OUT FOLDER...`: one table from parts of the suite that ran side by side."""
    out, *folders = map(Path, arguments)
    records = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    # What was played again, after a mend, stands in the place of what was played before.
    latest = {(row["part"], row["name"]): row for r in records for row in r["outcomes"]}
    outcomes = [Outcome(**{k: v for k, v in row.items() if k != "ok"}) for row in latest.values()]
    parts = [{"command": r["command"], "git": r["git"]} for r in records]
    write_table(out, outcomes, "python -m tests.faults --long", Path("/nowhere"), parts)


def _clean(value: object, work: Path) -> object:
    return value.replace(str(work), "WORK").replace("|", "/") if isinstance(value, str) else value


if __name__ == "__main__":
    main(sys.argv[1:])
