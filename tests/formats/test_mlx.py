"""MLX's adapters against float64 references made from its formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import MODULES, make_adapter, make_base
from support.mlx_files import (
    EMBEDDING,
    Array,
    assert_merged,
    delta,
    factors,
    make_mlx,
    merged,
)
from support.reference import PREFIX


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_merge_has_the_bytes_of_peft_s_adapter_with_transposed_factors(
    dtype: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shards=2)
    tensors = factors(dtype=dtype)
    mlx = make_mlx(tmp_path / "mlx", tensors)
    turned = {
        PREFIX + name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight"): tensor(
            value.float64().T, dtype
        )
        for name, value in tensors.items()
    }
    peft = make_adapter(tmp_path / "peft", turned, lora_alpha=6)
    expected = merged(base, peft, tmp_path / "a")
    assert merged(base, mlx, tmp_path / "b") == expected
    assert merged(base, mlx / "adapters.safetensors", tmp_path / "c") == expected
    assert lorafast.verify(base, mlx, tmp_path / "b").ok
    assert lorafast.compare([mlx, peft]).cosine[0][1] == pytest.approx(1, abs=1e-6)
    assert len(lorafast.duplicates([mlx, peft])) == 1


def test_the_formula_is_the_transposed_product_times_the_scale(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base"), factors()
    adapter = make_mlx(tmp_path / "mlx", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    before = read_checkpoint(base)
    expected = {
        f"{module}.weight": before[f"{module}.weight"].float64() + delta(tensors, module)
        for module in MODULES
    }
    assert_merged(base, tmp_path / "out", expected)
    lorafast.subtract(tmp_path / "out", adapter, tmp_path / "back", original=base)
    assert read_checkpoint(tmp_path / "back") == before


@pytest.mark.parametrize("shape", [(30, 20), (20, 20)])
def test_embeddings_are_tokens_times_width(shape: tuple[int, int], tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    others = {f"{EMBEDDING}.weight": tensor(random.normal(size=shape))}
    base = make_base(tmp_path / "base", others=others)
    tensors = {
        f"{EMBEDDING}.lora_a": tensor(random.normal(size=(shape[0], 4))),
        f"{EMBEDDING}.lora_b": tensor(random.normal(size=(4, shape[1]))),
    }
    adapter = make_mlx(tmp_path / "mlx", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    a, b = (value.float64() for value in tensors.values())
    weight = others[f"{EMBEDDING}.weight"].float64()
    assert_merged(base, tmp_path / "out", {f"{EMBEDDING}.weight": weight + 1.5 * a @ b})


def with_magnitudes(tensors: dict[str, Tensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    random = np.random.default_rng(9)
    magnitudes = {
        f"{module}.m": tensor(np.abs(random.normal(size=length)) + 0.5)
        for module, length in lengths.items()
    }
    return tensors | magnitudes


def rescaled(weight: Array, change: Array, magnitude: Array, share: float) -> Array:
    """W + w(W' - W), with a magnitude for each row."""
    changed = weight + change
    whole = magnitude[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)
    return weight + share * (whole - weight)


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(30, 20), (20, 20)])
def test_dora_rescales_rows_and_of_embeddings_tokens(
    shape: tuple[int, int], share: float, tmp_path: Path
) -> None:
    random = np.random.default_rng(6)
    others = {f"{EMBEDDING}.weight": tensor(random.normal(size=shape))}
    base = make_base(tmp_path / "base", others=others)
    module = next(iter(MODULES))
    tensors = factors({module: MODULES[module]})
    tensors |= {
        f"{EMBEDDING}.lora_a": tensor(random.normal(size=(shape[0], 4))),
        f"{EMBEDDING}.lora_b": tensor(random.normal(size=(4, shape[1]))),
    }
    tensors = with_magnitudes(tensors, {module: MODULES[module][0], EMBEDDING: shape[0]})
    adapter = make_mlx(tmp_path / "mlx", tensors, fine_tune_type="dora")
    lorafast.merge(base, adapter, tmp_path / "out", weights=[share])
    before = read_checkpoint(base)
    changes = {module: delta(tensors, module), EMBEDDING: delta(tensors, EMBEDDING).T}
    expected = {
        f"{name}.weight": rescaled(
            before[f"{name}.weight"].float64(), change, tensors[f"{name}.m"].float64(), share
        )
        for name, change in changes.items()
    }
    assert_merged(base, tmp_path / "out", expected)
    assert lorafast.verify(base, adapter, tmp_path / "out", weights=[share]).ok


