"""`python -m attnres.commands.conformance module:function`: does an implementation of the read compute the read?"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnres.commands.door import parsed_command
from attnres.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from attnres.ops.conformance.words import Finding

_DESCRIPTION = """\
Runs an implementation of the read on golden vectors, in a process of its own, and prints what deviates and by how much.
The function is called with the keywords sources, query, key_weight, bias, eps (those that it has), and returns the mix
or (mix, routing weights). Exit code 5 where something deviates, 2 where it cannot be imported. The adapters of known
peers are found by their name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m attnres.commands.conformance", description=_DESCRIPTION)
    parser.add_argument("functions", nargs="+", metavar="module:function")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has it; PYTHONPATH is left out then")
    parser.add_argument("--adapter", help="module:function that makes a function of these keywords of the one named")
    parser.add_argument("--stacked", action="store_true", help="sources as one tensor [S, B, T, D], not a list")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--variant", action="append", help="hold it to this variant of the read, not to the read")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each function")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add rows to a table in Markdown")
    return parsed_command(parser, _conformance, arguments)


def _conformance(given: Namespace) -> int:
    from attnres.ops.conformance.vectors import VARIANTS
    from attnres.ops.conformance.words import lines, rows

    if wrong := set(given.variant or ()) - set(VARIANTS):
        raise ConfigError(f"--variant {sorted(wrong)[0]!r}: expected one of {', '.join(map(repr, VARIANTS))}")
    findings = [_finding(function, given) for function in given.functions]
    print("\n\n".join("\n".join(lines(finding)) for finding in findings))
    if given.append:
        with given.append.open("a", encoding="utf-8") as file:
            file.write(rows(findings))
    for finding in findings:
        if finding.judgement is None:
            raise ConfigError(f"{finding.report['function']}: {finding.report['unavailable']}")
    judgements = [finding.judgement for finding in findings if finding.judgement is not None]
    # A variant is not the read, unless it was asked for.
    conform = all(one.agrees and (given.variant or not one.variant) for one in judgements)
    return 0 if conform else NumericsError.code


def _finding(function: str, given: Namespace) -> "Finding":
    """Runs one function in a process of its own and judges what it wrote."""
    from safetensors.torch import load_file

    from attnres.ops import conformance
    from attnres.ops.conformance.judgement import judge
    from attnres.ops.conformance.words import Finding

    folder = Path(conformance.__file__).parent
    environment = dict(os.environ)
    if given.python != sys.executable:
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as out:
        command = [given.python, str(folder / "worker.py"), str(folder), out, function, "--device", given.device]
        command += ["--adapter", given.adapter] if given.adapter else []
        command += ["--stacked"] if given.stacked else []
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=given.timeout)
        except OSError as missing:
            raise ConfigError(f"--python {given.python}: {missing.strerror}; name an interpreter") from missing
        except subprocess.TimeoutExpired as late:
            raise NumericsError(f"{function}: not done after {late.timeout:g} s; give --timeout more") from late
        written = Path(out) / "report.json"
        if not written.exists():
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"--python {given.python}: {said}; it needs torch and safetensors")
        report = json.loads(written.read_text(encoding="utf-8"))
        if "unavailable" in report:
            return Finding(report, None)
        if done.returncode:
            raise NumericsError(f"{function}: the process ended with {done.returncode} in case {report['running']}")
        found = load_file(Path(out) / "outputs.safetensors")
        variant = None if given.variant is None else tuple(given.variant)
        return Finding(report, judge(found, report["raised"], report["not_offered"], variant))


if __name__ == "__main__":
    sys.exit(main())
