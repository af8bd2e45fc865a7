"""Listing what a checkpoint or an adapter holds: `lorafast.inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast import _core
from lorafast._io.sources import BASE_PATTERNS, core_source, is_adapter, locate
from lorafast._merge.listing import AdapterListing, CheckpointListing

if TYPE_CHECKING:
    from lorafast._types import Source


def inspect(path: Source) -> CheckpointListing | AdapterListing:
    """Lists what a checkpoint or an adapter holds, from its headers alone.

    Args:
        path: a model's or an adapter's directory, a `.safetensors` file, a pickle of an adapter's
            weights, or a hub id.

    Returns:
        A frozen value: `kind` ("checkpoint" or "adapter"), `path`, `files` (name, bytes, tensors),
        `metadata`, `tensors` (name, dtype, shape, bytes, file), `total_parameters`, `total_bytes`,
        `config`, `warnings`; of a checkpoint `quantised` (how many weights are stored how); of an
        adapter `type`, `base`, `r`, `alpha`, `rslora`, `peft_version`, `modules` (name, kind, rank,
        alpha, scaling, shape (out, in)), `features` (what in it cannot be merged), `notes` (what
        was left out of its names), and of every tensor, every config field and every file of
        weights in its directory its `name`, `use` (used, not_needed, refused) and `reason`
        (`tensors_use`, `fields_use`, `files_use`). Of an adapter without its config alphas and
        scales are `None`; one of a format that cannot be read has no modules, and `type` says what
        it is. `to_dict` and `to_json` have all of it.

    Raises:
        FileNotFoundError: the path is not there.
        CheckpointError: the checkpoint is broken.
        AdapterError: the adapter is broken or of a type that cannot be read.
    """
    local = locate(path, BASE_PATTERNS)
    if not is_adapter(local):
        return CheckpointListing(_core.list_checkpoint(local))
    return AdapterListing(_core.list_adapter(core_source(local)))
