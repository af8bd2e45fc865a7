"""A progress bar in the output of a notebook's cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Between two pictures of a bar: each is a message from the kernel to the browser.
SECONDS_A_PICTURE = 0.2


@contextmanager
def notebook_bar(
    label: str, note: Callable[[int, int | None], str]
) -> Iterator[Callable[[int, int], object]]:
    """What draws a bar where the cell's output stands, and draws it anew as the work goes on.

    Args:
        label: the word before the bar.
        note: what stands beside it for (done, total); the total is not known at first.
    """
    from IPython.display import display

    start = last = time.monotonic()
    handle: Any = display(_picture(label, None, note(0, None)), raw=True, display_id=True)
    done, total = 0, 0

    def report(now_done: int, now_total: int) -> None:
        nonlocal last, done, total
        done, total = now_done, now_total
        now = time.monotonic()
        if now - last >= SECONDS_A_PICTURE:
            last = now
            share = done / total if total else 1.0
            handle.update(_picture(label, share, note(done, total)), raw=True)

    try:
        yield report
    except BaseException:
        share = done / total if total else 0.0
        handle.update(_picture(label, share, "stopped"), raw=True)
        raise
    beside = f"{note(total, total)} · {time.monotonic() - start:.1f} s" if total else "done"
    handle.update(_picture(label, 1.0, beside.removeprefix(" · ")), raw=True)


def _picture(label: str, share: float | None, beside: str) -> dict[str, str]:
    """The bar by the types of what can be shown; the text is for what shows no HTML."""
    import html

    known = "" if share is None else f"{share:.0%}"
    value = "" if share is None else f' value="{share:.3f}"'
    text = " ".join(part for part in (f"{label}:", known, beside) if part)
    bar = f'<progress max="1"{value}></progress>'
    return {
        "text/plain": text,
        "text/html": f"<div>{html.escape(label)} {bar} {known} {html.escape(beside)}</div>",
    }
