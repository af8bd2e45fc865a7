"""MLX's adapters against float64 references made from its formulas, and against mlx-lm itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

Array = np.ndarray[Any, np.dtype[np.float64]]

EXPERTS, HIDDEN, WIDTH = 3, 20, 12
MLP = "model.layers.0.mlp"
#: One matrix of an expert: its name, (out, in).
MATRICES = {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}
EMBEDDING = "model.embed_tokens"


def factors(
    modules: Mapping[str, tuple[int, int]] = MODULES, *, rank: int = 4, dtype: str = "F32"
) -> dict[str, Tensor]:
    """Factors as MLX stores them, of modules with these (out, in)."""
    random = np.random.default_rng(3)
    tensors = {}
    for module, (outputs, inputs) in modules.items():
        a, b = random.normal(size=(inputs, rank)), random.normal(size=(rank, outputs))
        tensors[f"{module}.lora_a"] = tensor(0.1 * a, dtype)
        tensors[f"{module}.lora_b"] = tensor(0.1 * b, dtype)
    return tensors


def expert_factors(*, rank: int = 4, flat: bool = False) -> dict[str, Tensor]:
    random = np.random.default_rng(4)
    tensors = {}
    for name, (outputs, inputs) in MATRICES.items():
        a = 0.1 * random.normal(size=(EXPERTS, rank, inputs))
        b = 0.1 * random.normal(size=(EXPERTS, outputs, rank))
        tensors[f"{MLP}.switch_mlp.{name}.lora_a"] = tensor(a.reshape(-1, inputs) if flat else a)
        tensors[f"{MLP}.switch_mlp.{name}.lora_b"] = tensor(b)
    return tensors


def config(**settings: Any) -> dict[str, Any]:
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.0}
    usual = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    return usual | {"model": "mlx-community/base", "iters": 100} | settings


def make_mlx(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    whole: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "adapters.safetensors", tensors, {"format": "mlx"})
    text = json.dumps(config(**settings) if whole is None else whole)
    (path / "adapter_config.json").write_text(text)
    return path


def delta(tensors: Mapping[str, Tensor], module: str, scale: float = 1.5) -> Array:
    a, b = (tensors[f"{module}.lora_{part}"].float64() for part in "ab")
    return scale * (a @ b).T


def assert_merged(base: Path, output: Path, expected: Mapping[str, Array]) -> None:
    """That these tensors are the expected ones, and all others the base's own."""
    before, after = read_checkpoint(base), read_checkpoint(output)
    assert list(before) == list(after)
    for name, value in after.items():
        if name in expected:
            assert not np.allclose(before[name].float64(), expected[name], atol=1e-3), name
            assert np.allclose(value.float64(), expected[name], rtol=1e-5, atol=1e-6), name
        else:
            assert value == before[name], name


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, bytes]:
    lorafast.merge(base, adapter, output, **options)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


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


def expert_base(path: Path, kind: str) -> Path:
    random = np.random.default_rng(8)
    weights = {name: random.normal(size=(EXPERTS, *shape)) for name, shape in MATRICES.items()}
    if kind == "one by one":
        others = {
            f"{MLP}.experts.{index}.{name}.weight": tensor(weight[index])
            for name, weight in weights.items()
            for index in range(EXPERTS)
        }
    elif kind == "fused":
        gate_up = np.concatenate([weights["gate_proj"], weights["up_proj"]], axis=1)
        others = {
            f"{MLP}.experts.gate_up_proj": tensor(gate_up),
            f"{MLP}.experts.down_proj": tensor(weights["down_proj"]),
        }
    else:
        others = {
            f"{MLP}.switch_mlp.{name}.weight": tensor(weight) for name, weight in weights.items()
        }
    return make_base(path, modules={}, others=others, config={"model_type": "qwen3_moe"})


