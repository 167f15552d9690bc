"""What a judgement says, for a terminal and for a table of implementations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from attnres.ops.conformance.judgement import Judgement

_MOST = 3


@dataclass(frozen=True)
class Finding:
    """What one implementation did.

    Attributes:
        report: `report.json` of the worker.
        judgement: None where it could not run.
    """

    report: Mapping[str, Any]
    judgement: Judgement | None


def lines(finding: Finding) -> list[str]:
    """The answer for a terminal: who ran, the verdict, every deviation, what is not offered."""
    report, found = finding.report, finding.judgement
    if found is None:
        return [f"{report['function']}: not run ({report['unavailable']})"]
    said = [f"{report['function']} ({_ran_on(report)})", verdict(found)]
    if found.deviations:
        said.append(f"  {'case':<18}{'output':<18}{'difference':>12}{'tolerance':>12}{'ratio':>10}")
    for check in found.deviations:
        numbers = f"{check.difference:>12.2e}{check.tolerance:>12.2e}{check.ratio:>10.3g}"
        said.append(f"  {check.case:<18}{check.output:<18}{numbers}  {check.remark}".rstrip())
    said += [f"  {case} raised {message}" for case, message in found.raised.items()]
    return said + [f"not offered: {missing}" for missing in not_offered(found)]


def verdict(found: Judgement) -> str:
    """One line: conforms, is a variant, or deviates, with the number of checks."""
    failed, every = len(found.deviations), len(found.checks)
    variant = ", ".join(found.variant)
    if found.agrees:
        return f"this is the variant: {variant} ({every} checks)" if variant else f"conforms ({every} checks)"
    said = [f"deviates in {failed} of {every} checks"] if failed else []
    said += [f"raises in {', '.join(found.raised)}"] if found.raised else []
    said += [f"held to the nearest variant: {variant}"] if variant else []
    return ", ".join(said or ["no case ran"])


def not_offered(found: Judgement) -> list[str]:
    """What the implementation has not, each with the cases that want it."""
    reasons: dict[str, list[str]] = {}
    for case, reason in found.not_offered.items():
        reasons.setdefault(reason, []).append(case)
    return [f"{reason} ({', '.join(cases)})" for reason, cases in reasons.items()]


def rows(findings: Iterable[Finding]) -> str:
    """Rows of a table in Markdown: implementation, ran on, verdict, largest deviations, not offered."""
    said = []
    for finding in findings:
        report, found = finding.report, finding.judgement
        cells = [f"`{report['function']}`", _ran_on(report), "", "", ""]
        if found is None:
            cells[2] = f"not run: {report['unavailable']}"
        else:
            raised = [f"`{case}` raised {message}" for case, message in found.raised.items()]
            cells[2:] = [verdict(found), "; ".join(_largest(found) + raised), "; ".join(not_offered(found))]
        said.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(said)


def _largest(found: Judgement) -> list[str]:
    """The largest deviation of each output, the worst three."""
    worst: dict[str, str] = {}
    for check in sorted(found.deviations, key=lambda check: -check.ratio):
        numbers = f"{check.difference:.1e}, {check.ratio:.3g} tolerances"
        remark = f", {check.remark}" if check.remark else ""
        worst.setdefault(check.output, f"`{check.output}` of `{check.case}` by {numbers}{remark}")
    return list(worst.values())[:_MOST]


def _ran_on(report: Mapping[str, Any]) -> str:
    device = "Triton's interpreter" if report["interpreter"] else report["device"]
    version = report.get("version") or "in no distribution"
    return f"{version}; torch {report['torch']}, {device}"
