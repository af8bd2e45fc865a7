"""Heads, vocabularies and ties: the merged directory is the model that PEFT's merge is."""

from __future__ import annotations

import json
import shutil
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
    "GPT-2, a head for tokens": ("gpt2", "GPT2ForTokenClassification", "c_attn"),
    "Llama, a head for tokens": ("llama", "LlamaForTokenClassification", "q_proj"),
    "bare GPT-2, a head for answers": ("gpt2-backbone", "GPT2ForQuestionAnswering", "c_attn"),
    "bare BERT, a head for answers": ("bert-backbone", "BertForQuestionAnswering", "query"),
    # Their class for answers calls `transformer` what all others call `model`; Mistral's does not.
    "Llama, a head for answers": ("llama", "LlamaForQuestionAnswering", "q_proj"),
    "bare Llama, a head for answers": ("llama-backbone", "LlamaForQuestionAnswering", "q_proj"),
    "tied Qwen2, a head for answers": ("tied-qwen2", "Qwen2ForQuestionAnswering", "v_proj"),
    "Qwen3 MoE, a head for answers": ("qwen3-moe", "Qwen3MoeForQuestionAnswering", "o_proj"),
    "Mistral, a head for answers": ("mistral", "MistralForQuestionAnswering", "q_proj"),
}
TASKS = {"Token": "TOKEN_CLS", "Sequence": "SEQ_CLS", "Question": "QUESTION_ANS"}


# One is a reward's; of a head for answers there are always two.
@pytest.mark.parametrize("labels", [1, 2, 3, 5])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_the_base_does_not_have(
    toys: Toys, tmp_path: Path, name: str, labels: int
) -> None:
    kind, class_name, target = HEADS[name]
    if "Question" in class_name and labels != 2:
        pytest.skip("an answer has two ends")
    base = toys.base(kind)
    settings: dict[str, Any] = {"num_labels": labels, "pad_token_id": 1}
    task = next(task for word, task in TASKS.items() if f"For{word}" in class_name)
    adapter = toys.adapter(
        f"head-{name}-{labels}".replace(" ", "_"),
        base,
        lora(target, task_type=task),
        head=(class_name, settings),
    )
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert not report.warnings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [class_name]
    assert config["id2label"] == {str(label): f"LABEL_{label}" for label in range(labels)}
    assert config["label2id"] == {f"LABEL_{label}": label for label in range(labels)}
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    theirs = merge_with_peft(
        base, [adapter], load=lambda base: load_with_head(base, class_name, settings)
    )
    ours = read_checkpoint(tmp_path / "out")
    saved = read_saved(adapter)
    assert saved
    assert set(saved) <= set(ours)
    untrained = load_with_head(base, class_name, settings)
    for given in (settings, {"pad_token_id": 1}):
        # The labels are those of the config, whether or not somebody says how many there are.
        assert_same_outputs(
            tmp_path / "out",
            theirs,
            load=lambda path, given=given: load_head(path, class_name, given),
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


def test_the_labels_names_are_those_beside_the_adapter(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("llama")
    adapter = make_head(toys, tmp_path, 3)
    names = {"0": "bad", "1": "fair", "2": "good"}
    (adapter / "config.json").write_text(json.dumps({"id2label": names}))
    report = lorafast.merge(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == names
    assert config["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    assert not any("LABEL_0" in note for note in report.notes)
    # Those of another head are none of this one's.
    (adapter / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}}))
    report = lorafast.merge(base, adapter, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["id2label"]["2"] == "LABEL_2"
    assert any("LABEL_0" in note for note in report.notes)


def test_a_config_that_is_not_the_heads_is_found_out(toys: Toys, tmp_path: Path) -> None:
    base, adapter = toys.base("llama"), make_head(toys, tmp_path, 3)
    lorafast.merge(base, adapter, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    right = json.loads(path.read_text())
    path.write_text(json.dumps({**right, "architectures": ["LlamaForCausalLM"]}))
    problems = lorafast.verify(base, adapter, tmp_path / "out").problems
    assert len(problems) == 1
    assert "names the class LlamaForCausalLM" in problems[0]
    for wrong in ({"0": "a", "1": "b"}, None):
        path.write_text(json.dumps({**right, "id2label": wrong}))
        problems = lorafast.verify(base, adapter, tmp_path / "out").problems
        assert problems == ["config.json: has 2 labels, but score.weight has 3 rows"]


def test_a_head_of_which_nothing_tells_the_task(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("gpt2")
    adapter = toys.adapter(
        "head-untold",
        base,
        lora("c_attn", task_type="TOKEN_CLS"),
        head=("GPT2ForTokenClassification", {"num_labels": 3, "pad_token_id": 1}),
    )
    own = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    report = lorafast.merge(base, own, tmp_path / "out")
    assert any("does not say for which task" in warning for warning in report.warnings)
    before = json.loads((base / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before["architectures"] == after["architectures"]
    assert "id2label" not in after


def make_head(toys: Toys, folder: Path, labels: int) -> Path:
    """A copy of a Llama's adapter with a head for texts, to be changed."""
    adapter = toys.adapter(
        f"head-Llama-{labels}",
        toys.base("llama"),
        lora("q_proj", task_type="SEQ_CLS"),
        head=("LlamaForSequenceClassification", {"num_labels": labels, "pad_token_id": 1}),
    )
    return shutil.copytree(adapter, folder / "adapter")


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
