"""Heads, vocabularies and ties: the merged directory is the model that PEFT's merge is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import pytest
from matrix import lora
from support.compare import assert_merged_like_float64
from support.files import read_checkpoint
from support.models import VOCABULARY, Models
from support.reference import merge_float64, read_saved
from toys import Toys, assert_same_outputs, load, load_with_head, merge_with_peft


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


# What a hub's checkpoint of a backbone looks like: no prefix, or a language model's.
HEADS = {
    "bare BERT": ("bert-backbone", "BertForSequenceClassification", "query"),
    "bare GPT-2": ("gpt2-backbone", "GPT2ForSequenceClassification", "c_attn"),
    "GPT-2 with its language head": ("gpt2", "GPT2ForSequenceClassification", "c_attn"),
    "Llama": ("llama", "LlamaForSequenceClassification", "q_proj"),
    "bare BERT, a head for tokens": ("bert-backbone", "BertForTokenClassification", "query"),
}


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_the_base_does_not_have(
    toys: Toys, tmp_path: Path, name: str, labels: int
) -> None:
    kind, class_name, target = HEADS[name]
    base = toys.base(kind)
    settings: dict[str, Any] = {"num_labels": labels, "pad_token_id": 1}
    task = "TOKEN_CLS" if "Token" in class_name else "SEQ_CLS"
    adapter = toys.adapter(
        f"head-{name}-{labels}".replace(" ", "_"),
        base,
        lora(target, task_type=task),
        head=(class_name, settings),
    )
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert not report.warnings
    theirs = merge_with_peft(
        base, [adapter], load=lambda base: load_with_head(base, class_name, settings)
    )
    ours = read_checkpoint(tmp_path / "out")
    saved = read_saved(adapter)
    assert saved
    assert set(saved) <= set(ours)
    untrained = load_with_head(base, class_name, settings)
    assert_same_outputs(
        tmp_path / "out",
        theirs,
        load=lambda path: load_head(path, class_name, settings),
        base=untrained,
    )


def load_head(path: Path, class_name: str, settings: dict[str, Any]) -> Any:
    """All of the model must come from the file; a language head may be left over in the file."""
    import transformers

    loader = getattr(transformers, class_name).from_pretrained
    model, info = loader(path, output_loading_info=True, **settings)
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    # The bare backbone's pooler, which a head for tokens does without, and the other head.
    left = {name for name in info["unexpected_keys"] if "pooler" not in name}
    assert left <= {"lm_head.weight"}, info
    return model.eval()


@pytest.mark.parametrize("change", [9, -11])
@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "embed_tokens")], ids=str)
@pytest.mark.parametrize("kind", ["llama", "tied-llama"])
def test_a_resized_vocabulary(
    toys: Toys, tmp_path: Path, kind: str, targets: tuple[str, ...], change: int
) -> None:
    base = toys.base(kind)
    vocabulary = VOCABULARY + change
    adapter = toys.adapter(
        f"vocabulary-{kind}-{len(targets)}-{vocabulary}",
        base,
        lora(*targets),
        vocabulary=vocabulary,
    )

    def load_resized(base: Path) -> Any:
        model = load(base)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model

    if kind == "llama" and "embed_tokens" in targets:
        # PEFT then saves no head of the new size, and makes up its rows when it loads.
        with pytest.raises(lorafast.PlanError, match=r"no adapter brings lm_head\.weight"):
            lorafast.merge(base, adapter, tmp_path / "out")
        return
    shared = kind == "tied-llama" and "embed_tokens" in targets
    if shared:
        # Only the embeddings were adapted, not the head that shares their tensor.
        lorafast.merge(base, adapter, tmp_path / "as-trained")
        config = json.loads((tmp_path / "as-trained" / "config.json").read_text())
        assert config["vocab_size"] == vocabulary
        assert config["tie_word_embeddings"] is False
        saved = read_saved(adapter)["model.embed_tokens.weight"]
        apart = read_checkpoint(tmp_path / "as-trained")
        assert (apart["lm_head.weight"].float64() == saved).all()
    lorafast.merge(base, adapter, tmp_path / "out", compat="peft" if shared else None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == vocabulary
    assert config["tie_word_embeddings"] is (kind == "tied-llama")
    ours = read_checkpoint(tmp_path / "out")
    assert ("lm_head.weight" in ours) is (kind == "llama")
    assert ours["model.embed_tokens.weight"].shape == (vocabulary, 72)
    terms = merge_float64(read_checkpoint(base), [adapter])
    assert_merged_like_float64(ours, {name: term for name, term in terms.items() if name in ours})
    theirs = merge_with_peft(base, [adapter], load=load_resized)
    assert_same_outputs(tmp_path / "out", theirs)
