"""Pipelines of diffusers on the hub: which of a repository's weights belong to one.

Such a repository often holds the same weights several times: whole in one file, as variants in half
precision, for other libraries. What is fetched is what a merge reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lorafast._io.paths import is_file

#: What lists the components of a pipeline, each a folder.
MODEL_INDEX = "model_index.json"
#: The plain weights of a component.
PLAIN = [
    f"{stem}{ending}"
    for stem in ("model", "diffusion_pytorch_model")
    for ending in (".safetensors", "-?????-of-?????.safetensors")
]
#: The weights in whatever variant.
ANY = "*.safetensors"


def fetch_base(fetch: Callable[[Sequence[str]], str], patterns: Sequence[str]) -> Path:
    """Fetches a base: a model as the patterns say, of a pipeline what its components are read from.

    Args:
        fetch: fetches the files of a repository that patterns name, and returns their directory.
        patterns: the files of a model.

    Returns:
        The directory.
    """
    # What lists a pipeline's components is one of them.
    small = [pattern for pattern in patterns if pattern != ANY]
    folders = components(Path(fetch(small)))
    if not folders:
        return Path(fetch(patterns))
    plain = [f"{folder}/{name}" for folder in folders for name in PLAIN]
    root = Path(fetch([*small, *plain]))
    # A model without plain weights has a variant of them.
    without = [
        folder
        for folder in folders
        if is_file(root / folder / "config.json") and not any((root / folder).glob(ANY))
    ]
    return Path(fetch([f"{folder}/{ANY}" for folder in without])) if without else root


def components(root: Path) -> list[str]:
    """The folders that a pipeline lists; none, where there is no such list."""
    path = root / MODEL_INDEX
    if not is_file(path):
        return []
    try:
        listed = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(listed, dict):
        return []
    return [
        name
        for name, entry in listed.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(p, str) for p in entry)
    ]
