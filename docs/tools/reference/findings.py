"""docs/reference/findings.md: every kind of finding, with its threshold, cause and remedy."""

from __future__ import annotations

from lorafast._analysis import findings as of_analysis
from lorafast._fleet import findings as of_fleet
from lorafast._fleet.explanations import EXPLANATIONS

from reference.words import GENERATED, sentence

INTRODUCTION = f"""\
{GENERATED}

# Findings

`lorafast analyze`, `compare` and `scan` point at what an expert would look at. Every finding has
a severity, a kind (below), a reason in a sentence and mostly a figure; all follow from figures of
ΔW = s·B·A or from the config. `--check` ends with exit code 3 where one is critical, and
`scan --check=warning` where one is a warning or more.
"""


def render() -> str:
    """The page."""
    constants = vars(of_analysis) | vars(of_fleet)
    lines = [INTRODUCTION.rstrip("\n")]
    for kind, entry in EXPLANATIONS.items():
        lines += [
            "",
            f"## {kind}",
            "",
            sentence(entry.meaning),
            "",
            f"- **Severity**: {entry.severity}",
            f"- **Threshold**: {entry.threshold.format(**constants)}",
            f"- **Cause**: {entry.cause}",
            f"- **Remedy**: {entry.remedy}",
        ]
    return "\n".join(lines) + "\n"
