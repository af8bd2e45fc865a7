"""Writes the generated pages (`make reference`), or with `man` the manual's (`make man`)."""

from __future__ import annotations

import sys

from reference.files import documents, manual, write

if __name__ == "__main__":
    write(manual() if sys.argv[1:] == ["man"] else documents())
