"""Pages in a real browser, where there is one: what a script sees in them."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def seen(page: str, script: str, folder: Path, *, width: int = 1280, fragment: str = "") -> Any:
    """What a script assigns to `seen` once the page is loaded.

    Args:
        page: the document.
        script: may `await`; runs after the page's own scripts.
        folder: for the page and the browser's files.
        width: of the window; a browser without a screen has no narrower one than 500.
        fragment: of the address, "#" included.

    Raises:
        AssertionError: a script of the page failed, or asked for what its policy forbids.
    """
    probe = f"""<script>addEventListener("load", async () => {{
      let seen;
      {script}
      document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
    }});</script>"""
    place = page.rindex("</body>")
    path = folder / "page.html"
    path.write_text(page[:place] + probe + page[place:], encoding="utf-8")
    run = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=3000", "--dump-dom", path.as_uri() + fragment],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    assert b"CONSOLE" not in run.stderr, run.stderr.decode()[-2000:]
    return json.loads(html.unescape(run.stdout.decode().split("SEEN")[1]))
