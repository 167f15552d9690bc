"""Tokens per second, peak memory, and what kill -9 does to a data run, on all text files below some folders.

    python benchmarks/bench_data_prepare.py /usr/share/doc /usr/include ... --work /tmp/data_run --out results/...

Text files are gathered into .jsonl files (each distinct text once), a tokenizer is trained, and the same command makes
the shards twice: once undisturbed, and once with its process group killed at random moments and started again. The two
must give the same documents in the same order and the same bytes. Memory is the sum over the process tree of the
proportional set size, in which a page that several processes share counts once, sampled every 0.3 s.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from attnres.data.config import SPLITS

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cc", ".js", ".ts", ".html", ".pm", ".pl", ".rs")
FILE_BYTES = 64 * 1024**2


def texts(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(suffix, text) of every text file below the folders; manual pages and documents may be gzipped."""
    for root in folders:
        for folder, below, names in os.walk(root):
            below.sort()
            for name in sorted(names):
                path = Path(folder, name)
                plain = name.removesuffix(".gz")
                manual = "man" in path.parts and plain.rpartition(".")[2][:1].isdigit()
                if not (plain.endswith(SUFFIXES) or manual) or path.is_symlink() or not path.is_file():
                    continue
                try:
                    raw = path.read_bytes()
                    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8")
                except (OSError, EOFError, UnicodeDecodeError):
                    continue
                yield "manual" if manual else Path(plain).suffix, text


def gather(folders: list[Path], work: Path, most: int) -> dict[str, Any]:
    """Writes `source/*.jsonl`; returns counts of it. Each folder gives an equal share of `most`, if it has that."""
    (work / "source").mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    sizes: Counter[str] = Counter()
    documents = total = number = 0
    file = (work / "source" / "00000.jsonl").open("w", encoding="utf-8")
    for index, folder in enumerate(folders):
        allowed = total + (most - total) // (len(folders) - index)
        for suffix, text in texts([folder]):
            raw = text.encode()
            if not text.strip() or (key := hashlib.sha256(raw).digest()) in seen:
                continue
            if total + len(raw) > allowed:
                break
            seen.add(key)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents, total = documents + 1, total + len(raw)
            sizes[suffix] += len(raw)
            if file.tell() > FILE_BYTES:
                file.close()
                number += 1
                file = (work / "source" / f"{number:05d}.jsonl").open("w", encoding="utf-8")
    file.close()
    return {
        "documents": documents,
        "megabytes": round(total / 1e6, 1),
        "megabytes_by_kind": {kind: round(size / 1e6, 1) for kind, size in sizes.most_common()},
    }


