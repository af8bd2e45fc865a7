"""Architectures as transformers saves them: names and pieces on disk against those in memory.

transformers renames, stacks and joins many models' parameters as it loads them, and takes that back
as it saves them. An adapter is named after the model in memory, the base after its files. PEFT's
merged model, saved again, has the files' names; so have ours.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from architectures import CASES, MAKERS, MORE_CASES, RENAMED
from matrix import lora
from support import models as support
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter
from support.models import Models
from support.reference import Merged
from test_matrix import assert_several_roundings
from toys import Toys, merge_with_peft, quiet, saver, written

ALL_CASES = CASES | MORE_CASES
# The model types whose rules only transformers has.
ASKED = {"nomic_bert", "gte", "hrm_text"}
PARAMS = [
    pytest.param(kind, name, dtype, id=f"{kind}-{name}-{dtype}".replace(" ", "_"))
    for kind, cases in ALL_CASES.items()
    for name in cases
    for dtype in ("F32", "BF16")
]


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


def base_of(toys: Toys, kind: str, dtype: str) -> Path:
    save = saver((MAKERS | RENAMED)[kind])
    return toys.models.once(f"{kind}-{dtype}", lambda path: save(path, dtype))


def adapter_of(toys: Toys, kind: str, name: str) -> Path:
    label = f"{kind}-{name}".replace(" ", "_")
    return toys.adapter(label, base_of(toys, kind, "F32"), dict(ALL_CASES[kind][name]))


def terms_of(before: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Merged]:
    """What changes, from a merge in float64. The terms of a product can cancel: where its largest
    element is not much smaller than they are, that bounds them."""
    terms = {}
    for name, merged in exact.items():
        start, end = before[name].float64(), merged.float64()
        if not np.array_equal(start, end):
            terms[name] = Merged(end, np.abs(start) + np.abs(end - start).max())
    return terms


def merge_exactly(base: Path, adapter: Path, path: Path) -> dict[str, Tensor]:
    """PEFT's merge with everything in float64, under the names of the files."""
    import torch
    from peft import PeftModel

    with quiet():
        model = support.load(base).to(torch.float64)
        model = PeftModel.from_pretrained(model, adapter).to(torch.float64).merge_and_unload()
    return written(model, path)


def assert_like_peft(
    base: Path,
    adapter: Path,
    path: Path,
    *,
    roundings: int,
    read: Callable[[Path], dict[str, Tensor]] = read_checkpoint,
    **settings: Any,
) -> lorafast.MergeReport:
    """Our merge of the files is PEFT's, tensor by tensor, and loads in transformers."""
    report = lorafast.merge(base, adapter, path / "out", **settings)
    before, ours = read(base), read(path / "out")
    terms = terms_of(before, merge_exactly(base, adapter, path / "exact"))
    assert terms
    assert_rest_untouched(ours, before, terms)
    assert_merged_like_float64(ours, terms, identical=0.99)
    theirs = written(merge_with_peft(base, [adapter]), path / "theirs")
    assert ours.keys() == theirs.keys()
    assert_several_roundings(ours, theirs, terms, roundings)
    with quiet():
        support.load(path / "out")
    return report


@pytest.mark.parametrize(("kind", "name", "dtype"), PARAMS)
def test_like_peft(toys: Toys, tmp_path: Path, kind: str, name: str, dtype: str) -> None:
    base, adapter = base_of(toys, kind, dtype), adapter_of(toys, kind, name)
    settings = ALL_CASES[kind][name]
    # PEFT rounds the head that it saved with the adapter to the base's type before it adds to it.
    saved = "lm_head" in settings["target_modules"]
    twice = (
        "target_parameters" in settings or "word_embeddings" in settings["target_modules"] or saved
    )
    assert_like_peft(base, adapter, tmp_path, roundings=2 if twice else 1)


