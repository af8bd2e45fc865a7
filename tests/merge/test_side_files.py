"""Files beside the weights: whose tokenizer and configs the output has, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.files import Tensor, tensor
from support.handmade import PREFIX, adapter_tensors, make_adapter, make_base

EMBEDDING = "model.embed_tokens.weight"
#: Rows of the base's embeddings, and of those that an adapter brings.
BEFORE, AFTER = 8, 10
WIDTH = 20


def write_tokenizer(
    path: Path, tokens: int, *, template: str | None = None, word: str = "t", **settings: Any
) -> None:
    """The files of a tokenizer whose last two tokens are added ones."""
    added = [{"id": number, "content": f"<{word}{number}>"} for number in range(tokens - 2, tokens)]
    vocabulary = {f"{word}{number}": number for number in range(tokens - 2)}
    whole = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": added}
    (path / "tokenizer.json").write_text(json.dumps(whole))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"} | settings))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)


def embedding(rows: int, seed: int = 3) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(size=(rows, WIDTH)), "F32")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = make_base(tmp_path / "base", others={EMBEDDING: embedding(BEFORE)})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": BEFORE}))
    write_tokenizer(path, BEFORE, template="{{ base }}")
    return path


def grown(path: Path, rows: int = AFTER, seed: int = 4) -> Path:
    """An adapter that brings embeddings of that many rows."""
    tensors = adapter_tensors() | {f"{PREFIX}{EMBEDDING}": embedding(rows, seed)}
    return make_adapter(path, tensors, modules_to_save=["embed_tokens"])


def vocabulary(path: Path) -> dict[str, Any]:
    tokens: dict[str, Any] = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    return tokens


def test_an_adapter_that_grew_the_vocabulary_brings_its_tokenizer(
    base: Path, tmp_path: Path
) -> None:
    adapter = grown(tmp_path / "adapter")
    write_tokenizer(adapter, AFTER)
    # What the base's tokenizer consists of beside goes with it, or two would be mixed.
    (base / "added_tokens.json").write_text('{"<t6>": 6}')
    report = lorafast.merge(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert not (out / "added_tokens.json").exists()
    # The adapter has no template of its own, so that nothing stands in the place of the base's.
    assert (out / "chat_template.jinja").read_text() == "{{ base }}"
    assert report.warnings == []
    assert any("has its tokenizer" in note for note in report.notes)
    assert report.file_origins == {
        "README.md": "merge",
        "chat_template.jinja": "base",
        "config.json": "base",
        "tokenizer.json": "adapter 0",
        "tokenizer_config.json": "adapter 0",
    }
    assert report.side_files == list(report.file_origins)
    plan = lorafast.plan(base, adapter).to_dict()
    assert plan["file_origins"]["tokenizer.json"] == "adapter 0"
    page = (out / "merge_report.md").read_text()
    assert "of the adapter 0: `tokenizer.json`, `tokenizer_config.json`" in page


@pytest.mark.parametrize("choice", ["base", "adapter"])
def test_the_caller_decides(base: Path, tmp_path: Path, choice: Any) -> None:
    adapter = grown(tmp_path / "adapter")
    write_tokenizer(adapter, AFTER, template="{{ own }}")
    report = lorafast.merge(base, adapter, tmp_path / "out", tokenizer=choice)
    expected = {"base": base, "adapter": adapter}[choice]
    assert vocabulary(tmp_path / "out") == vocabulary(expected)
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert template == (expected / "chat_template.jinja").read_text()
    unknown = [warning for warning in report.warnings if "no tokenizer knows" in warning]
    assert len(unknown) == (choice == "base")


def test_the_command_decides(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    write_tokenizer(adapter, BEFORE, template="{{ own }}")
    flags = ["-b", str(base), "-a", str(adapter), "-o", str(tmp_path / "out")]
    assert main(["merge", *flags, "--tokenizer", "adapter"]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ own }}"
    assert main(["merge", *flags, "--tokenizer", "other"]) == 2
    assert "auto, base, adapter" in capsys.readouterr().err.replace("'", "")


def test_a_tokenizer_that_the_embeddings_do_not_have_stays_behind(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    write_tokenizer(adapter, AFTER)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert vocabulary(tmp_path / "out") == vocabulary(base)
    [warning] = report.warnings
    assert "ids up to 9, but the merged embeddings have 8 rows; the output has" in warning
    asked = lorafast.merge(base, adapter, tmp_path / "asked", tokenizer="adapter")
    assert vocabulary(tmp_path / "asked") == vocabulary(adapter)
    assert "which was asked for, has ids up to 9" in asked.warnings[0]


def test_tokens_within_the_embeddings_need_no_rows_of_their_own(base: Path, tmp_path: Path) -> None:
    """A padding token in a row that the base has spare."""
    write_tokenizer(base, BEFORE - 2)
    adapter = make_adapter(tmp_path / "adapter")
    write_tokenizer(adapter, BEFORE - 1)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert vocabulary(tmp_path / "out") == vocabulary(adapter)
    assert report.warnings == []


@pytest.mark.parametrize(
    ("template", "settings", "word"),
    [
        ("{{ own }}", {}, "its chat template is not the base's"),
        (None, {"eos_token": "<end>"}, 'the eos_token of its tokenizer is "<end>"'),
        (None, {"add_bos_token": True}, None),
        ("{{ base }}\n", {"eos_token": {"content": "<e>"}}, None),
        (None, {"padding_side": "left", "model_max_length": 5}, None),
    ],
)
def test_what_the_same_tokens_are_used_for_is_said(
    base: Path, tmp_path: Path, template: str | None, settings: dict[str, Any], word: str | None
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    write_tokenizer(adapter, BEFORE, template=template, **settings)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()
    if word is None:
        assert report.warnings == []
    else:
        [warning] = report.warnings
        assert word in warning
        assert "--tokenizer adapter" in warning


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json"])
def test_other_configs_that_differ_are_said(base: Path, tmp_path: Path, name: str) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (base / name).write_text('{"top_p": 0.9, "transformers_version": "4"}')
    (adapter / name).write_text('{"transformers_version": "5", "top_p": 0.9}')
    assert lorafast.plan(base, adapter).warnings == []
    (adapter / name).write_text('{"top_p": 0.5}')
    [warning] = lorafast.plan(base, adapter).warnings
    assert f"its {name} is not the base's" in warning


def test_rows_that_no_tokenizer_knows(base: Path, tmp_path: Path) -> None:
    adapter = grown(tmp_path / "adapter")
    [warning] = lorafast.plan(base, adapter).warnings
    assert "10 rows, 2 more than the base's, and no tokenizer knows the new ones" in warning
    for path in base.glob("*token*"):
        path.unlink()
    (base / "chat_template.jinja").unlink()
    [warning] = lorafast.plan(base, adapter).warnings
    assert "no tokenizer knows the new ones" in warning
    # A wider embedding than there are tokens is padding, once some of the new rows are known.
    write_tokenizer(adapter, AFTER - 1)
    assert lorafast.plan(base, adapter).warnings == []


def test_a_trained_row_that_no_tokenizer_knows(base: Path, tmp_path: Path) -> None:
    write_tokenizer(base, BEFORE - 1)
    tensors = adapter_tensors()
    module = EMBEDDING.removesuffix(".weight")
    tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = embedding(1)
    row = BEFORE - 1
    adapter = make_adapter(
        tmp_path / "adapter", tensors, trainable_token_indices={"embed_tokens": [row]}
    )
    [warning] = lorafast.plan(base, adapter).warnings
    assert f"trained the embedding of token {row}, which the output's tokenizer does" in warning
    write_tokenizer(adapter, BEFORE)
    plan = lorafast.plan(base, adapter)
    assert plan.warnings == []
    assert plan.to_dict()["file_origins"]["tokenizer.json"] == "adapter 0"


def test_of_several_adapters_the_one_that_brought_the_rows(base: Path, tmp_path: Path) -> None:
    plain = make_adapter(tmp_path / "plain")
    write_tokenizer(plain, BEFORE)
    brings = grown(tmp_path / "brings")
    write_tokenizer(brings, AFTER)
    for order in ([plain, brings], [brings, plain]):
        plan = lorafast.plan(base, order)
        position = order.index(brings)
        assert plan.to_dict()["file_origins"]["tokenizer.json"] == f"adapter {position}"


def test_two_tokenizers_are_a_conflict(base: Path, tmp_path: Path) -> None:
    adapters = []
    for word in ("a", "b"):
        adapters.append(make_adapter(tmp_path / word))
        write_tokenizer(adapters[-1], BEFORE, word=word)
    with pytest.raises(lorafast.PlanError, match="different tokenizers") as refused:
        lorafast.merge(base, adapters, tmp_path / "out")
    assert all(str(adapter) in str(refused.value) for adapter in adapters)
    assert not (tmp_path / "out").exists()
    assert lorafast.plan(base, adapters, tokenizer="base").warnings == []
    # One that knows all tokens of the other is no other one.
    write_tokenizer(adapters[0], BEFORE - 2, word="t")
    (adapters[1] / "tokenizer.json").write_text((adapters[0] / "tokenizer.json").read_text())
    (adapters[1] / "added_tokens.json").write_text('{"<more>": 7}')
    assert lorafast.plan(base, adapters).to_dict()["file_origins"]["tokenizer.json"] == "adapter 1"


def test_a_tokenizer_that_is_not_there_cannot_be_asked_for(base: Path, tmp_path: Path) -> None:
    with pytest.raises(lorafast.PlanError, match="none of the adapters has one"):
        lorafast.plan(base, make_adapter(tmp_path / "adapter"), tokenizer="adapter")
    with pytest.raises(ValueError, match='unknown tokenizer "mine"'):
        lorafast.plan(base, tmp_path / "adapter", tokenizer="mine")  # type: ignore[arg-type]  # wrong on purpose


def test_tokens_that_cannot_be_read_are_only_compared(base: Path, tmp_path: Path) -> None:
    for path in base.glob("*token*"):
        path.unlink()
    (base / "tokenizer.model").write_bytes(b"\x01base")
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "tokenizer.model").write_bytes(b"\x01base")
    assert lorafast.plan(base, adapter).warnings == []
    (adapter / "tokenizer.model").write_bytes(b"\x01other")
    [warning] = lorafast.plan(base, adapter).warnings
    assert "cannot be told" in warning
    # Who brought all rows knows what they stand for.
    brings = grown(tmp_path / "brings")
    (brings / "tokenizer.model").write_bytes(b"\x01other")
    plan = lorafast.plan(base, brings)
    assert plan.to_dict()["file_origins"]["tokenizer.model"] == "adapter 0"


def test_a_broken_tokenizer_stops_no_merge(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text("{")
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert vocabulary(tmp_path / "out") == vocabulary(base)
    assert "cannot be told" in report.warnings[0]


def test_a_tokenizer_that_changes_meanwhile_is_an_error(base: Path, tmp_path: Path) -> None:
    adapter = grown(tmp_path / "adapter")
    write_tokenizer(adapter, AFTER)
    plan = lorafast.plan(base, adapter)
    write_tokenizer(adapter, AFTER, word="other")
    with pytest.raises(lorafast.AdapterError, match=r"tokenizer\.json"):
        plan.execute(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_taking_an_adapter_out_gives_the_bases_tokenizer_back(base: Path, tmp_path: Path) -> None:
    adapter = grown(tmp_path / "adapter")
    write_tokenizer(adapter, AFTER)
    (base / "README.md").write_text("the base's")
    lorafast.merge(base, adapter, tmp_path / "merged")
    lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "back", original=base, report=False)
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_a_single_file_has_no_tokenizer(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    write_tokenizer(adapter, BEFORE)
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(base / "model.safetensors", alone)
    report = lorafast.merge(alone, adapter, tmp_path / "out", report=False)
    assert report.side_files == []


def test_the_tokenizer_of_transformers_encodes_as_in_training(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    base = make_base(tmp_path / "base", others={EMBEDDING: embedding(BEFORE)})
    model = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(base)
    adapter = grown(tmp_path / "adapter")
    fast.add_tokens(["<call>"], special_tokens=True)
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(adapter)
    text = "a <call> b"
    trained = fast.encode(text)
    before = transformers.AutoTokenizer.from_pretrained(base).encode(text)
    assert trained != before
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.encode(text) == trained
    assert merged.chat_template == "{{ messages }}"
