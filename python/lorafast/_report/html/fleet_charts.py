"""Charts of a fleet for plotly: traces and layouts as plain objects.

Distributions are counted here, so that a page of ten thousand adapters is not larger than one of
ten.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafast._analysis.names import labels_of
from lorafast._fleet.table import Table
from lorafast._report import palette
from lorafast._report.html import chart
from lorafast._report.html.chart import Chart, numbers, text
from lorafast._report.html.fleet_places import layers_of, places
from lorafast._words import plural

if TYPE_CHECKING:
    from lorafast._fleet.fleet import Fleet

#: Without the black, which would not be seen on a dark ground.
COLORS = palette.COLORS[:-1]
BINS = 40
#: Different values that have a bar each; more are counted in bins.
MAX_BARS = 24
#: Points of a scatter plot; more are one blot and make the page slow.
MAX_POINTS = 5000
#: Bases with a color of their own; the others share one.
MAX_BASES = len(COLORS) - 1
#: Cells along a side of the matrix; beyond, neighbours in its order are averaged.
MAX_CELLS = 500
#: Names along the matrix that can be read.
MAX_NAMES = 60
OTHERS = "other bases"


def charts(fleet: Fleet) -> list[Chart]:
    """All charts that the fleet's level of metrics allows."""
    made: list[Chart | None] = []
    if "frobenius_norm" in fleet.adapters:
        made += [
            _norms(fleet.adapters),
            _scatter(fleet.adapters),
            _spectra(fleet.modules),
            _use_of_rank(fleet.modules),
            *places(fleet),
        ]
    if "zero_share" in fleet.adapters:
        made.append(_weights(fleet.adapters))
    made += [
        _counts(fleet.adapters, column, title, f"The {column} of most modules of each adapter.")
        for column, title in (("rank", "Ranks"), ("scaling", "Scales"))
    ]
    return [chart for chart in made if chart is not None]


def _log_histogram(values: NDArray[Any], title: str, caption: str, axis: str) -> Chart | None:
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return None
    powers = np.log10(positive)
    low, high = float(powers.min()), float(powers.max())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(powers, bins=BINS, range=(low, high))
    bars = 10**edges
    hover = [
        f"{10**start:.4g} to {10**end:.4g}<br>{plural(count, 'adapter')}"
        for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    trace = {
        "type": "bar",
        "x": numbers(bars[:-1]),
        "y": counts.tolist(),
        "width": numbers(np.diff(bars)),
        "offset": 0,
        "marker": {"color": COLORS[0]},
        "hovertext": hover,
        "hoverinfo": "text",
    }
    layout = {
        "xaxis": {**chart.logarithmic(low, high), "title": {"text": axis}},
        "yaxis": _counted(counts),
        "bargap": 0.03,
    }
    return Chart(title, caption, [trace], layout)


def _counted(counts: NDArray[Any]) -> dict[str, Any]:
    """An axis of numbers of adapters, of which there are no halves."""
    ticks = {"dtick": 1} if counts.max() <= 5 else {}
    return {"title": {"text": "adapters"}, **ticks, "range": chart.from_zero(float(counts.max()))}


def _norms(adapters: Table) -> Chart | None:
    caption = "Frobenius norm of all updates of an adapter together, √Σ‖ΔW‖². Zero is left out."
    return _log_histogram(adapters["frobenius_norm"], "Norms of the updates", caption, "‖ΔW‖")


def _weights(adapters: Table) -> Chart | None:
    caption = "Standard deviation of all stored values of an adapter, A and B together."
    return _log_histogram(adapters["std"], "Spread of the stored weights", caption, "std")


def _scatter(adapters: Table) -> Chart | None:
    norms, ranks = adapters["frobenius_norm"], adapters["mean_effective_rank"]
    drawn = np.flatnonzero(np.isfinite(norms) & (norms > 0) & np.isfinite(ranks))
    if not len(drawn):
        return None
    caption = "Each point is an adapter."
    if len(drawn) > MAX_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(drawn, MAX_POINTS, replace=False))
        caption = f"Each point is an adapter; {MAX_POINTS:,} of them, drawn at random."
    bases = [text(base) for base in adapters["base"].tolist()]
    names = adapters["name"].tolist()
    frequent = [base for base, _ in Counter(bases[p] for p in drawn.tolist()).most_common()]
    own = frequent if len(frequent) <= len(COLORS) else frequent[:MAX_BASES]
    groups = [*own, OTHERS] if len(own) < len(frequent) else own
    traces = []
    for color, group in zip(COLORS, groups, strict=False):
        here = [p for p in drawn.tolist() if (bases[p] if bases[p] in own else OTHERS) == group]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": group,
                "x": numbers(norms[here]),
                "y": numbers(ranks[here]),
                "text": [text(names[p]) for p in here],
                "hovertemplate": "<b>%{text}</b><br>‖ΔW‖ %{x:.4g}<br>"
                "mean effective rank %{y:.3g}<extra></extra>",
                "marker": {"color": color, "size": 7, "opacity": 0.75},
            }
        )
    low, high = np.log10([norms[drawn].min(), norms[drawn].max()]).tolist()
    layout = {
        "xaxis": {**chart.logarithmic(low, high), "title": {"text": "‖ΔW‖"}},
        "yaxis": {
            "title": {"text": "mean effective rank"},
            "range": chart.from_zero(float(ranks[drawn].max())),
        },
        "hovermode": "closest",
        "showlegend": len(groups) > 1,
    }
    return Chart("Norm and effective rank", caption, traces, layout)


