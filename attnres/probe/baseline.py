"""From `ckpt=` and `baseline=` to verified Hugging Face folders."""

import logging

from attnres.errors import ConfigError
from attnres.model.locate import Located, locate, read_json, vanilla_runs

__all__ = ["Located", "locate", "locate_baseline"]

log = logging.getLogger(__name__)


def locate_baseline(path: str | None, trained: Located) -> Located:
    """The vanilla baseline: what was named, or the run beside the checkpoint that saw the same data.

    Raises:
        ConfigError: where none is named and none matches.
        CheckpointError: as `locate`.
    """
    if path is not None:
        return locate(path)
    remedy = (
        "name one with baseline=PATH, or train it: python train.py +experiment=vanilla_tiny "
        "(or the vanilla_* of your experiment)"
    )
    beside = trained.folder.parents[3] if trained.finished is not None else None
    if beside is None:
        raise ConfigError(
            f"baseline: {trained.folder} is not inside a runs folder, so no vanilla run is beside it; {remedy}"
        )
    shape = read_json(trained.folder / "config.json")
    matches = vanilla_runs(beside, trained.data, shape, trained.training.get("seed"))
    if not matches:
        raise ConfigError(
            f"baseline: no vanilla run in {beside} has the data, tokenizer and shape of {trained.run}; {remedy}"
        )
    if len(matches) > 1:
        log.info("baseline: %d vanilla runs match; taking the newest, %s", len(matches), matches[-1])
    return locate(str(matches[-1]))