def test_full_fine_tuning_brings_weights_under_the_base_s_names(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    module = list(MODULES)[-1]
    random = np.random.default_rng(2)
    whole = {f"{module}.weight": tensor(random.normal(size=MODULES[module]))}
    adapter = make_mlx(
        tmp_path / "mlx", whole, fine_tune_type="full", lora_parameters=None, num_layers=1
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(base) | whole
    listed = lorafast.inspect(adapter).to_dict()["adapter"]
    assert listed["type"] == "FULL"
    wrong = make_mlx(tmp_path / "wrong", {"model.x.weight": whole[f"{module}.weight"]},
                     fine_tune_type="full", lora_parameters=None)  # fmt: skip
    with pytest.raises(lorafast.PlanError, match=r"model\.x\.weight fits nothing in the base"):
        lorafast.plan(base, wrong)


def test_the_first_releases_archives_are_read(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base"), factors()
    expected = merged(base, make_mlx(tmp_path / "mlx", tensors), tmp_path / "a")
    old = tmp_path / "old"
    old.mkdir()
    arrays = {name: value.float64().astype(np.float32) for name, value in tensors.items()}
    np.savez(old / "adapters.npz", **arrays)
    (old / "adapter_config.json").write_text((tmp_path / "mlx/adapter_config.json").read_text())
    assert merged(base, old, tmp_path / "b") == expected
    assert merged(base, old / "adapters.npz", tmp_path / "c") == expected
    assert lorafast.inspect(old).kind == "adapter"
    assert len(lorafast.scan(tmp_path / "old")) == 1
    # MLX's bfloat16 in an archive has two bytes of no type.
    halves = {name: tensor(value.float64(), "BF16") for name, value in tensors.items()}
    blank = {
        name: np.frombuffer(value.data, "V2").reshape(value.shape) for name, value in halves.items()
    }
    np.savez(old / "adapters.npz", **blank)
    bf16 = merged(base, make_mlx(tmp_path / "bf16", halves), tmp_path / "d")
    assert merged(base, old, tmp_path / "e") == bf16
    np.savez(old / "adapters.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(lorafast.AdapterError, match="cannot be read as plain arrays"):
        lorafast.inspect(old)
    (old / "adapters.npz").write_text("not an archive")
    with pytest.raises(lorafast.AdapterError, match=r"adapters\.npz"):
        lorafast.inspect(old)


def test_early_releases_multiplied_alpha_by_the_scale(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base"), factors()
    parameters = {"rank": 4, "alpha": 2.0, "scale": 3.0, "dropout": 0}
    early = {"lora_layers": 2, "lora_parameters": parameters}
    adapter = make_mlx(tmp_path / "early", tensors, whole=early)
    expected = merged(base, make_mlx(tmp_path / "mlx", tensors), tmp_path / "a")
    assert merged(base, adapter, tmp_path / "b") == expected
    assert "scale · alpha / rank" in " ".join(
        lorafast.inspect(adapter).to_dict()["adapter"]["notes"]
    )
    later = make_mlx(tmp_path / "later", tensors, lora_parameters=parameters | {"scale": 1.5})
    assert merged(base, later, tmp_path / "c") == expected


def test_it_is_listed_scanned_and_accounted_for(tmp_path: Path) -> None:
    base, tensors = make_base(tmp_path / "base"), factors()
    adapter = make_mlx(tmp_path / "mlx", tensors)
    # States of the training, which belong to nothing else.
    write_safetensors(adapter / "0000100_adapters.safetensors", tensors)
    listed = lorafast.inspect(adapter).to_dict()
    assert listed["kind"] == "adapter"
    found = listed["adapter"]
    assert (found["type"], found["r"], found["alpha"]) == ("LORA", 4, 6.0)
    assert found["base"] == "mlx-community/base"
    assert {each["scaling"] for each in found["modules"]} == {1.5}
    uses = {each["use"] for each in found["coverage"]["tensors"]}
    assert uses == {"used"}
    fields = {each["name"]: each["use"] for each in found["coverage"]["fields"]}
    assert (fields["lora_parameters"], fields["iters"]) == ("used", "not_needed")
    files = {each["name"]: each["use"] for each in found["coverage"]["files"]}
    assert files == {
        "adapters.safetensors": "used",
        "0000100_adapters.safetensors": "not_needed",
    }
    plan = lorafast.plan(base, adapter).to_dict()
    assert plan["adapters"][0]["format"] == "mlx"
    state = adapter / "0000100_adapters.safetensors"
    assert merged(base, state, tmp_path / "a") == merged(base, adapter, tmp_path / "b")
    make_adapter(tmp_path / "fleet" / "peft")
    make_mlx(tmp_path / "fleet" / "mlx", tensors)
    fleet = lorafast.scan(tmp_path / "fleet")
    assert set(fleet.adapters["name"]) == {"mlx", "peft"}
    rules = dict(zip(fleet.adapters["name"], fleet.adapters["scaling_rule"], strict=True))
    assert rules == {"mlx": "scale", "peft": "alpha/r"}
    assert lorafast.analyze(adapter).summary["base"] == "mlx-community/base"
    assert not fleet.errors


def test_a_tied_head_is_trained_with_the_embeddings(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    others = {f"{EMBEDDING}.weight": tensor(random.normal(size=(30, 20)))}
    base = make_base(tmp_path / "base", others=others, config={"tie_word_embeddings": True})
    tensors = {
        f"{EMBEDDING}.lora_a": tensor(random.normal(size=(30, 4))),
        f"{EMBEDDING}.lora_b": tensor(random.normal(size=(4, 20))),
    }
    adapter = make_mlx(tmp_path / "mlx", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    a, b = (value.float64() for value in tensors.values())
    weight = others[f"{EMBEDDING}.weight"].float64()
    assert_merged(base, tmp_path / "out", {f"{EMBEDDING}.weight": weight + 1.5 * a @ b})
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_other_archives_are_no_adapters_of_a_scan(tmp_path: Path) -> None:
    make_mlx(tmp_path / "fleet" / "mlx", factors())
    (tmp_path / "fleet" / "data").mkdir()
    np.savez(tmp_path / "fleet" / "data" / "images.npz", pixels=np.ones(3))
    (tmp_path / "fleet" / "data" / "text.npz").write_text("no archive")
    arrays = {name: value.float64() for name, value in factors().items()}
    np.savez(tmp_path / "fleet" / "data" / "old.npz", **arrays)
    fleet = lorafast.scan(tmp_path / "fleet")
    assert list(fleet.adapters["name"]) == ["mlx"]
    # Without its config nothing tells the scale of the archive that is one.
    assert ["old.npz" in str(error.path) for error in fleet.errors] == [True]


def test_a_loaded_module_takes_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import lorafast.torch

    tensors = factors({"0.up": (6, 5), "1.down": (5, 6)})
    adapter = make_mlx(tmp_path / "mlx", tensors)
    model = torch.nn.Sequential(
        torch.nn.ModuleDict({"up": torch.nn.Linear(5, 6, bias=False)}),
        torch.nn.ModuleDict({"down": torch.nn.Linear(6, 5, bias=False)}),
    )
    before = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    lorafast.torch.merge_into(model, adapter)
    for name, value in model.state_dict().items():
        right = before[name] + delta(tensors, name.removesuffix(".weight"))
        assert np.allclose(value.numpy(), right, atol=1e-5)


def test_mlx_s_usual_scale_is_nothing_out_of_the_ordinary(tmp_path: Path) -> None:
    def kinds(scale: float) -> set[str]:
        parameters = {"rank": 4, "scale": scale, "dropout": 0.0}
        adapter = make_mlx(tmp_path / str(scale), factors(), lora_parameters=parameters)
        return {finding.kind for finding in lorafast.analyze(adapter).findings}

    assert "unusual_scale" not in kinds(20.0)
    assert "unusual_scale" in kinds(21.0)