def _spectra(modules: Table) -> Chart | None:
    values, offsets = modules.flat("singular_values")
    lengths = np.diff(offsets)
    starts = offsets[:-1]
    has_any = lengths > 0
    first = np.zeros(len(lengths))
    first[has_any] = values[starts[has_any]]
    alive = np.isfinite(first) & (first > 0)
    if not alive.any():
        return None
    longest = int(lengths[alive].max())
    places = np.unique(np.geomspace(1, longest, num=64).round().astype(int))
    bands: dict[str, list[float]] = {"10 %": [], "median": [], "90 %": []}
    for place in places.tolist():
        here = alive & (lengths >= place)
        ratio = values[starts[here] + place - 1] / first[here]
        low, middle, high = np.quantile(ratio, (0.1, 0.5, 0.9))
        for key, value in zip(bands, (low, middle, high), strict=True):
            bands[key].append(float(value))
    x = places.tolist()
    color = COLORS[0]
    edge = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "showlegend": False}
    hover = "k = %{x}<br>%{y:.4g}"
    traces = [
        {**edge, "name": "90 %", "y": bands["90 %"], "hovertemplate": hover},
        {
            **edge,
            "name": "10 %",
            "y": bands["10 %"],
            "fill": "tonexty",
            "fillcolor": palette.BAND,
            "hovertemplate": hover,
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "median",
            "x": x,
            "y": bands["median"],
            "line": {"color": color},
            "marker": {"size": 5},
            "hovertemplate": hover,
        },
    ]
    layout = {
        "xaxis": {
            "title": {"text": "k"},
            **(
                chart.logarithmic(0, float(np.log10(longest)))
                if longest > 32
                else {"range": chart.linear(1, longest), "dtick": chart.whole(longest)}
            ),
        },
        "yaxis": {"title": {"text": "σₖ/σ₁"}, "range": chart.from_zero(max(bands["90 %"]))},
        "hovermode": "x unified",
        "showlegend": False,
    }
    caption = (
        "Singular values of ΔW relative to the greatest: the median of all modules that have as "
        "many, and the range from 10 % to 90 % of them."
    )
    return Chart("Spectra", caption, traces, layout)


def _use_of_rank(modules: Table) -> Chart | None:
    share = modules["effective_rank"] / np.minimum(
        modules["rank"], np.minimum(modules["out_features"], modules["in_features"])
    )
    rows = []
    for layer, here in layers_of(modules):
        values = share[here]
        values = values[np.isfinite(values)]
        if len(values):
            rows.append((layer, np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))))
    if not rows:
        return None
    quantiles = np.array([row[1] for row in rows])
    trace = {
        "type": "box",
        "orientation": "h",
        "y": [text(layer) for layer, _ in rows],
        **{
            key: numbers(quantiles[:, place])
            for place, key in enumerate(("lowerfence", "q1", "median", "q3", "upperfence"))
        },
        "marker": {"color": COLORS[2]},
        "line": {"width": 1.3},
        "hoverinfo": "x",
        "xhoverformat": ".3f",
    }
    layout = {
        "xaxis": {"title": {"text": "effective rank / rank"}, "range": [0, 1.02]},
        "yaxis": {
            "automargin": True,
            "range": chart.categories(len(rows), down=True),
            "type": "category",
        },
    }
    caption = (
        "How much of the rank the updates use, by layer: quartiles, and whiskers from 5 % to 95 % "
        "of the modules."
    )
    return Chart("Use of the rank", caption, [trace], layout, height=max(340, 90 + 22 * len(rows)))


def _counts(adapters: Table, column: str, title: str, caption: str) -> Chart | None:
    values = adapters[column]
    values = values[np.isfinite(values) & (values != -1)]
    if not len(values):
        return None
    found, counts = np.unique(values, return_counts=True)
    if len(found) > MAX_BARS:
        return _log_histogram(values, title, caption, column)
    trace = {
        "type": "bar",
        "x": [f"{value:g}" for value in found.tolist()],
        "y": counts.tolist(),
        "marker": {"color": COLORS[3] if column == "rank" else COLORS[5]},
        "hovertemplate": f"{column} %{{x}}<br>%{{y:,}} adapters<extra></extra>",
    }
    # One bar or two are no wider than one of four.
    beside = max(0, 4 - len(found)) / 2
    layout = {
        "xaxis": {
            "type": "category",
            "title": {"text": column},
            "range": [-0.5 - beside, len(found) - 0.5 + beside],
        },
        "yaxis": _counted(counts),
        "bargap": 0.35,
    }
    return Chart(title, caption, [trace], layout, height=300)


