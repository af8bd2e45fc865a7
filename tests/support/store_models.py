"""Small models that are merged from and to stores, and what their local merges write."""

from __future__ import annotations

from pathlib import Path

import lorafast

from support.handmade import adapter_tensors, make_adapter, make_base

#: More than a window and a part in each of two shards.
LARGE = {
    "model.layers.0.self_attn.q_proj": (3000, 2048),
    "model.layers.0.mlp.up_proj": (2600, 2048),
    "model.layers.1.self_attn.q_proj": (3000, 2048),
    "model.layers.1.mlp.up_proj": (64, 2048),
}


class Model:
    """A base, an adapter, and the files that their local merge writes.

    Attributes:
        base: its directory.
        adapter: its directory.
        merged: name and content of every file of the merge but the reports.
    """

    def __init__(self, root: Path, *, large: bool = False) -> None:
        modules = {"modules": LARGE} if large else {}
        self.base = make_base(root / "base", dtype="BF16", shards=3 if not large else 2, **modules)
        tensors = adapter_tensors(LARGE) if large else None
        self.adapter = make_adapter(root / "adapter", tensors)
        lorafast.merge(self.base, self.adapter, root / "merged")
        self.merged = files_of(root / "merged")


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files but for what tells of this machine and this hour."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return without_reports(found)


def without_reports(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a model but for its reports, its card and what lists them."""
    about = ("merge_report", "README", "lorafast_manifest")
    return {name: content for name, content in files.items() if not name.startswith(about)}
