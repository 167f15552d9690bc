"""`probe.py`: probe a checkpoint against its baseline; prints the verdicts and the path of the report."""

from attnres.commands.hydra_door import Plain, configured_command
from attnres.config import build
from attnres.files.provenance import command_line


def main() -> None:
    configured_command("probe", _probe)


def _probe(plain: Plain) -> None:
    from attnres.probe.config import ProbeConfig
    from attnres.probe.run import probe, verdict_table

    result = probe(build(ProbeConfig, plain), command_line())
    if result is not None:
        print(verdict_table(result.cells))
        print(result.report)