def matrix(names: Sequence[str], cosine: NDArray[Any]) -> Chart:
    """The cosines of all pairs, in an order that puts like beside like."""
    order = similar_order(cosine)
    ordered = cosine[np.ix_(order, order)]
    # What every adapter has with itself would outshine the rest.
    ordered[np.diag_indices(len(ordered))] = math.nan
    labels = [text(names[position]) for position in order.tolist()]
    short = labels_of(names)
    caption = "Cosine of the updates of each pair, in the order of a hierarchical clustering."
    end = palette.cosine_end(ordered)
    if end < 1:
        caption += f" The colors end at ±{end:g}."
    count = len(labels)
    has_gaps = not np.isfinite(cosine).all()
    caption += " Grey: each adapter with itself"
    caption += ", adapters of different bases, or no finite update." if has_gaps else "."
    if count > MAX_CELLS:
        edges = np.linspace(0, count, MAX_CELLS + 1).round().astype(int)
        ordered = _averaged(ordered, edges)
        caption += (
            f" {count:,} adapters are too many to be shown one by one: each cell is the mean of "
            f"neighbours in that order."
        )
        labels = [
            labels[start] if end - start == 1 else f"{labels[start]} … {labels[end - 1]}"
            for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]
    has_names = len(labels) <= MAX_NAMES
    positions = list(range(len(labels)))
    ticks = {
        "showticklabels": has_names,
        "tickvals": positions if has_names else [],
        "ticktext": [text(_short(short[position])) for position in order.tolist()]
        if has_names
        else [],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
        "constrain": "domain",
    }
    trace = {
        "type": "heatmap",
        "z": [numbers(row, 5) for row in ordered],
        "x": positions,
        "y": positions,
        "zmin": -end,
        "zmax": end,
        "colorscale": [
            [place / (len(palette.COSINE) - 1), color] for place, color in enumerate(palette.COSINE)
        ],
        "colorbar": {"title": {"text": "cosine"}, "thickness": 14},
        "names": labels,
        "hoverinfo": "none",
    }
    layout: dict[str, Any] = {
        "xaxis": {**ticks, "tickangle": -60, "range": chart.categories(len(labels))},
        "yaxis": {**ticks, "range": chart.categories(len(labels), down=True), "scaleanchor": "x"},
        "plot_bgcolor": GAP,
    }
    return Chart(
        "Similarity of each pair",
        caption,
        [trace],
        layout,
        height=min(760, 420 + 24 * count),
        wide=True,
    )


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:12]}…{name[-27:]}"


def _averaged(values: NDArray[Any], edges: NDArray[Any]) -> NDArray[Any]:
    """Means of the finite values of blocks."""
    finite = np.isfinite(values)
    kept = np.where(finite, values, 0.0)
    sums, counts = (
        np.add.reduceat(np.add.reduceat(part, edges[:-1], axis=0), edges[:-1], axis=1)
        for part in (kept, finite.astype(np.float64))
    )
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts)


#: Behind the cells that have no cosine, unlike any color of one.
GAP = "#c4c8ce"
#: Farther than any two that have a cosine, so that those of one base stand together.
NO_COSINE = 4.0


def similar_order(cosine: NDArray[Any]) -> NDArray[np.int64]:
    """An order of the adapters in which similar ones stand beside each other.

    The leaves of an average-linkage tree where SciPy is installed; else the order along the
    direction of the greatest variance of the matrix's rows.
    """
    finite = np.isfinite(cosine)
    known = np.where(finite, cosine, 0.0).astype(np.float64)
    count = len(known)
    if count < 3:
        return np.arange(count)
    try:
        from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
        from scipy.spatial.distance import squareform
    except ImportError:
        centred = known - known.mean(axis=0)
        direction = np.linalg.svd(centred, full_matrices=False)[2][0]
        # What has cosines with the same adapters, those of its base, stands together.
        return np.lexsort((centred @ direction, finite.argmax(axis=1)))
    distance = np.clip(1.0 - (known + known.T) / 2, 0.0, 2.0)
    distance[~(finite & finite.T)] = NO_COSINE
    np.fill_diagonal(distance, 0.0)
    condensed = squareform(distance, checks=False)
    tree = linkage(condensed, "average")
    if count <= MAX_CELLS:
        tree = optimal_leaf_ordering(tree, condensed)
    return np.asarray(leaves_list(tree), dtype=np.int64)
