"""Plots on a page, each drawn for a light and for a dark ground."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._errors import MissingDependencyError
from lorafast._report.html.dark import darken
from lorafast._report.html.elements import Section, element, section
from lorafast._report.html.subsets import architectures_of, subset
from lorafast._report.plots.draw import draw, plots_of
from lorafast._report.plots.png import png

#: Plots in which modules stand beside each other, and adapters with no modules in common do not
#: belong.
BY_ARCHITECTURE = ("cosine", "modules")
#: Architectures that have pictures of their own.
MAX_ARCHITECTURES = 6


def plots(subject: AdapterAnalysis | Comparison) -> Section:
    """The plots of a result's page, each with what it shows, or why there are none."""
    pictures = []
    for kind, part, caption in _to_draw(subject):
        try:
            figure = draw(part, kind)
        except MissingDependencyError as error:
            return section("Plots", element("p", f"There are no plots here: {error}."))
        light = _data(png(figure))
        darken(figure)
        # Of the two the style sheet shows one. A browser that prints would keep the source that a
        # <picture> has on its screen.
        images = [
            element("img", src=light, alt=caption, class_="on-light"),
            element("img", src=_data(png(figure)), alt=caption, class_="on-dark"),
        ]
        # Where it is narrower than its picture, it scrolls, and the script makes it a tab stop.
        shown = element("div", *images, class_="picture")
        pictures.append(element("figure", shown, element("figcaption", caption)))
    return section("Plots", *pictures)


def _to_draw(
    subject: AdapterAnalysis | Comparison,
) -> Iterator[tuple[str, AdapterAnalysis | Comparison, str]]:
    """The plots of a page: the kind, what to draw of the result, and the caption."""
    found = architectures_of(subject) if isinstance(subject, Comparison) else []
    compared = [one for one in found if len(one.members) > 1]
    for plot in plots_of(subject).values():
        caption = plot.caption[0].upper() + plot.caption[1:]
        if (
            isinstance(subject, AdapterAnalysis)
            or len(found) < 2
            or plot.kind not in BY_ARCHITECTURE
        ):
            if plot.page(subject):
                yield plot.kind, subject, caption
            continue
        for architecture in compared[:MAX_ARCHITECTURES]:
            part = subset(subject, architecture.members)
            if plot.page(part):
                yield plot.kind, part, f"{caption}: {architecture.label}"


def _data(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