def expert_deltas(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Array]:
    """What is added to each tensor of such a base."""
    deltas = {}
    for name, (_, inputs) in MATRICES.items():
        a = tensors[f"{MLP}.switch_mlp.{name}.lora_a"].float64().reshape(EXPERTS, -1, inputs)
        b = tensors[f"{MLP}.switch_mlp.{name}.lora_b"].float64()
        deltas[name] = 1.5 * np.einsum("eor,eri->eoi", b, a)
    if kind == "one by one":
        return {
            f"{MLP}.experts.{index}.{name}.weight": value[index]
            for name, value in deltas.items()
            for index in range(EXPERTS)
        }
    if kind == "fused":
        gate_up = np.concatenate([deltas["gate_proj"], deltas["up_proj"]], axis=1)
        experts = f"{MLP}.experts"
        return {f"{experts}.gate_up_proj": gate_up, f"{experts}.down_proj": deltas["down_proj"]}
    return {f"{MLP}.switch_mlp.{name}.weight": value for name, value in deltas.items()}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["one by one", "fused", "mlx"])
def test_factors_of_experts_find_them_however_the_base_stores_them(
    kind: str, flat: bool, tmp_path: Path
) -> None:
    base, tensors = expert_base(tmp_path / "base", kind), expert_factors(flat=flat)
    adapter = make_mlx(tmp_path / "mlx", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    before = read_checkpoint(base)
    deltas = expert_deltas(tensors, kind)
    assert_merged(
        base,
        tmp_path / "out",
        {name: before[name].float64() + value for name, value in deltas.items()},
    )
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    analysis = lorafast.analyze(adapter, base=base)
    assert len(analysis.modules) == 3 * EXPERTS
    norms = sum(module.frobenius_norm**2 for module in analysis.modules.values())
    expected = sum(float(np.sum(value**2)) for value in deltas.values())
    assert norms == pytest.approx(expected, rel=1e-6)


def test_an_adapter_of_more_or_fewer_experts_is_of_another_model(tmp_path: Path) -> None:
    tensors = expert_factors()
    for count, says in ((2, "the base has more"), (4, "the base has no")):
        own = {
            name: tensor(np.resize(value.float64(), (count, *value.shape[1:])))
            for name, value in tensors.items()
        }
        adapter = make_mlx(tmp_path / f"mlx{count}", own)
        base = expert_base(tmp_path / f"base{count}", "one by one")
        with pytest.raises(lorafast.PlanError, match=says):
            lorafast.plan(base, adapter)
        fused = expert_base(tmp_path / f"fused{count}", "fused")
        with pytest.raises(lorafast.PlanError, match=r"has 3 in|\[3, 24, 20\]"):
            lorafast.plan(fused, adapter)


def test_experts_of_mlx_and_of_peft_are_compared_one_by_one(tmp_path: Path) -> None:
    tensors = expert_factors()
    mlx = make_mlx(tmp_path / "mlx", tensors)
    one_by_one = {}
    for name in MATRICES:
        for part, letter in zip("ab", "AB", strict=True):
            stacked = tensors[f"{MLP}.switch_mlp.{name}.lora_{part}"].float64()
            for index in range(EXPERTS):
                key = f"{PREFIX}{MLP}.experts.{index}.{name}.lora_{letter}.weight"
                one_by_one[key] = tensor(stacked[index])
    peft = make_adapter(tmp_path / "peft", one_by_one, lora_alpha=6)
    found = lorafast.similarity([mlx, peft])
    assert found.matrix[0][1] == pytest.approx(1, abs=1e-6)


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


def test_mlx_vlm_s_names_and_factor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = factors()
    named = {
        name.replace(".lora_a", ".A").replace(".lora_b", ".B"): value
        for name, value in tensors.items()
    }
    adapter = make_mlx(tmp_path / "vlm", named, whole={"rank": 4, "alpha": 1.5, "dropout": 0})
    expected = merged(base, make_mlx(tmp_path / "mlx", tensors), tmp_path / "a")
    assert merged(base, adapter, tmp_path / "b") == expected


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


def test_without_its_config_what_needs_no_scale_is_said(tmp_path: Path) -> None:
    tensors = factors()
    file = write_safetensors(tmp_path / "adapters.safetensors", tensors)
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match=r"holds no adapter_config\.json.*scale"):
        lorafast.plan(base, file)
    assert lorafast.inspect(file).to_dict()["adapter"]["alpha"] is None
    given = lorafast.analyze(file, scale=1.5)
    own = lorafast.analyze(make_mlx(tmp_path / "mlx", tensors))
    for module in MODULES:
        norm = own.modules[module].frobenius_norm
        assert given.modules[module].frobenius_norm == norm


