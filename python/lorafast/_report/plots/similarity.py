"""The clustered matrix of many adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._analysis.names import labels_of
from lorafast._report.plots.canvas import drawn
from lorafast._report.plots.cosines import WRITTEN, draw_bar, draw_matrix
from lorafast._report.plots.fonts import use_fonts, width
from lorafast._report.plots.style import (
    LABEL_SIZE,
    TICK_SIZE,
    new_figure,
    thin_ticks,
    truncate_all,
)
from lorafast._similarity.clusters import cosines, hierarchy, tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lorafast._similarity.similarity import Similarity

#: Longest name beside the matrix, in characters.
NAME = 36
#: Room for the labels of 8 points, in inches a label.
LABEL_HEIGHT = 0.16


def clustered(similarity: Similarity, method: str, ax: Axes | None = None) -> Figure:
    """Draws the cosines, similar adapters side by side, with the dendrogram of each base.

    Args:
        similarity: what to draw.
        method: how the distance of two clusters follows from their members'.
        ax: the axes whose place the plot takes; a new figure is made if `None`.
    """
    figure = drawn(lambda: _clustered(similarity, method), ax)
    use_fonts(figure)
    return figure


def _clustered(similarity: Similarity, method: str) -> Figure:
    matrix = cosines(similarity.metric, similarity.matrix, similarity.norms)
    order, trees = _order(similarity, matrix, method)
    count = len(order)
    side = min(18.0, max(4.0, 0.45 * count if count <= WRITTEN else LABEL_HEIGHT * count))
    title = f"Cosine of the updates of {count:,} adapters"
    shown = matrix[np.ix_(order, order)]
    reasons = [
        *(["of different bases"] if len(similarity.groups) > 1 else []),
        *([] if np.isfinite(matrix.diagonal()).all() else ["of zero or non-finite updates"]),
    ]
    if reasons:
        title += f"\n(none: {', or '.join(reasons)})"
    labels = labels_of(similarity.names)
    names = truncate_all([labels[at] for at in order], NAME)
    room = 0.075 * max(map(width, names), default=0)
    figure = new_figure(side + room + 3.2, side + room + 1.0, title)
    left, right = figure.subplots(
        1, 2, width_ratios=[1.4, side + room], gridspec_kw={"wspace": 0.0}
    )
    image, words = draw_matrix(right, shown, size=7, aspect="auto")
    right.yaxis.tick_right()
    right.tick_params(labelsize=TICK_SIZE, length=2)
    most = max(1, int(side / LABEL_HEIGHT))
    thin_ticks(right, "y", names, most)
    thin_ticks(right, "x", names, most, rotation=90)
    for text in right.get_xticklabels():
        text.set(va="center")
    _dendrograms(left, trees, count)
    draw_bar(figure, right, image, words, shrink=0.6, fraction=0.04)
    return figure


def _order(
    similarity: Similarity, matrix: Any, method: str
) -> tuple[list[int], list[tuple[int, Any]]]:
    """The adapters base after base, similar ones side by side; each base's tree and its place."""
    order: list[int] = []
    trees: list[tuple[int, Any]] = []
    for members in similarity.groups.values():
        known = [at for at in members if np.isfinite(matrix[at, at])]
        if len(known) > 1:
            joined = hierarchy().optimal_leaf_ordering(
                tree(matrix, known, method), _condensed(matrix, known)
            ) if len(known) <= 500 else tree(matrix, known, method)  # fmt: skip
            trees.append((len(order), joined))
            order += [known[leaf] for leaf in hierarchy().leaves_list(joined)]
        else:
            order += known
        order += [at for at in members if not np.isfinite(matrix[at, at])]
    return order, trees


def _condensed(matrix: Any, positions: list[int]) -> Any:
    rows, columns = np.triu_indices(len(positions), 1)
    return np.maximum(1.0 - matrix[np.ix_(positions, positions)][rows, columns], 0.0)


def _dendrograms(axes: Axes, trees: list[tuple[int, Any]], count: int) -> None:
    from matplotlib.collections import LineCollection

    deepest = 0.0
    for start, joined in trees:
        axes.add_collection(LineCollection(_links(joined, start), colors="#333333", linewidths=0.8))
        deepest = max(deepest, float(joined[:, 2].max()))
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlim(deepest * 1.05 or 1.0, 0.0)
    axes.set_yticks([])
    axes.set_xlabel("1 − cosine", fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _links(joined: Any, start: int) -> list[list[tuple[float, float]]]:
    """A bracket for each two clusters that are joined, the leaves in their rows from `start` on.

    SciPy's own dendrogram descends the tree by recursion, and long chains end at Python's limit.
    """
    leaves = len(joined) + 1
    places, depths = np.empty(2 * leaves - 1), np.zeros(2 * leaves - 1)
    places[hierarchy().leaves_list(joined)] = start + np.arange(leaves)
    links = []
    for number, (one, other, depth, _) in enumerate(joined):
        children = sorted((int(one), int(other)), key=lambda child: places[child])
        first, last = (float(places[child]) for child in children)
        corners = [(float(depths[children[0]]), first), (depth, first), (depth, last)]
        links.append([*corners, (float(depths[children[1]]), last)])
        places[leaves + number] = (first + last) / 2
        depths[leaves + number] = depth
    return links
