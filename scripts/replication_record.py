"""What `results/*_small_replication` keeps of `scripts/replication.sh`.

    python scripts/replication_record.py replication results/DATE_small_replication

Per seed: settings and curves of the runs, tables and text of the probe, and `digests.txt` of what must come out again
on the same machine, Python, torch and thread count: the last weights of each run, and the tables. Run it on another
copy of a seed and compare the two `digests.txt`.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ARMS = ("attnres_small", "vanilla_small", "same_base_frozen", "same_base_full")
OF_A_RUN = ("config.yaml", "metrics.csv", "routing.csv", "provenance.json", "complete.json")
MEASURED = ("effects.parquet", "mass.parquet", "eligibility.csv")
JUDGED = ("cells.csv", "contrasts.csv", "dissociation.csv", "motifs.csv", "routing.csv", "spearman.csv")
TOLD = ("preregistration.json", "summary.json", "report.md", "viewer.json")


def only(folder: Path, pattern: str) -> Path:
    found = [path for path in sorted(folder.glob(pattern)) if path.is_dir()]
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found)} folders match {pattern}; run scripts/replication.sh to its end")
    return found[0]


def copy(names: tuple[str, ...], source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def record(seed: Path, out: Path) -> None:
    digests = []
    for arm in ARMS:
        run = only(seed, f"{arm}-*")
        copy(OF_A_RUN, run, out / arm)
        last = run / json.loads((run / "complete.json").read_text())["checkpoint"]
        files = json.loads((last / "manifest.json").read_text())["files"]
        digests.append(f"{files['model/model.safetensors']['sha256']}  {arm}/{last.name}/model.safetensors")
    probe = only(seed, "probe_attnres_small-*")
    copy((*MEASURED, *JUDGED, *TOLD), probe, out / "probe")
    for name in (*MEASURED, *JUDGED):
        digests.append(f"{hashlib.sha256((probe / name).read_bytes()).hexdigest()}  probe/{name}")
    (out / "digests.txt").write_text("\n".join(digests) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/replication.sh was given")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    for seed in sorted(given.folder.glob("seed*")):
        record(seed, given.out / seed.name)
        print(given.out / seed.name)


if __name__ == "__main__":
    main()
