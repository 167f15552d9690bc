"""What `results/*_small_replication` keeps of `scripts/replication.sh`.

    python scripts/replication_record.py replication results/DATE_small_replication --seeds 0 1 2

Per seed: settings and curves of the runs; what the probe measured, judged by this version of the code; the report of
the first seed; and `digests.txt` of what must come out again on the same machine, Python, torch and thread count: the
last weights of each run, and the tables. Run it on another copy of a seed and compare the two `digests.txt`. Beside
them `seeds/`, side by side, and `trajectory/`, what `scripts/trajectory.sh` made of the first seed: verdicts at each
step, without what was measured.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from attnres.files.hashes import sha256_of
from attnres.files.run_folder import COMPLETE, MANIFEST
from attnres.report.comparison import write_comparison
from attnres.report.report import write_report
from attnres.statistics.rejudge import judge_anew
from attnres.tables.folder import read_measured

ARMS = ("attnres_small", "vanilla_small", "same_base_frozen", "same_base_full")
OF_A_RUN = ("config.yaml", "metrics.csv", "routing.csv", "provenance.json", COMPLETE)
MEASURED = ("effects.parquet", "mass.parquet", "eligibility.csv")
JUDGED = ("cells.csv", "contrasts.csv", "dissociation.csv", "motifs.csv", "routing.csv", "spearman.csv")
# The parquet holds the first, the page the second.
LEFT_OUT = ("effects.csv", "figures")
PAGE = "report.html"
COMPARED = ("report.md", "contrasts.csv")
AT_A_STEP = ("cells.csv", "motifs.csv", "contrasts.csv", "summary.json", "preregistration.json")


def only(seed: Path, pattern: str, last_file: str) -> Path:
    """The one folder of a seed that is complete, as its last file says."""
    folders = [path.parent for path in seed.glob(f"{pattern}/{last_file}")]
    if len(folders) != 1:
        raise SystemExit(f"{seed}: {len(folders)} complete folders {pattern}; run scripts/replication.sh to its end")
    return folders[0]


def copy(names: tuple[str, ...], source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def record(seed: Path, out: Path, with_page: bool) -> None:
    # Found before anything is written.
    runs = {arm: only(seed, f"{arm}-*", COMPLETE) for arm in ARMS}
    probe = only(seed, "probe_attnres_small-*", "report.html")
    digests = []
    for arm, run in runs.items():
        copy(OF_A_RUN, run, out / arm)
        last = run / json.loads((run / COMPLETE).read_text())["checkpoint"]
        files = json.loads((last / MANIFEST).read_text())["files"]
        digests.append(f"{files['model/model.safetensors']['sha256']}  {arm}/{last.name}/model.safetensors")
    judge_anew(read_measured(probe), out / "probe")
    write_report(out / "probe")
    for name in LEFT_OUT if with_page else (*LEFT_OUT, PAGE):
        path = out / "probe" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (*MEASURED, *JUDGED):
        digests.append(f"{sha256_of(out / 'probe' / name)}  probe/{name}")
    (out / "digests.txt").write_text("\n".join(digests) + "\n")


def compare(probes: list[Path], out: Path, figure: str) -> None:
    """The report of several probes in words, and the figure that shows them side by side."""
    with TemporaryDirectory() as folder:
        drawn = write_comparison(probes, Path(folder)).parent
        copy(COMPARED, drawn, out)
        shutil.copyfile(drawn / "figures" / figure, out / "effects.svg")


def trajectory(seed: Path, last: Path, out: Path) -> None:
    """Each step of `scripts/trajectory.sh`, judged by this version, and the path that they make."""
    probes = []
    for step in sorted(path for path in seed.glob("trajectory/step_*") if path.is_dir()):
        probes.append(out / step.name)
        judge_anew(read_measured(only(step, "probe_*", PAGE)), probes[-1])
    compare([*probes, last], out, "steps-0.svg")
    for path in (path for probe in probes for path in probe.iterdir() if path.name not in AT_A_STEP):
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/replication.sh was given")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    given = parser.parse_args()
    for seed in given.seeds:
        name = f"seed{seed}"
        record(given.folder / name, given.out / name, with_page=seed == given.seeds[0])
        print(given.out / name)
    probes = [given.out / f"seed{seed}" / "probe" for seed in given.seeds]
    if len(probes) > 1:
        compare(probes, given.out / "seeds", "seeds-0.svg")
        print(given.out / "seeds")
    first = given.folder / f"seed{given.seeds[0]}"
    if (first / "trajectory").is_dir():
        trajectory(first, probes[0], given.out / "trajectory")
        print(given.out / "trajectory")


if __name__ == "__main__":
    main()
