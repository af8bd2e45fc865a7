"""Listing what a checkpoint or an adapter holds: `lorafast.inspect`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast import _core
from lorafast._errors import CheckpointError
from lorafast._io.paths import is_directory
from lorafast._io.sources import (
    BASE_PATTERNS,
    CONFIG,
    PICKLED_WEIGHTS,
    PICKLES,
    WEIGHTS,
    core_source,
    find_source,
    is_adapter,
)
from lorafast._io.stores import using
from lorafast._merge.listing import AdapterListing, CheckpointListing
from lorafast._merge.options import StoreOptions
from lorafast._options import pick
from lorafast._words import agree, plural

if TYPE_CHECKING:
    from lorafast._types import AdapterFormat, CredentialProvider, Source, StorageOptions

#: Levels below a directory, and directories, that are looked into for adapters.
MOST_LEVELS, MOST_LOOKED_INTO = 3, 1000
#: Adapters that a message names.
MOST_NAMED = 3
#: What trainers call the directories of a run, which the core knows.
OF_A_RUN = re.compile(r"checkpoint[-_]\d+")


def inspect(
    path: Source,
    *,
    format: AdapterFormat | None = None,
    storage_options: StorageOptions | None = None,
    credential_provider: CredentialProvider | None = None,
) -> CheckpointListing | AdapterListing:
    """Lists what a checkpoint or an adapter holds, from its headers alone.

    Args:
        path: a model's or an adapter's directory, a pipeline of diffusers, a `.safetensors` file, a
            pickle of an adapter's weights, or a hub id.
        format: an adapter's format, where its files do not tell it; `None` tells it by them.
        storage_options: as for `lorafast.merge`.
        credential_provider: as for `lorafast.merge`.

    Returns:
        A frozen value: `kind` ("checkpoint", "pipeline" or "adapter"), `format` (of an adapter that
        can be read: "peft", "kohya", "diffusers", …), `path`, `files` (name, bytes, tensors),
        `metadata`, `tensors` (name, dtype, shape, bytes, file), `total_parameters`, `total_bytes`,
        `config` (of a pipeline its `model_index.json`), `warnings`; of a checkpoint `quantised`
        (how many weights are stored how) and, of a model of diffusion, `components` (name, kind,
        class_name, tensors, parameters, bytes, dtypes); of an adapter `type`, `base`, `r`, `alpha`,
        `rslora`, `peft_version`, `algorithm` (lora, locon, loha, lokr, …, mixed), `trainer` (where
        the metadata tells), `family` (of image and video models, by the names), `components`,
        `scale` (where scales come from), `needs` (what a merge needs), `modules` (name, kind, rank,
        alpha, scaling, shape (out, in)), `features` (what in it cannot be merged), `notes` (what
        was left out of its names), and of every tensor, every config field and every file of
        weights in its directory its `name`, `use` (used, not_needed, refused) and `reason`
        (`tensors_use`, `fields_use`, `files_use`). Of an adapter without its config alphas and
        scales are `None`; one of a format that cannot be read has no modules, and `type` says what
        it is. `to_dict` and `to_json` have all of it.

    Raises:
        FileNotFoundError: the path is not there.
        CheckpointError: the checkpoint is broken, or the directory holds no weights itself; where
            adapters lie below it, the message names some.
        AdapterError: the adapter is broken or of a type that cannot be read.
    """
    arguments = locals()
    with using(pick(StoreOptions, arguments).settings()):
        return _inspect(path, format)


def _inspect(path: Source, format: AdapterFormat | None) -> CheckpointListing | AdapterListing:
    local = find_source(path, BASE_PATTERNS)
    if not isinstance(local, Path):
        if format is None and not _core.holds_adapter(local):
            return CheckpointListing(_core.list_checkpoint(local))
        return AdapterListing(_core.list_adapter(core_source(local, format)))
    if format is None and not is_adapter(local):
        try:
            return CheckpointListing(_core.list_checkpoint(local))
        except CheckpointError as error:
            said = _adapters_below(local)
            if said is None:
                raise
            raise CheckpointError(f"{local}: {said}") from error
    return AdapterListing(_core.list_adapter(core_source(local, format)))


def _adapters_below(directory: Path) -> str | None:
    """That adapters lie below a directory, which has no weights of its own, as a message about it.

    Nothing is said of the directory of a training run: the core knows which of its checkpoints is
    the last.
    """
    if not is_directory(directory):
        return None
    if any(path.suffix in {*PICKLES, ".safetensors"} for path in directory.iterdir()):
        return None
    found, is_all = _find_adapters(directory)
    if not found or all(OF_A_RUN.fullmatch(name) for name in found):
        return None
    named = ", ".join(found[:MOST_NAMED]) + (", …" if len(found) > MOST_NAMED else "")
    how_many = plural(len(found), "adapter") if is_all else f"more than {len(found):,} adapters"
    count = len(found) if is_all else len(found) + 1
    below = f"{how_many} {agree(count, 'lies', 'lie')} below it ({named})"
    return (
        f"holds no weights itself, but {below}; "
        f"give {agree(count, 'it', 'one of them')}, or see all with `lorafast scan`"
    )


def _find_adapters(root: Path) -> tuple[list[str], bool]:
    """The adapters below a directory, by their paths in it, and whether these are all.

    Args:
        root: the directory, which is none itself. Hidden ones in it are passed over.
    """
    found: list[str] = []
    level, looked_into = [root], 0
    for depth in range(MOST_LEVELS + 1):
        below: list[Path] = []
        for folder in level:
            if looked_into == MOST_LOOKED_INTO:
                return found, False
            looked_into += 1
            try:
                with os.scandir(folder) as entries:
                    kinds = {entry.name: entry.is_dir() for entry in entries}
            except OSError:
                continue  # What may not be looked into is none that can be named.
            if depth and not kinds.keys().isdisjoint({CONFIG, WEIGHTS, PICKLED_WEIGHTS}):
                found.append(str(folder.relative_to(root)))
                continue
            if depth and "config.json" in kinds:
                continue  # A model, which the core names.
            below += [
                folder / name
                for name, is_folder in sorted(kinds.items())
                if is_folder and not name.startswith(".")
            ]
        level = below
    return found, not level