# What the experts' matrices of a layer are called one by one: of each its outputs and inputs.
ONE_BY_ONE = {
    "mixtral": ("block_sparse_moe.experts", {"w1": (44, 32), "w3": (44, 32), "w2": (32, 44)}),
    "qwen_moe": (
        "mlp.experts",
        {"gate_proj": (28, 32), "up_proj": (28, 32), "down_proj": (32, 28)},
    ),
}


def one_by_one(toys: Toys, kind: str, *, leave_out: tuple[str, ...] = ()) -> Path:
    """An adapter of the releases in which each matrix of each expert was a module."""
    at, shapes = ONE_BY_ONE[kind]
    modules = {
        f"model.layers.{layer}.{at}.{expert}.{name}": shape
        for layer in range(2)
        for expert in range(3)
        for name, shape in shapes.items()
        if name not in leave_out
    }
    names = [name for name in shapes if name not in leave_out]

    def make(path: Path) -> None:
        path.rmdir()
        tensors = adapter_tensors(modules, rank=4)
        make_adapter(path, tensors, r=4, lora_alpha=10, target_modules=names)

    return toys.models.once(f"one-by-one-{kind}-{'-'.join(names)}", make)


def as_in_memory(base: Path, path: Path) -> Path:
    """The same model under the names and in the pieces that it has in memory."""
    shutil.copytree(base, path)
    tensors = support.state(support.load(base))
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_experts_one_by_one(toys: Toys, tmp_path: Path, kind: str, dtype: str) -> None:
    """Onto experts that are stored one by one, and onto the same stored as one tensor."""
    base, adapter = base_of(toys, kind, dtype), one_by_one(toys, kind)
    report = assert_like_peft(base, adapter, tmp_path, roundings=2)
    assert not report.notes
    stacked = as_in_memory(base, tmp_path / "stacked")
    report = lorafast.merge(stacked, adapter, tmp_path / "out-stacked", verify=True)
    (note,) = report.notes
    assert "rules for its model type" in note
    # The same numbers in other places.
    merged = as_in_memory(tmp_path / "out", tmp_path / "out-as-in-memory")
    assert read_checkpoint(tmp_path / "out-stacked") == read_checkpoint(merged)


def test_some_of_the_matrices(toys: Toys, tmp_path: Path) -> None:
    """Which PEFT refuses for a model that has them as one."""
    base = base_of(toys, "mixtral", "F32")
    adapter = one_by_one(toys, "mixtral", leave_out=("w1", "w2"))
    with pytest.raises(ValueError, match="without also targeting"):
        merge_with_peft(base, [adapter])
    lorafast.merge(base, adapter, tmp_path / "out")
    stacked = as_in_memory(base, tmp_path / "stacked")
    lorafast.merge(stacked, adapter, tmp_path / "out-stacked")
    merged = as_in_memory(tmp_path / "out", tmp_path / "out-as-in-memory")
    assert read_checkpoint(tmp_path / "out-stacked") == read_checkpoint(merged)


def test_several_adapters(toys: Toys, tmp_path: Path) -> None:
    """One on the stacked experts and one on each of them, summed on what is stored either way."""
    base = base_of(toys, "mixtral", "F32")
    adapters = [adapter_of(toys, "mixtral", "all"), one_by_one(toys, "mixtral")]
    lorafast.merge(base, adapters, tmp_path / "out", verify=True)
    alone = []
    for number, adapter in enumerate(adapters):
        lorafast.merge(base, adapter, tmp_path / f"alone-{number}")
        alone.append(read_checkpoint(tmp_path / f"alone-{number}"))
    ours = read_checkpoint(tmp_path / "out")
    for name, before in read_checkpoint(base).items():
        start = before.float64()
        expected = start + sum(merged[name].float64() - start for merged in alone)
        assert np.abs(ours[name].float64() - expected).max() < 1e-6, name
    stacked = as_in_memory(base, tmp_path / "stacked")
    lorafast.merge(stacked, adapters, tmp_path / "out-stacked", verify=True)
    merged = as_in_memory(tmp_path / "out", tmp_path / "out-as-in-memory")
    assert read_checkpoint(tmp_path / "out-stacked") == read_checkpoint(merged)