@pytest.mark.parametrize("kind", ["fused", "mlx"])
def test_gpt_oss_has_gate_and_up_in_turn_and_mlx_apart(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    at = f"{MLP}.experts"
    tensors, deltas = {}, {}
    for name, (outputs, inputs) in MATRICES.items():
        a, b = random.normal(size=(EXPERTS, 4, inputs)), random.normal(size=(EXPERTS, outputs, 4))
        tensors |= {f"{at}.{name}.lora_a": tensor(a), f"{at}.{name}.lora_b": tensor(b)}
        deltas[name] = 1.5 * np.matmul(*(tensors[f"{at}.{name}.lora_{x}"].float64() for x in "ba"))
    if kind == "fused":
        turns = np.empty((EXPERTS, 2 * WIDTH, HIDDEN))
        turns[:, 0::2], turns[:, 1::2] = deltas["gate_proj"], deltas["up_proj"]
        changes = {"gate_up_proj": turns, "down_proj": deltas["down_proj"]}
        changes = {f"{at}.{name}": value.transpose(0, 2, 1) for name, value in changes.items()}
    else:
        changes = {f"{at}.{name}.weight": value for name, value in deltas.items()}
    others = {name: tensor(random.normal(size=value.shape)) for name, value in changes.items()}
    base = make_base(tmp_path / "base", modules={}, others=others, config={"model_type": "gpt_oss"})
    adapter = make_mlx(tmp_path / "mlx", tensors, model="mlx-community/gpt-oss-20b-bf16")
    lorafast.merge(base, adapter, tmp_path / "out")
    before = read_checkpoint(base)
    expected = {name: before[name].float64() + value for name, value in changes.items()}
    assert_merged(base, tmp_path / "out", expected)
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    assert len(lorafast.analyze(adapter).modules) == 2 * EXPERTS


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


MODULE = next(iter(MODULES))
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no scale": ({"lora_parameters": {"rank": 4}}, {}, "has no scale"),
    "alpha alone": ({"lora_parameters": {"rank": 4, "alpha": 8}}, {}, "no setting of MLX's"),
    "no lora_a": ({}, {f"{MODULE}.lora_a": None}, "but not its lora_a"),
    "no lora_b": ({}, {f"{MODULE}.lora_b": None}, "but not its lora_b"),
    "m alone": ({}, {f"{MODULE}x.m": tensor(np.ones(3))}, "but not its factors"),
    "ranks": ({}, {f"{MODULE}.lora_b": tensor(np.ones((3, 24)))}, "no pair of factors"),
    "another rank": (
        {"lora_parameters": {"rank": 8, "scale": 2.0}},
        {},
        "rank 4 but its config gives every module rank 8",
    ),
    "three dimensions": ({}, {f"{MODULE}.lora_b": tensor(np.ones((4, 6, 4)))}, "no pair"),
    "a magnitude": ({}, {f"{MODULE}.m": tensor(np.ones(24))}, "does not set fine_tune_type"),
    "no magnitude": ({"fine_tune_type": "dora"}, {}, "no magnitude for"),
    "its length": (
        {"fine_tune_type": "dora"},
        {f"{MODULE}.m": tensor(np.ones(7))},
        r"has shape \[7\]",
    ),
    "a whole weight": (
        {},
        {"model.norm.weight": tensor(np.ones(20))},
        "no part of a LoRA of MLX's",
    ),
    "mixed with PEFT's": (
        {},
        {f"{PREFIX}{MODULE}.lora_A.weight": tensor(np.ones((4, 20)))},
        "no part of a LoRA of MLX's",
    ),
    "integers": ({}, {f"{MODULE}.lora_a": tensor(np.ones((20, 4)), "I32")}, "floating-point"),
    "another training": ({"fine_tune_type": "prefix"}, {}, "fine_tune_type"),
    "rank of text": ({"lora_parameters": {"rank": "4", "scale": 1.0}}, {}, "whole number"),
    "infinite": ({"lora_parameters": {"rank": 4, "scale": 1e999}}, {}, "JSON|finite"),
    "twice": (
        {},
        {
            f"{MLP}.experts.up_proj.lora_a": tensor(np.ones((2, 4, 20))),
            f"{MLP}.experts.up_proj.lora_b": tensor(np.ones((2, 12, 4))),
            f"{MLP}.switch_mlp.up_proj.lora_a": tensor(np.ones((2, 4, 20))),
            f"{MLP}.switch_mlp.up_proj.lora_b": tensor(np.ones((2, 12, 4))),
        },
        "which are one module",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    settings, changes, sentence = BROKEN[name]
    tensors: dict[str, Tensor] = dict(factors())
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    adapter = make_mlx(tmp_path / "mlx", tensors, **settings)
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match=sentence) as raised:
        lorafast.merge(base, adapter, tmp_path / "out")
    assert str(adapter) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_mlx_beside_a_config_of_peft_are_no_adapter(tmp_path: Path) -> None:
    adapter = make_mlx(tmp_path / "mlx", factors(), whole={"peft_type": "LORA", "r": 4})
    with pytest.raises(lorafast.AdapterError, match="the weights beside it are MLX's"):
        lorafast.inspect(adapter)


def layer(name: str, kind: str) -> tuple[Any, Any]:
    """A layer of MLX's, and the same with a LoRA or a DoRA of mlx-lm's."""
    nn = pytest.importorskip("mlx.nn", reason="mlx is not installed (pip install mlx[cpu])")
    lora = pytest.importorskip("mlx_lm.tuner.lora", reason="mlx-lm is not installed")
    dora = pytest.importorskip("mlx_lm.tuner.dora")
    switch = pytest.importorskip("mlx_lm.models.switch_layers")
    layers = {
        "linear": lambda: nn.Linear(20, 24, bias=False),
        "embedding": lambda: nn.Embedding(30, 20),
        "experts": lambda: switch.SwitchLinear(20, 12, 3, bias=False),
    }
    kinds = {
        ("linear", "lora"): lora.LoRALinear,
        ("linear", "dora"): dora.DoRALinear,
        ("embedding", "lora"): lora.LoRAEmbedding,
        ("embedding", "dora"): dora.DoRAEmbedding,
        ("experts", "lora"): lora.LoRASwitchLinear,
    }
    base = layers[name]()
    return base, kinds[name, kind].from_base(base, r=4, scale=1.5)


PATHS = {
    "linear": "model.layers.0.self_attn.q_proj",
    "embedding": EMBEDDING,
    "experts": f"{MLP}.switch_mlp.up_proj",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", "lora"), ("linear", "dora"), ("embedding", "lora"), ("embedding", "dora"),
     ("experts", "lora")],
)  # fmt: skip
def test_mlx_lm_fuses_to_the_same_weights(name: str, kind: str, tmp_path: Path) -> None:
    base, adapted = layer(name, kind)
    mx = pytest.importorskip("mlx.core")
    random = np.random.default_rng(1)
    for part in ("lora_a", "lora_b", *(["m"] if kind == "dora" else [])):
        shape = getattr(adapted, part).shape
        setattr(adapted, part, mx.array(np.abs(random.normal(size=shape)).astype(np.float32)))
    trained = {
        f"{PATHS[name]}.{part}": tensor(np.array(getattr(adapted, part)))
        for part in ("lora_a", "lora_b", *(["m"] if kind == "dora" else []))
    }
    weight = f"{PATHS[name]}.weight"
    others = {weight: tensor(np.array(base.weight))}
    checkpoint = make_base(tmp_path / "base", others=others, modules={})
    adapter = make_mlx(tmp_path / "mlx", trained, fine_tune_type=kind)
    lorafast.merge(checkpoint, adapter, tmp_path / "out")
    fused = np.array(adapted.fuse().weight)
    found = read_checkpoint(tmp_path / "out")[weight].float64()
    assert np.allclose(found, fused, rtol=1e-4, atol=1e-5)


def test_adapters_without_its_keys_are_not_mlx_s(tmp_path: Path) -> None:
    """PEFT's own files keep their format, whatever lies beside."""
    peft = make_adapter(tmp_path / "peft", adapter_tensors())
    write_safetensors(peft / "adapters.safetensors", factors())
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"adapters\.safetensors"):
        lorafast.plan(base, peft)
    assert read_safetensors(peft / "adapter_model.safetensors")
