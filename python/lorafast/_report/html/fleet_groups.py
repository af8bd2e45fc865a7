"""Matrices of a fleet's cosines: one for each group of adapters that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._fleet.findings import listed
from lorafast._report.html import fleet_charts
from lorafast._report.html.fleet_places import MAX_HEATMAPS, architectures_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorafast._fleet.fleet import Fleet
    from lorafast._report.html.chart import Chart


def matrices(
    fleet: Fleet, names: Sequence[str], cosine: NDArray[Any]
) -> tuple[list[Chart], list[str]]:
    """A matrix for each group of adapters of one architecture that have cosines.

    Args:
        fleet: what the architectures are known by.
        names: of the adapters compared, which need not be the fleet's.
        cosine: of each two of them, NaN where there is none.

    Returns:
        The charts, those of the most adapters first, and sentences about what has none.
    """
    architecture_of = {
        fleet.names[member]: number
        for number, architecture in enumerate(architectures_of(fleet))
        for member in architecture.members
    }
    kinds = np.array([architecture_of.get(name, -1) for name in names])
    is_compared = np.isfinite(cosine) & (kinds[:, None] == kinds[None, :])
    groups = sorted(_components(is_compared), key=lambda group: -len(group))
    several = [group for group in groups if len(group) > 1]
    alone = [int(group[0]) for group in groups if len(group) == 1]
    base_of = dict(zip(fleet.names, fleet.adapters["base"].tolist(), strict=True))
    charts, notes = [], []
    for group in several[:MAX_HEATMAPS]:
        own = [names[position] for position in group.tolist()]
        chart = fleet_charts.matrix(own, cosine[np.ix_(group, group)])
        if len(groups) > 1:
            bases = dict.fromkeys(base_of.get(name) or "no base named" for name in own)
            chart = replace(chart, title=f"{chart.title}: {listed(list(bases))}")
        charts.append(chart)
    left = several[MAX_HEATMAPS:]
    if left:
        count = sum(map(len, left))
        groups_are = "group is" if len(left) == 1 else "groups are"
        notes.append(f"{len(left):,} smaller {groups_are} not drawn: {count:,} adapters in all.")
    if alone:
        who = listed([names[position] for position in alone])
        verb = "has" if len(alone) == 1 else "have"
        notes.append(
            f"{who} {verb} no cosine with any other adapter. An adapter has none that is the only "
            "one of its base, or whose update is not finite."
        )
    return charts, notes


def _components(is_joined: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Groups of positions that a chain of joined pairs connects, each in ascending order."""
    is_left = np.ones(len(is_joined), dtype=np.bool_)
    groups = []
    for first in range(len(is_joined)):
        if not is_left[first]:
            continue
        group = np.zeros(len(is_joined), dtype=np.bool_)
        group[first] = True
        fresh = group
        while fresh.any():
            fresh = is_joined[fresh].any(axis=0) & ~group
            group = group | fresh
        is_left &= ~group
        groups.append(np.flatnonzero(group))
    return groups
