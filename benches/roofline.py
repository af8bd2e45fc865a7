"""Draw merges under the machine's roofs, from the figures that merge.py writes.

    python benches/merge.py --case linear --json figures.json
    python benches/roofline.py figures.json docs/images/roofline.svg

Across: arithmetic intensity, the products' multiplications and additions for each byte of the
checkpoint that is read or written. Up: how many of them a second. The slanting roof is copying on
that file system, the level one the fused multiply-adds of all cores on registers alone. Each rank
stands where its median is, with a line over all rounds, as a whole process and, hollow, as a call
in a warm one; a tick is the target, so many times what cp took in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

COLORS = {"lorafast": "#0b5fa5", "in process": "#c2571a"}
LABELS = {"lorafast": "whole process", "in process": "call in a warm process"}


def points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of each way of lorafast's in each setup of the linear case."""
    found = []
    for setup in result["setups"]:
        if setup["case"] != "linear":
            continue
        ways = {way["name"]: way for way in setup["ways"]}
        copy = statistics.median(run["seconds"] for run in ways["cp"]["runs"])
        targets = {over: limit for over, under, limit in setup["targets"] if under == "cp"}
        for name in LABELS:
            way = ways[name]
            work = way["operations"] / 1e9
            rates = sorted(work / run["seconds"] for run in way["runs"])
            limit = targets.get(name)
            found.append(
                {
                    "title": setup["title"],
                    "way": name,
                    "intensity": way["operations"] / (2 * way["bytes"]),
                    "rate": statistics.median(rates),
                    "range": (rates[0], rates[-1]),
                    "target": None if limit is None else work / (limit * copy),
                }
            )
    return found


def draw(result: dict[str, Any], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = points(result)
    if not drawn:
        raise SystemExit("error: the figures hold no linear case")
    ceilings = next(s["ceilings"] for s in result["setups"] if s["case"] == "linear")
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    draw_roofs(axes, drawn, ceilings)
    for point in drawn:
        draw_point(axes, point)
    label_axes(axes, ceilings)
    axes.set_title(
        "Merging an adapter on every linear layer,"
        f" {result['options']['base_dtype']} weights\n"
        f"{result['processor']}, {result['processors']} processors",
        fontsize=11,
        loc="left",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    plt.rcParams["svg.hashsalt"] = "roofline"
    metadata = {"Date": None} if target.suffix == ".svg" else None
    figure.savefig(target, dpi=150, metadata=metadata)


def draw_roofs(axes: Any, drawn: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    import numpy as np

    # Bytes are counted as they are read and as they are written.
    bandwidth = 2 * max(ceilings["copy"], ceilings["copy_threads"])
    by_cp = 2 * ceilings["copy"]
    peak = ceilings["single"] or np.inf
    least = min(point["intensity"] for point in drawn) / 2.5
    most = max(point["intensity"] for point in drawn) * 3
    if ceilings["single"]:
        most = max(most, 3 * peak / bandwidth)
    across = np.geomspace(least, most, 400)
    roof = np.minimum(bandwidth * across, peak)
    axes.plot(across, roof, color="#333333", linewidth=2)
    slanting = across[by_cp * across <= peak]
    axes.plot(slanting, by_cp * slanting, color="#888888", linewidth=1, linestyle="--")
    axes.fill_between(across, roof, roof.max() * 100, color="#f4f4f4", linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(least, most)
    lowest = min(point["range"][0] for point in drawn)
    axes.set_ylim(min(lowest, roof[0]) / 1.5, roof.max() * 4)
    if ceilings["single"]:
        axes.annotate(
            f"f32 peak, {ceilings['threads']} cores: {peak:.0f} GFLOP/s",
            (most, peak),
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
        )


def draw_point(axes: Any, point: dict[str, Any]) -> None:
    color, whole = COLORS[point["way"]], point["way"] == "lorafast"
    at = point["intensity"]
    axes.vlines(at, *point["range"], color=color, linewidth=1.5, alpha=0.6)
    axes.plot(at, point["rate"], **mark(point["way"]))
    if point["target"] is not None:
        style = {"marker": "_", "markersize": 22, "markeredgewidth": 2.5}
        axes.plot(at, point["target"], color=color, **style)
    if whole:
        axes.annotate(
            point["title"],
            (at, point["rate"]),
            xytext=(10, -14),
            textcoords="offset points",
        )


def mark(way: str) -> dict[str, Any]:
    color = COLORS[way]
    return {
        "marker": "o",
        "markersize": 8,
        "linestyle": "",
        "markerfacecolor": color if way == "lorafast" else "white",
        "markeredgecolor": color,
        "markeredgewidth": 1.6,
    }


def label_axes(axes: Any, ceilings: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("arithmetic intensity, FLOP for each byte read or written")
    axes.set_ylabel("GFLOP/s")
    axes.grid(color="#e4e4e4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    best = "by cp" if ceilings["copy"] >= ceilings["copy_threads"] else "by threads"
    rate = max(ceilings["copy"], ceilings["copy_threads"])
    roof, cp = f"copying {best}, {rate:.1f} GB/s of the file", f"cp, {ceilings['copy']:.1f} GB/s"
    handles = [Line2D([], [], color="#333333", linewidth=2, label=roof)]
    if best != "by cp":
        handles.append(Line2D([], [], color="#888888", linestyle="--", label=cp))
    handles += [Line2D([], [], label=label, **mark(way)) for way, label in LABELS.items()]
    target = {"linestyle": "", "marker": "_", "markersize": 16, "markeredgewidth": 2.5}
    handles.append(Line2D([], [], color="#333333", label="target", **target))
    axes.legend(handles=handles, loc="upper left", framealpha=1, fontsize=9)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path, help="what merge.py --json wrote")
    parser.add_argument("picture", type=Path, help="an .svg or .png file")
    options = parser.parse_args()
    draw(json.loads(options.figures.read_text()), options.picture)


if __name__ == "__main__":
    main()
