"""`train.py`: train one run, or several with `-m`; prints the run folder."""

from attnres.commands.hydra_door import Plain, configured_command
from attnres.config import build
from attnres.files.provenance import command_line


def main() -> None:
    configured_command("train", _train)


def _train(plain: Plain) -> None:
    from attnres.training.config import TrainConfig
    from attnres.training.fit import train

    print(train(build(TrainConfig, plain), command_line()))
