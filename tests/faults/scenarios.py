"""What goes wrong, as data: where a run stands, what is done to it, and what must come of it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.world import STEPS, World

KILLED = -9


@dataclass(frozen=True)
class Scenario:
    """One fault in one phase.

    Attributes:
        name: phase and fault.
        row: the promise it tests, in words of the table of faults.
        command: `train`, `probe`, or `report`.
        start: see `Base.world`.
        fault: for `attnres.faults`.
        damage: done to the world's files beforehand.
        more: overrides on the command line.
        environment: of the command.
        code: exit code that must come.
        says: what must stand on stderr.
        then: what the same command without the fault must do afterwards: `same run`, `same probe`, `again` (the same
            code again), or `nothing`.
        steps: step folders that must be there right after the fault, or None.
        short: part of the short form.
    """

    name: str
    row: str
    command: str = "train"
    start: str = "half"
    fault: str | None = None
    damage: Callable[[World], None] | None = None
    more: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    code: int = 0
    says: tuple[str, ...] = ()
    then: str = "same run"
    steps: tuple[int, ...] | None = None
    short: bool = False


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(len(content[4096:8192]))
    path.write_bytes(content)


def own_cache(world: World) -> None:
    """A corpus of this world alone, so that it may be damaged."""
    shutil.copytree(world.cache, world.folder / "cache", dirs_exist_ok=True)
    world.cache = world.folder / "cache"


def damage_corpus(how: Callable[[Path], None], pattern: str) -> Callable[[World], None]:
    def act(world: World) -> None:
        own_cache(world)
        for path in sorted(world.cache.glob(f"*/{pattern}")):
            how(path)

    return act


def damage_step(how: Callable[[Path], None], name: str, steps: tuple[int, ...] = (4,)) -> Callable[[World], None]:
    def act(world: World) -> None:
        for step in steps:
            how(world.step(step) / name)

    return act


def _empty_text(world: World) -> None:
    (world.folder / "empty").mkdir()
    (world.folder / "empty" / "a.txt").write_text(" \n")


def _short_text(world: World) -> None:
    folder = world.folder / "empty"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"word{i} word{i * 7}")


def _remove_steps(world: World) -> None:
    shutil.rmtree(world.trained / "checkpoints")


_KILL = "kill -9 at any phase"
_SIGNAL = "SIGTERM, SIGINT, SIGUSR1"
_FULL = "disk full"
_DAMAGE = "truncated checkpoint, flipped bit, zeroed page"
_DATA = "corrupt, missing or short data"

# point -> steps that are left afterwards, of a run that goes on from step 4
_BEFORE_THE_NEXT = (
    *("train.setup", "train.data", "train.model", "train.fit", "train.batch", "train.step", "train.validation"),
    *("save.begin", "save.tensors", "save.export", "save.manifest", "save.rename", "write"),
)
_KILLS = dict.fromkeys(_BEFORE_THE_NEXT, (2, 4)) | {
    "save.published": (2, 4, STEPS), "prune.rename": (2, 4, STEPS), "prune.remove": (4, STEPS),
    "train.complete": (4, STEPS),
}  # fmt: skip
_SHORT_KILLS = {"save.rename", "prune.remove"}
_PROBE_KILLS = ("probe.located", "probe.checked", "probe.registered", "probe.cell@5", "probe.tables", "report.write@3")

SCENARIOS: tuple[Scenario, ...] = (
    *(
        Scenario(f"kill at {point}", _KILL, fault=f"{point}:kill", code=KILLED, steps=steps,
                 short=point in _SHORT_KILLS)
        for point, steps in _KILLS.items()
    ),
    Scenario("kill in the middle of writing tensors", _KILL, fault="save.tensors:cut", code=-25, steps=(2, 4),
             short=True),
    Scenario("kill while an export is written", _KILL, fault="save.export:cut", code=-25, steps=(2, 4)),
    *(
        Scenario(f"kill at {point} of a checkpoint in the background", _KILL, start="empty", fault=f"{point}@2:kill",
                 more=("trainer.async_checkpoint=true",), code=KILLED, steps=steps)
        for point, steps in (("save.begin", (2,)), ("save.export", (2,)), ("save.rename", (2,)),
                             ("save.published", (2, 4)))
    ),
    Scenario("term while a checkpoint is written in the background", _SIGNAL, start="empty", fault="save.export:term",
             more=("trainer.async_checkpoint=true", "trainer.max_steps=200"), code=75, says=("SIGTERM",),
             then="nothing"),
    Scenario("disk full while a checkpoint is written in the background", _FULL, start="empty",
             fault="save.tensors@2:full", more=("trainer.async_checkpoint=true",), code=6, steps=(2,), short=True,
             says=("free space",)),
    Scenario("kill between removing and replacing a step", _KILL, fault="save.replace:kill", code=KILLED, steps=(2,),
             damage=damage_step(flip, "training.ckpt"), says=("CORRUPT CHECKPOINT",)),
    Scenario("kill while the text is read", _KILL, start="empty", fault="corpus.read:kill", code=KILLED,
             more=("data.cache_dir={folder}/cache",)),
    Scenario("kill while shards are written", _KILL, start="empty", fault="corpus.shards:kill", code=KILLED,
             more=("data.cache_dir={folder}/cache",)),
    Scenario("kill before shards are published", _KILL, start="empty", fault="corpus.rename:kill", code=KILLED,
             more=("data.cache_dir={folder}/cache",)),
    *(
        Scenario(f"kill a probe at {point}", _KILL, "probe", "trained", fault=f"{point}:kill", code=KILLED,
                 then="same probe")
        for point in _PROBE_KILLS
    ),
    Scenario("kill a probe while it writes a table", _KILL, "probe", "trained", fault="write@3:kill", code=KILLED,
             then="same probe"),
    *(
        Scenario(f"{name} at {point}", _SIGNAL, fault=f"{point}:{name}", code=75, steps=steps,
                 says=(f"SIG{name.upper()}",), short=(name, point) == ("term", "train.batch"))
        for name in ("term", "int", "usr1")
        for point, steps in (("train.data", (2, 4)), ("train.fit", (2, 4)), ("train.batch", (4, 5)))
    ),
    Scenario("term while saving", _SIGNAL, fault="save.export:term", code=0, then="nothing", steps=(4, STEPS)),
    Scenario("term while the text is read", _SIGNAL, start="empty", fault="corpus.read:term", code=75,
             more=("data.cache_dir={folder}/cache",), says=("SIGTERM",)),
    Scenario("term in a probe", _SIGNAL, "probe", "trained", fault="probe.cell@5:term", code=75, then="same probe",
             says=("SIGTERM",)),
    Scenario("disk full while writing tensors", _FULL, fault="save.tensors:full", code=6, steps=(2, 4), short=True,
             says=("free space",)),
    Scenario("disk full while exporting", _FULL, fault="save.export:full", code=6, steps=(2, 4), says=("free space",)),
    Scenario("disk full at the manifest", _FULL, fault="save.manifest:enospc", code=6, steps=(2, 4)),
    Scenario("disk full while metrics are written", _FULL, fault="train.step:enospc", code=6, steps=(2, 4)),
    Scenario("input/output error while saving", _FULL, fault="save.rename:eio", code=6, steps=(2, 4)),
    Scenario("disk full while shards are written", _FULL, start="empty", fault="corpus.shards:enospc", code=6,
             more=("data.cache_dir={folder}/cache",)),
    Scenario("disk full in a probe's tables", _FULL, "probe", "trained", fault="probe.tables:full", code=6,
             then="same probe"),
    Scenario("disk full in a report", _FULL, "probe", "trained", fault="report.write:enospc", code=6,
             then="same probe"),
    *(
        Scenario(f"{how.__name__} {name}, an older checkpoint is there", _DAMAGE, damage=damage_step(how, name),
                 says=("CORRUPT CHECKPOINT", "step_00000004"), steps=(4, STEPS),
                 short=how is flip and name == "training.ckpt")
        for how in (flip, truncate, zero_page)
        for name in ("training.ckpt", "model/model.safetensors")
    ),
    Scenario("flip manifest.json, an older checkpoint is there", _DAMAGE, damage=damage_step(flip, "manifest.json"),
             says=("CORRUPT CHECKPOINT",)),
    Scenario("flip every checkpoint", _DAMAGE, damage=damage_step(flip, "training.ckpt", (2, 4)), code=4,
             says=("none of its 2 checkpoints is intact",), then="again"),
    Scenario("flip what a probe is given", _DAMAGE, "probe", "trained",
             damage=damage_step(flip, "model/model.safetensors", (2, 4, STEPS)), code=4, then="again"),
    Scenario("flip the newest, a probe falls back", _DAMAGE, "probe", "trained",
             damage=damage_step(flip, "model/model.safetensors", (STEPS,)), code=0, says=("CORRUPT CHECKPOINT",),
             then="nothing"),
    Scenario("flip a shard", _DATA, damage=damage_corpus(flip, "train.tokens"), code=3, then="again",
             says=("train.tokens", "bytes 0"), short=True),
    Scenario("truncate a shard", _DATA, damage=damage_corpus(truncate, "train.tokens"), code=3, then="again",
             says=("train.tokens",)),
    Scenario("missing shard", _DATA, damage=damage_corpus(Path.unlink, "validation.tokens"), code=3, then="again",
             says=("validation.tokens", "missing")),
    Scenario("flip the shards' manifest", _DATA, damage=damage_corpus(flip, "manifest.json"), code=3, then="again"),
    Scenario("flip a shard under a probe", _DATA, "probe", "trained", damage=damage_corpus(flip, "probe_pilot.tokens"),
             code=3, then="again", says=("probe_pilot.tokens",)),
    Scenario("empty text", _DATA, start="empty", damage=_empty_text, more=("data.paths=[{folder}/empty]",), code=3,
             then="again"),
    Scenario("text shorter than a window", _DATA, start="empty", damage=_short_text, code=3, then="again",
             more=("data.paths=[{folder}/empty]", "data.sequence_length=4000")),
    Scenario("fewer windows than a batch", _DATA, start="empty", code=3, then="again",
             more=("data.sequence_length=400", "trainer.global_batch_size=4096")),
    Scenario("loss is not finite", "NaN or Inf loss", start="empty", more=("optim.lr=1e30", "optim.grad_clip=0"),
             code=5, then="nothing", says=("not finite", "sample ids"), short=True),
    Scenario("resume=must without a checkpoint", "resume without a checkpoint", start="half", damage=_remove_steps,
             more=("resume=must",), code=4, then="again", says=("resume=must",)),
    Scenario("resume=auto without a checkpoint", "resume without a checkpoint", start="half", damage=_remove_steps,
             code=0, says=("starting afresh",)),
    Scenario("resume=never with checkpoints", "resume without a checkpoint", more=("resume=never",), code=2,
             then="again"),
    Scenario("finished run started again", "finished run started again", start="trained", code=0,
             says=("already complete",), short=True),
    Scenario("finished run whose last checkpoint is damaged", "finished run started again", start="trained",
             damage=damage_step(flip, "training.ckpt", (STEPS,)), code=0, says=("CORRUPT CHECKPOINT",)),
    Scenario("typo in a key", "typo, changed configuration, other tokenizer", more=("trainer.max_step=3",), code=2,
             says=("did you mean 'trainer.max_steps'",), then="again"),
    Scenario("other learning rate and seed than the checkpoint", "typo, changed configuration, other tokenizer",
             more=("resume={trained}", "name=other", "optim.lr=0.5", "seed=3"), code=4,
             says=("optim.lr", "seed: 0 there, 3 here"), then="again"),
    Scenario("other tokenizer than the checkpoint", "typo, changed configuration, other tokenizer",
             more=("resume={trained}", "name=other", "data.vocab_size=290"), code=4, says=("tokenizer_sha256",),
             then="again"),
    Scenario("out of memory in a step", "GPU out of memory", fault="train.step:oom", code=2, steps=(2, 4),
             says=("trainer.micro_batch_size", "trainer.gradient_checkpointing"), short=True),
    Scenario("out of memory in a probe", "GPU out of memory", "probe", "trained", fault="probe.cell@3:oom", code=2,
             says=("probe.batch_size",), then="same probe"),
    *(
        Scenario(f"unsafe loading asked for, {command}", "malicious input", command, "probed",
                 environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}, code=2, says=("unset it",), then="nothing",
                 short=command == "report")
        for command in ("train", "probe", "report")
    ),
)  # fmt: skip