def tree(root: int) -> list[int]:
    """Process ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    processes, queue = [], [root]
    while queue:
        processes.append(queue.pop())
        queue += children.get(processes[-1], [])
    return processes


def memory(root: int) -> dict[str, float]:
    """Sums over a process tree, in MB: proportional, and resident with shared pages counted in each process."""
    sums = {"Pss": 0, "Rss": 0}
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for key in sums:
            sums[key] += next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)
    return {key: value / 1024 for key, value in sums.items()}


class Run:
    """One start of the command in a process group of its own, with its memory sampled."""

    def __init__(self, command: list[str], log: Path, peak: dict[str, float]) -> None:
        self._log = log.open("a")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log, start_new_session=True)
        self._peak = peak
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()

    def _sample(self) -> None:
        while self.process.poll() is None:
            for key, value in memory(self.process.pid).items():
                self._peak[key] = max(self._peak.get(key, 0), value)
            time.sleep(0.3)

    def kill(self) -> bool:
        """SIGKILL to the whole group; False if it had ended."""
        running = self.process.poll() is None
        if running:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()
        return running

    def wait(self) -> int:
        code = self.process.wait()
        self._sampler.join()
        self._log.close()
        return code


def killed_and_resumed(
    command: list[str], out: Path, chunks: int, kills: int, seed: int, log: Path, peak: dict[str, float]
) -> list[dict[str, Any]]:
    """Kills the command when random shares of the chunks are written, and once while shards are written."""
    building, rng, done = out.with_name(f"{out.name}.building"), random.Random(seed), []
    at = sorted(rng.randrange(1, max(2, chunks)) for _ in range(kills))
    for goal in [*at, None]:
        run = Run(command, log, peak)
        while run.process.poll() is None:
            written = len(list((building / "chunks").glob("0*"))) if (building / "chunks").is_dir() else 0
            if (building / "train-00000.tokens").exists() if goal is None else written >= goal:
                break
            time.sleep(0.02)
        time.sleep(rng.random() * (0.3 if goal is None else 2))
        stage = "writing shards" if (building / "train-00000.tokens").exists() else f"{written} of {chunks} chunks"
        if run.kill():
            done.append({"at": stage})
    code = Run(command, log, peak).wait()
    if code:
        sys.exit(f"the resumed run ended with {code}; see {log}")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the text and both results")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json")
    parser.add_argument("--max-mb", type=int, default=10**6, help="gather at most so much text")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--tokenizer", type=Path, help="use this one instead of training one")
    parser.add_argument("--at-once", action="store_true", help="both runs beside each other")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    source = gather(given.folders, given.work, given.max_mb * 10**6)
    print(json.dumps(source), flush=True)
    outs = {name: given.work / name for name in ("undisturbed", "killed")}
    peaks: dict[str, dict[str, float]] = {name: {} for name in outs}

    def command(name: str) -> list[str]:
        tokenizer = f"--tokenizer {given.tokenizer}" if given.tokenizer else f"--vocab-size {given.vocab_size}"
        options = f"{tokenizer} --workers {given.workers} --validation 0.01 --probe-pilot 0.01"
        options += " --probe-confirm 0.02 --shard-tokens 16777216"
        words = ["-m", "attnres.commands.make_shards", "--out", str(outs[name]), "--paths", str(given.work / "source")]
        return [sys.executable, *words, *options.split()]

    began = time.monotonic()
    undisturbed = Run(command("undisturbed"), given.work / "undisturbed.log", peaks["undisturbed"])
    if not given.at_once:
        undisturbed.wait()
    chunks = max(1, round(source["megabytes"] * 1e6) // (4 * 1024**2))
    kills = killed_and_resumed(
        command("killed"), outs["killed"], chunks, given.kills, given.seed, given.work / "killed.log", peaks["killed"]
    )
    if code := undisturbed.wait():
        sys.exit(f"the undisturbed run ended with {code}")
    seconds = time.monotonic() - began

    manifest = json.loads((outs["undisturbed"] / "manifest.json").read_text())
    other = json.loads((outs["killed"] / "manifest.json").read_text())
    tables = [pq.read_table(out / "documents.parquet") for out in outs.values()]
    expected = source["documents"] - manifest["left_out"]["too_long"]
    same = {
        "documents_in_order": tables[0].equals(tables[1]),
        "sha256_of_every_file": manifest["files"] == other["files"],
        "fingerprint": manifest["fingerprint"] == other["fingerprint"],
        "no_document_lost_or_repeated": len(set(tables[1]["name"].to_pylist())) == tables[1].num_rows == expected,
    }
    result = {
        "settings": " ".join(command("killed")[7:]).replace(str(given.tokenizer), "TOKENIZER"),
        "vocab_size": manifest["vocab_size"],
        "source": source,
        "tokens": manifest["tokens"],
        "documents": manifest["documents"],
        "near_duplicate_groups": manifest["near_duplicate_groups"],
        "left_out": {key: manifest["left_out"][key] for key in ("blank", "too_long")},
        "shards": {split: len(manifest["splits"][split]["shards"]) for split in SPLITS},
        "tokens_per_second_per_core": manifest["throughput"]["tokens_per_second_per_core"],
        "megabytes_per_second_per_core": manifest["throughput"]["megabytes_per_second_per_core"],
        "seconds_of_both_runs": round(seconds),
        "runs_at_once": given.at_once,
        "workers": given.workers,
        "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
        "peak_mb": {name: {key: round(value) for key, value in peak.items()} for name, peak in peaks.items()},
        "kills": kills,
        "same": same,
        "fingerprint": manifest["fingerprint"],
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), **manifest["versions"]},
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not all(same.values()):
        sys.exit("the killed run's result differs")


if __name__ == "__main__":
    main()
