"""What the kinds of finding mean that only a fleet has, as `_analysis/explanations.py` says it."""

from __future__ import annotations

from lorafast._analysis import explanations
from lorafast._analysis.explanations import Explanation

#: All kinds there are.
EXPLANATIONS = explanations.EXPLANATIONS | {
    "same_file": Explanation(
        "adapters whose weights files are the same",
        "note",
        "Two weights files with the same bytes.",
        "One was copied or linked.",
        "Keep one of them.",
    ),
    "norm_outlier": Explanation(
        "the norm is far from that of the other adapters of its base",
        "warning",
        "‖ΔW‖ more than {NORM_OUTLIER:g} times above or below the median of its base's "
        "adapters, of "
        "at least {MIN_ADAPTERS_TO_JUDGE}.",
        "Another scale, another length of training, or a training that diverged.",
        "`lorafast analyze` shows which modules it is.",
    ),
    "several_bases": Explanation(
        "adapters of several bases",
        "note",
        "The configs name two bases or more.",
        "Adapters of several models lie together.",
        "Nothing; only those of one base can be merged or compared with each other.",
    ),
}
