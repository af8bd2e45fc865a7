"""What the seed's options do to a merged model: leave its tokenizer out, write it as pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._errors import missing

if TYPE_CHECKING:
    from lorafast._merge import MergeReport

INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"

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


def require_torch() -> None:
    """Raises what says how to install torch, where it is missing."""
    try:
        import torch  # noqa: F401  # only its absence is asked for
    except ImportError as error:
        raise missing("torch", "torch", "write .bin files (save_safetensors=False)") from error


def remove_tokenizer(model: Path, report: MergeReport) -> None:
    """Removes the tokenizer's files from a merged model, and from its report."""
    files = [model / name for name in TOKENIZER_FILES]
    files += sorted(model.glob("*.tiktoken"))
    removed = set()
    for file in files:
        if file.is_file():
            file.unlink()
            removed.add(file.name)
    kept = [name for name in report.side_files if name not in removed]
    replace(report, side_files=kept).write(model)


def rewrite_as_pickles(model: Path) -> None:
    """Replaces a model's safetensors shards by torch's `.bin` files, one shard in memory at a time.

    Only tensors go into them, so that `torch.load(…, weights_only=True)` reads them.
    """
    import torch
    from safetensors.torch import load_file

    index_path = model / INDEX
    index: dict[str, Any] | None = None
    if index_path.is_file():
        index = json.loads(index_path.read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
    else:
        shards = sorted(path.name for path in model.glob("*.safetensors"))
    names = _pickle_names(shards)
    for shard, name in names.items():
        state = load_file(model / shard)
        partial = model / f".{name}.partial"
        torch.save(state, partial)
        del state
        partial.replace(model / name)
    if index is not None:
        index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
        text = json.dumps(index, indent=2) + "\n"
        (model / PICKLE_INDEX).write_text(text, encoding="utf-8")
        index_path.unlink()
    # Only now: until here the model was whole in one form or the other.
    for shard in shards:
        (model / shard).unlink()


def _pickle_names(shards: list[str]) -> Mapping[str, str]:
    """The names that transformers looks for."""
    if len(shards) == 1:
        return {shards[0]: "pytorch_model.bin"}
    count = len(shards)
    return {
        shard: f"pytorch_model-{position:05d}-of-{count:05d}.bin"
        for position, shard in enumerate(shards, start=1)
    }
