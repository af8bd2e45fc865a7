"""What NeuroTrain's options do to a merged model: leave its tokenizer out, write it as pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._io import atomic
from lorafast._io.paths import expand, is_file
from lorafast._merge.report import write_afterwards

if TYPE_CHECKING:
    from lorafast._merge.options import ExecutionOptions
    from lorafast._merge.plan import MergePlan
    from lorafast._merge.report import MergeReport
    from lorafast._types import Source

INDEX = "model.safetensors.index.json"
#: What lists the model's files; the core writes it.
MANIFEST = "lorafast_manifest.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
#: The packages that pickles take, and what for.
PICKLE_NEEDS = {"torch": "write .bin files (save_safetensors=False)"}

#: The files that the tokenizers of transformers save.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
)


def carry_out(
    plan: MergePlan,
    output: Source,
    execution: ExecutionOptions,
    *,
    save_tokenizer: bool = True,
    save_safetensors: bool = True,
) -> MergeReport:
    """Carries a plan out, and changes the files while other merges are kept out of the output.

    Args:
        plan: the plan.
        output: the directory to write.
        execution: how it is carried out.
        save_tokenizer: keep the tokenizer's files.
        save_safetensors: `False` writes `.bin` files through torch instead.

    Returns:
        The report of the files as they are in the end.

    Raises:
        ValueError: `save_safetensors` is false, and the base a pipeline of diffusers.
        LorafastError, OSError: as `lorafast.merge`; or a file cannot be written or removed.
    """
    if not save_safetensors and is_file(Path(plan.base) / "model_index.json"):
        raise ValueError(
            "save_safetensors=False: a pipeline of diffusers is written as safetensors files alone"
        )
    model = Path(expand(output))
    with plan.carried_out(output, execution) as merged:
        report = merged
        if execution.report:
            write_afterwards(report, report.output_path)
        if not save_tokenizer:
            report = remove_tokenizer(model, report, write=execution.report)
        if not save_safetensors:
            report = rewrite_as_pickles(model, report, write=execution.report)
    return report


def remove_tokenizer(model: Path, report: MergeReport, *, write: bool = True) -> MergeReport:
    """Removes the tokenizer's files from a merged model, and from its report.

    Only what the merge itself has put there is removed: others may keep files beside a model.

    Args:
        model: the merged model.
        report: that of the merge.
        write: write the report without them into the model.

    Returns:
        The report without them.

    Raises:
        OSError: one cannot be removed.
    """
    removed = [
        name
        for name in report.side_files
        if name in TOKENIZER_FILES or ("/" not in name and name.endswith(".tiktoken"))
    ]
    for name in removed:
        (model / name).unlink(missing_ok=True)
    _amend_manifest(model, removed=removed, added=[])
    kept = [name for name in report.side_files if name not in removed]
    shorter = report._replace(side_files=kept)
    if write:
        write_afterwards(shorter, str(model))
    return shorter


def rewrite_as_pickles(model: Path, report: MergeReport, *, write: bool = True) -> MergeReport:
    """Replaces a model's safetensors shards by torch's `.bin` files, one shard in memory at a time.

    Only tensors go into them, so that `torch.load(…, weights_only=True)` reads them. Files of
    weights that the merge did not write stay.

    Args:
        model: the merged model.
        report: that of the merge.
        write: write the report with the new files into the model.

    Returns:
        The report with the new files.

    Raises:
        OSError: a file cannot be written or removed.
    """
    import torch
    from safetensors.torch import load_file

    index_path = model / INDEX
    index: dict[str, Any] | None = None
    shards = report.weight_files
    if is_file(index_path):
        index = json.loads(index_path.read_text(encoding="utf-8"))
    names = _pickle_names(shards)
    for shard, name in names.items():
        state = load_file(model / shard)
        with atomic.writing(model / name, sync=True) as file:
            torch.save(state, file)
        del state
    if index is not None:
        index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
        text = json.dumps(index, indent=2) + "\n"
        atomic.write(model / PICKLE_INDEX, text, sync=True)
        index_path.unlink()
    # Only now: until here the model was whole in one form or the other.
    for shard in shards:
        (model / shard).unlink()
    added = list(names.values())
    if index is not None:
        added.append(PICKLE_INDEX)
    _amend_manifest(model, removed=[*shards, INDEX], added=added)
    changed = report._replace(weight_files=sorted(names.values()))
    if write:
        write_afterwards(changed, str(model))
    return changed


def _amend_manifest(model: Path, *, removed: list[str], added: list[str]) -> None:
    """Lists the model's files as they are now."""
    manifest = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    kept = [entry for entry in manifest["files"] if entry["name"] not in removed]
    kept += [{"name": name, "bytes": (model / name).stat().st_size} for name in added]
    manifest["files"] = sorted(kept, key=lambda entry: str(entry["name"]))
    atomic.write(model / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _pickle_names(shards: list[str]) -> Mapping[str, str]:
    """The names that transformers looks for."""
    if len(shards) == 1:
        return {shards[0]: "pytorch_model.bin"}
    count = len(shards)
    return {
        shard: f"pytorch_model-{position:05d}-of-{count:05d}.bin"
        for position, shard in enumerate(shards, start=1)
    }