def test_experts_of_old_releases(toys: Toys, tmp_path: Path) -> None:
    """Until 0.18 PEFT took experts as (in, out); the product lies turned on what is cut from it."""
    base, adapter = base_of(toys, "mixtral", "F32"), adapter_of(toys, "mixtral", "experts")
    turned = tmp_path / "turned"
    shutil.copytree(adapter, turned)
    tensors = read_checkpoint(adapter)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        a = tensors[key].float64().reshape(3, -1, tensors[key].shape[1])
        b = tensors[other].float64().reshape(len(tensors[other].float64()), -1, 3)
        # Of each expert (B A) transposed is A transposed times B transposed.
        tensors[key] = tensor(np.concatenate([b[:, :, e].T for e in range(3)]), "F32")
        columns = np.stack([a[e].T for e in range(3)], axis=-1)
        tensors[other] = tensor(columns.reshape(len(columns), -1), "F32")
    write_safetensors(turned / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = turned / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_version": "0.18.0"}))
    lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.merge(base, turned, tmp_path / "out-turned", verify=True)
    ours, theirs = (read_checkpoint(tmp_path / name) for name in ("out-turned", "out"))
    for name, value in theirs.items():
        assert np.abs(ours[name].float64() - value.float64()).max() < 1e-6, name


def renamed_keys(adapter: Path, path: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(adapter, path)
    tensors = {rename(key): value for key, value in read_checkpoint(adapter).items()}
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt"})
    return path


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "experts"), ("llava", "both")])
def test_backbones(toys: Toys, tmp_path: Path, kind: str, name: str) -> None:
    """The adapter of a bare backbone, on the whole model, and the other way round."""
    base, adapter = base_of(toys, kind, "F32"), adapter_of(toys, kind, name)
    lorafast.merge(base, adapter, tmp_path / "out")
    expected = read_checkpoint(tmp_path / "out")
    bare = renamed_keys(
        adapter, tmp_path / "bare", lambda key: key.replace("model.model.model.", "model.model.", 1)
    )
    lorafast.merge(base, bare, tmp_path / "out-bare")
    assert read_checkpoint(tmp_path / "out-bare") == expected
    if kind == "mixtral":
        backbone = tmp_path / "backbone"
        with quiet():
            support.load(base).model.save_pretrained(backbone)
        assert "layers.0.block_sparse_moe.gate.weight" in read_checkpoint(backbone)
        lorafast.merge(backbone, adapter, tmp_path / "out-backbone")
        merged = read_checkpoint(tmp_path / "out-backbone")
        assert merged == {
            name.removeprefix("model."): value
            for name, value in expected.items()
            if name != "lm_head.weight"
        }


def test_trained_rows(toys: Toys, tmp_path: Path) -> None:
    base = base_of(toys, "llava", "F32")
    settings = lora("v_proj", trainable_token_indices={"embed_tokens": [3, 4, 90]})
    adapter = toys.adapter("llava-rows", base, settings)
    assert_like_peft(base, adapter, tmp_path, roundings=1)


RENAMED_KINDS = [
    (kind, name)
    for kind, cases in ALL_CASES.items()
    for name in cases
    if kind in {"mixtral", "qwen_moe", "llava", "vit", *RENAMED}
]


@pytest.mark.parametrize(("kind", "name"), RENAMED_KINDS)
def test_stored_as_in_memory(toys: Toys, tmp_path: Path, kind: str, name: str) -> None:
    """The same numbers come out for a base that is stored as the adapter was trained."""
    base, adapter = base_of(toys, kind, "F32"), adapter_of(toys, kind, name)
    lorafast.merge(base, adapter, tmp_path / "out")
    stored = as_in_memory(base, tmp_path / "stored")
    report = lorafast.merge(stored, adapter, tmp_path / "out-stored")
    assert not report.notes
    merged = as_in_memory(tmp_path / "out", tmp_path / "out-as-in-memory")
    assert read_checkpoint(tmp_path / "out-stored") == read_checkpoint(merged)


