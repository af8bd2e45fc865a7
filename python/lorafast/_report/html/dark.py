"""Figures in the colors of a page's dark theme: on no ground of their own, with light ink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafast._report.palette import ON_DARK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    Color = tuple[float, float, float, float]

#: Text and ground of the dark theme, as the style sheet has them.
INK, GROUND = "#e6e9ed", "#14181d"
#: Behind the cells of a heatmap that have no value: darker than any grey of a color map.
GAP = "#333b45"
#: The least contrast of what is not text (WCAG 2.1, 1.4.11), and that of text (1.4.3).
CONTRAST, TEXT_CONTRAST = 3.0, 4.5
#: Channels that differ by less are a grey.
GREY = 0.06


def darken(figure: Figure) -> None:
    """Gives a figure the dark theme's colors; those that stand for values stay as they are."""
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    figure.patch.set_facecolor("none")
    kept: set[Artist] = {figure.patch}
    for axes in figure.findobj(Axes):
        assert isinstance(axes, Axes)
        has_cells = any(_shows_values(child) for child in axes.get_children())
        axes.patch.set_facecolor(GAP if has_cells and _is_tinted(axes) else "none")
        # The color of axes is that of their patch.
        kept.update((axes, axes.patch))
        if has_cells:
            # Black or white upon its cell; what is neither marks a cell without a value.
            kept.update(axes.texts)
            for text in axes.texts:
                if not _is_grey(_rgba(text.get_color())):
                    text.set_color(_lightened(_rgba(text.get_color()), GAP, TEXT_CONTRAST))
    for artist in figure.findobj():
        if artist in kept or _shows_values(artist):
            continue
        _recolor(artist)
        if isinstance(artist, Text) and artist.get_bbox_patch() is not None:
            _recolor(artist.get_bbox_patch())


def _recolor(artist: Any) -> None:
    """Replaces whatever colors a line, a text, a patch or a collection has."""
    written = []
    for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
        get = getattr(artist, f"get_{name}", None)
        write = getattr(artist, f"set_{name}", None)
        if get is None or write is None:
            continue
        value = get()
        if value is None or (isinstance(value, str) and value in {"auto", "none", "inherit"}):
            continue
        written.append((write, _on_dark(value)))
    # After all are read: a marker without a color of its own has that of its line.
    for write, value in written:
        write(value)


def _on_dark(value: Any) -> Any:
    """What stands for a color, or for each of several, on a dark ground."""
    from matplotlib.colors import is_color_like, to_rgba

    if not is_color_like(value):
        return [_on_dark(each) for each in value]
    color: Color = to_rgba(value)
    known = {to_rgba(light): to_rgba(dark) for light, dark in ON_DARK.items() if light[0] == "#"}
    alpha = color[3]
    if (*color[:3], 1.0) in known:
        return (*known[*color[:3], 1.0][:3], alpha)
    if _is_grey(color):
        light, dark, share = to_rgba(INK), to_rgba(GROUND), sum(color[:3]) / 3
        mixed = (a + (b - a) * share for a, b in zip(light, dark, strict=True))
        return (*tuple(mixed)[:3], alpha)
    return _lightened(color, GROUND, CONTRAST)


def _lightened(color: Color, ground: str, least: float) -> Color:
    """A color made so light that it has at least some contrast to a dark ground."""
    red, green, blue, alpha = color
    below = _luminance(_rgba(ground)) + 0.05
    while (_luminance((red, green, blue)) + 0.05) / below < least:
        red, green, blue = (channel + 0.05 * (1 - channel) for channel in (red, green, blue))
    return (red, green, blue, alpha)


def _shows_values(artist: Any) -> bool:
    """Whether an artist's colors come from a color map."""
    get = getattr(artist, "get_array", None)
    return get is not None and get() is not None


def _is_tinted(axes: Any) -> bool:
    """Whether the ground of a heatmap is a color of its own, that of cells without a value."""
    return min(_rgba(axes.get_facecolor())[:3]) < 1


def _rgba(value: Any) -> Color:
    from matplotlib.colors import to_rgba

    color: Color = to_rgba(value)
    return color


def _is_grey(color: Color) -> bool:
    return max(color[:3]) - min(color[:3]) < GREY


def _luminance(color: Sequence[float]) -> float:
    """Relative luminance (WCAG 2.1)."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
