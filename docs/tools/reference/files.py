"""All generated files by their paths, and how they are written."""

from __future__ import annotations

from pathlib import Path

from reference import command, errors, findings, man
from reference.parsers import pages

PROJECT = Path(__file__).resolve().parents[3]
DOCUMENTS = PROJECT / "docs" / "reference"
MANUAL = PROJECT / "target" / "man" / "man1"


def documents() -> dict[Path, str]:
    """What each file of the documents has to hold."""
    return {
        DOCUMENTS / "command.md": command.render(pages()),
        DOCUMENTS / "errors.md": errors.render(),
        DOCUMENTS / "findings.md": findings.render(),
    }


def manual() -> dict[Path, str]:
    """What each manual page holds; they are part of no clone."""
    return {MANUAL / name: text for name, text in man.render(pages()).items()}


def write(files: dict[Path, str]) -> None:
    """Writes what has changed."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(PROJECT))