OLD_NAMES = {
    "llava": [
        ("model.model.language_model.", "model.language_model.model."),
        ("model.lm_head.", "model.language_model.lm_head."),
        ("model.model.vision_tower.", "model.vision_tower.vision_model."),
        ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "vit": [
        (".layers.", ".encoder.layer."),
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "name"), [("llava", "language"), ("llava", "vision tower"), ("vit", "all")]
)
def test_old_names_of_modules(toys: Toys, tmp_path: Path, kind: str, name: str) -> None:
    """An adapter named after an earlier release's modules, on a base stored as in this one."""
    base, adapter = base_of(toys, kind, "F32"), adapter_of(toys, kind, name)

    def rename(key: str) -> str:
        for new, before in OLD_NAMES[kind]:
            key = key.replace(new, before)
        return key

    old = renamed_keys(adapter, tmp_path / "old", rename)
    assert read_checkpoint(old).keys() != read_checkpoint(adapter).keys()
    stored = as_in_memory(base, tmp_path / "stored")
    lorafast.merge(stored, adapter, tmp_path / "out")
    for number, other in enumerate((base, stored)):
        lorafast.merge(other, old, tmp_path / f"out-{number}")
        merged = as_in_memory(tmp_path / f"out-{number}", tmp_path / f"out-{number}-as-in-memory")
        assert read_checkpoint(merged) == read_checkpoint(
            as_in_memory(tmp_path / "out", tmp_path / f"x{number}")
        )


@pytest.mark.parametrize("kind", ALL_CASES)
def test_the_built_in_rules_are_enough(toys: Toys, kind: str) -> None:
    for name in ALL_CASES[kind]:
        adapter = adapter_of(toys, kind, name)
        fits = lorafast._core.names_fit(base_of(toys, kind, "F32"), [adapter])
        assert fits == (kind not in ASKED)


WITHOUT = """
import sys

for name in ("transformers", "torch", "peft"):
    sys.modules[name] = None
import lorafast

try:
    lorafast.merge(*sys.argv[1:4])
except lorafast.PlanError as error:
    print(error)
"""


def test_without_transformers(toys: Toys, tmp_path: Path) -> None:
    for kind, name in (("mixtral", "all"), ("llava", "both"), ("nomic_bert", "split")):
        base, adapter = base_of(toys, kind, "F32"), adapter_of(toys, kind, name)
        output = tmp_path / kind
        command = [sys.executable, "-c", WITHOUT, *map(str, (base, adapter, output))]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        if kind in ASKED:
            assert "fits no tensor of the base" in run.stdout
            assert not output.exists()
        else:
            assert not run.stdout
            lorafast.merge(base, adapter, tmp_path / f"{kind}-with")
            assert read_checkpoint(output) == read_checkpoint(tmp_path / f"{kind}-with")


def test_what_does_not_fit_is_named(toys: Toys, tmp_path: Path) -> None:
    base, adapter = base_of(toys, "mixtral", "F32"), adapter_of(toys, "mixtral", "experts")
    narrow = tmp_path / "narrow"
    shutil.copytree(adapter, narrow)
    tensors = read_checkpoint(adapter)
    for key, value in tensors.items():
        if "base_layer.lora_A" in key:
            tensors[key] = tensor(value.float64()[:, :-1], "F32")
    write_safetensors(narrow / "adapter_model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(lorafast.PlanError, match=r"gate_up_proj of shape \[3, 88, 32\]"):
        lorafast.merge(base, narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_measured_against_renamed_weights(toys: Toys) -> None:
    base, adapter = base_of(toys, "llava", "F32"), adapter_of(toys, "llava", "both")
    stored = read_checkpoint(base)
    modules = lorafast.analyze(adapter, base=base).modules
    names = {
        "model.language_model.layers.1.self_attn.q_proj": "language_model.model.layers.1",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": "vision_tower.encoder.layers.0",
    }
    for module, layer in names.items():
        norm = np.linalg.norm(stored[f"{layer}.self_attn.q_proj.weight"].float64())
        assert modules[module].base_norm == pytest.approx(norm, rel=1e-12)
