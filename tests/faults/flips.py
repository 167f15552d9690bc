"""Random single-bit flips and truncations of checkpoints and shards: each must be noticed before anything is used."""

import random
import shutil
import time
from pathlib import Path

from attnres.data import open_corpus
from attnres.errors import CheckpointError, DataError
from attnres.files.run_folder import verify
from tests.faults.runner import Outcome
from tests.faults.world import Base, check

ROW = "truncated checkpoint, flipped bit, zeroed page"


def play(base: Base, number: int, seed: int) -> Outcome:
    """Damages one file at a time, of a checkpoint and of a corpus in turn, and opens the folder as a command does."""
    began = time.monotonic()
    world = base.world("flips", "trained")
    corpus = Path(shutil.copytree(next(base.folder.glob("cache/*/manifest.json")).parent, world.folder / "corpus"))
    step = world.step(6)
    files = {where: sorted(p for p in where.rglob("*") if p.is_file()) for where in (step, corpus)}
    counts = world.folder / "counts"

    def act() -> None:
        draw, missed, undone = random.Random(seed), [], 0
        for i in range(number):
            where = (step, corpus)[i % 2]
            path = draw.choice(files[where])
            whole = path.read_bytes()
            if draw.random() < 0.75:
                position, bit = draw.randrange(len(whole)), draw.randrange(8)
                damaged, what = bytearray(whole), f"bit {bit} of byte {position}"
                damaged[position] ^= 1 << bit
            else:
                size = draw.randrange(len(whole))
                damaged, what = bytearray(whole[:size]), f"cut at {size} of {len(whole)}"
            path.write_bytes(damaged)
            try:
                verify(where) if where == step else open_corpus(where)
            except (CheckpointError, DataError):
                undone += 1
            else:
                missed.append(f"{path.name}: {what}")
            path.write_bytes(whole)
        verify(step), open_corpus(corpus)
        counts.write_text(f"{undone} of {number} noticed")
        assert not missed, "; ".join(missed[:5])

    wrong = check(act, world)
    found = counts.read_text() if counts.exists() else "nothing"
    names = f"{number} random flips and truncations"
    return Outcome("flips", ROW, names, f"{number} of {number} noticed", found, wrong, time.monotonic() - began)


def no_false_alarm(base: Base, number: int) -> Outcome:
    """Writes good checkpoints of random weights, and corpora, and opens them."""
    began = time.monotonic()
    world = base.world("good", "trained")

    def act() -> None:
        import torch

        from attnres.model.loading import load_model
        from attnres.training.checkpoint import read_state, write_checkpoint
        from attnres.training.export import ExportInfo

        model = load_model(world.step(6))
        state = torch.load(world.step(6) / "training.ckpt", weights_only=True)
        info = ExportInfo(world.step(6) / "model" / "tokenizer.json", 0, {"name": "x"}, {"fingerprint": "f"})
        for i in range(number):
            torch.manual_seed(i)
            for value in state["state_dict"].values():
                value.normal_()
            folder = world.folder / "good" / f"step_{i:08d}"
            write_checkpoint(folder, state, model, info)
            verify(folder)
            read_state(folder / "training.ckpt", model)
            shutil.rmtree(folder)
        for manifest in base.folder.glob("cache/*/manifest.json"):
            open_corpus(manifest.parent)

    wrong = check(act, world)
    found = "none" if not wrong else "alarm"
    return Outcome(
        "flips", ROW, f"false alarms on {number} good checkpoints", "none", found, wrong, time.monotonic() - began
    )
