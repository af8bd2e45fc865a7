"""Converting an adapter from one format into another: `lorafast.convert`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from lorafast import _core
from lorafast._convert.report import ConversionReport
from lorafast._io.hub import require_directory
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    BASE_PATTERNS,
    core_source,
    locate,
    require_readers,
)

if TYPE_CHECKING:
    from typing import Literal

    from lorafast._types import Source

    Target = Literal[
        "peft",
        "kohya",
        "diffusers",
        "comfyui",
        "lycoris",
        "onetrainer",
        "xlabs",
        "bfl",
        "mlx",
        "gguf",
        "torchtune",
        "tinker",
    ]


def convert(
    adapter: Source,
    output: str | os.PathLike[str],
    *,
    to: Target,
    base: Source | None = None,
    dtype: str = "auto",
    algorithm: Literal["auto", "lora"] = "auto",
    lossy: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """Writes an adapter in another format, reads it back and holds every update against its own.

    What a format can say is kept: names are brought to its own, fused projections cut and split
    ones joined, alphas kept or folded into factors. Whatever it cannot say is an error that names
    it, unless `lossy` leaves it out. The output is written beside its place and moved there at the
    end; after an error nothing is left.

    Args:
        adapter: the source, in any format that is read: a directory, a file or a hub id.
        output: what to write: a directory for "peft", "mlx", "torchtune" and "tinker", a file
            for the others. Adapters of several components of a pipeline become folders of a
            directory ("unet", "text_encoder", ...).
        to: the format. "kohya" is for sd-scripts, A1111 and Forge, "comfyui" for ComfyUI,
            "diffusers" for its `load_lora_weights`, "lycoris" for LyCORIS by itself and what reads
            its files, "onetrainer" for OneTrainer, "xlabs" and "bfl" for programs that take Flux's
            adapters in the names of XLabs and of Black Forest Labs, "gguf" for llama.cpp;
            "torchtune" is in torchtune's own names and order of rows.
        base: the model that was trained, where it is needed: for flattened names, for families
            whose modules are fused or named otherwise in the target, for GGUF, for
            torchtune's rows of q_proj and k_proj.
        dtype: "auto" keeps the element types of the factors; else one of "float32", "float16",
            "bfloat16", "float64" for all of them. What a narrower one rounds away counts in
            `max_error`.
        algorithm: "lora" writes plain factors for LoHa, LoKr and Tucker's form as well, which is
            exact but for the rounding of their products; "auto" does so where the target has no
            other, and for "peft" where no one config describes all modules (a note says why).
        lossy: leave out what the target has no place for, and say so in `lost`.
        overwrite: replace an adapter that is there.

    Returns:
        A report with the formats, the largest relative difference of any module's ΔW, read back
        (`max_error`), what was left out (`lost`) and `notes`.

    Raises:
        FileNotFoundError: the adapter is not there.
        AdapterError: the adapter is broken.
        UnsupportedAdapterError: the format cannot hold what the adapter has, or only a base
            tells what has to be known.
        OutputError: there is something at the output.
        ValueError: an option or a format is not known.
    """
    require_readers(adapter, base)
    source = locate(adapter, ADAPTER_PATTERNS)
    local = None if base is None else locate(base, BASE_PATTERNS)
    options = {
        "to": to,
        "dtype": dtype,
        "algorithm": algorithm,
        "lossy": lossy,
        "overwrite": overwrite,
    }
    target = require_directory(output)
    found = _core.convert_adapter(
        core_source(source), target, base=local, options=json.dumps(options)
    )
    return ConversionReport(
        adapter=os.fspath(source),
        output=os.fspath(target),
        source_format=found["source_format"],
        target_format=found["target_format"],
        modules=found["modules"],
        max_error=found["max_error"],
        lost=tuple(found["lost"]),
        notes=tuple(found["notes"]),
        files=tuple(found["files"]),
    )
