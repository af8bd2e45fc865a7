"""Converting adapters: what is written says the same update, and what it cannot say is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from lorafast._cli.main import main
from safetensors.numpy import load_file, save_file
from support.files import tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

Array = npt.NDArray[Any]


def peft_updates(adapter: Path) -> dict[str, Array]:
    """ΔW of every module of a PEFT adapter of plain LoRA, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    updates = {}
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = len(down)
        alpha = config["lora_alpha"]
        for pattern, value in config.get("alpha_pattern", {}).items():
            if pattern.strip("^$").replace("\\", "") == module:
                alpha = value
        up = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
        product = up.reshape(len(up), -1) @ down.reshape(rank, -1).astype(np.float64)
        updates[module] = scale * product
    return updates


def assert_same(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        error = np.linalg.norm(found[module] - update) / np.linalg.norm(update)
        assert error <= tolerance, (module, error)


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("through", ["kohya", "mlx", "gguf"])
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {next(iter(MODULES)): 1.5, list(MODULES)[3]: 16}},
    ],
    ids=["power", "three halves", "rslora", "patterns"],
)
def test_there_and_back(through: str, settings: dict[str, Any], tmp_path: Path) -> None:
    if through == "gguf":
        config = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 20}
        base = make_base(tmp_path / "base", config=config)
    else:
        base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(rank=4), **settings)
    file = tmp_path / ("between" if through == "mlx" else f"between.{through}")
    if through == "kohya":
        file = file.with_suffix(".safetensors")
    report = lorafast.convert(adapter, file, to=through, base=base)  # type: ignore[arg-type]
    assert (report.source_format, report.target_format) == ("peft", through)
    assert report.modules == len(MODULES)
    assert report.lost == ()
    assert report.max_error is not None
    assert report.max_error < 1e-6
    if through == "kohya" and "use_rslora" not in settings:
        assert report.max_error == 0.0
    listing = lorafast.inspect(file).to_dict()
    assert listing["kind"] == "adapter"
    back = lorafast.convert(file, tmp_path / "back", to="peft", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-6
    assert_same(peft_updates(tmp_path / "back"), peft_updates(adapter), 1e-6)
    if through == "kohya":
        own = load_file(adapter / "adapter_model.safetensors")
        again = load_file(tmp_path / "back/adapter_model.safetensors")
        assert own.keys() == again.keys()
        for name, value in own.items():
            np.testing.assert_array_equal(again[name], value)


def test_a_narrower_type_counts_as_an_error(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(rank=4), lora_alpha=8)
    report = lorafast.convert(adapter, tmp_path / "half", to="peft", dtype="bfloat16")
    ours, theirs = peft_updates(adapter), load_bf16(tmp_path / "half")
    worst = max(
        float(np.linalg.norm(ours[module] - theirs[module]) / np.linalg.norm(ours[module]))
        for module in ours
    )
    assert report.max_error == pytest.approx(worst, rel=1e-9)
    assert report.max_error is not None
    assert 1e-4 < report.max_error < 1e-2


def load_bf16(adapter: Path) -> dict[str, Array]:
    from support.files import read_safetensors

    stored = read_safetensors(adapter / "adapter_model.safetensors")
    updates = {}
    for name, down in stored.items():
        if name.endswith(".lora_A.weight"):
            assert down.dtype == "BF16"
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            up = stored[name.replace("lora_A", "lora_B")]
            updates[module] = 8 / 4 * (up.float64() @ down.float64())
    return updates


def dora(path: Path) -> Path:
    tensors = dict(adapter_tensors(rank=4))
    random = np.random.default_rng(3)
    for module, (rows, _) in MODULES.items():
        values = tensor(1 + random.random(rows))
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = values
    return make_adapter(path, tensors, lora_alpha=4, use_dora=True)


def test_magnitudes_go_along_where_there_is_a_place(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = dora(tmp_path / "peft")
    report = lorafast.convert(adapter, tmp_path / "x.safetensors", to="kohya")
    assert report.max_error == 0.0
    written = load_file(tmp_path / "x.safetensors")
    scales = {name: value for name, value in written.items() if name.endswith(".dora_scale")}
    assert {value.shape for value in scales.values()} == {(24, 1), (50, 1)}
    lorafast.merge(base, adapter, tmp_path / "a")
    lorafast.merge(base, tmp_path / "x.safetensors", tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_has_no_place_is_refused_by_name_or_left_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", config={"num_attention_heads": 3, "num_key_value_heads": 3})
    adapter = dora(tmp_path / "peft")
    target = tmp_path / "out" / "x.gguf"
    target.parent.mkdir()
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"DoRA's magnitudes .*q_proj"):
        lorafast.convert(adapter, target, to="gguf", base=base)
    assert left_in(target.parent) == set()
    report = lorafast.convert(adapter, target, to="gguf", base=base, lossy=True)
    # With the base it is known how much that is.
    assert report.max_error is not None
    assert report.max_error > 0.1
    assert report.lost[0].startswith("DoRA's magnitudes (")
    assert left_in(target.parent) == {"x.gguf"}


@pytest.mark.parametrize("name", ["style", "style.v1", "style.gguf"])
def test_a_file_that_nothing_would_read_by_its_name_is_not_begun(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    source = make_adapter(tmp_path / "adapter")
    output = tmp_path / "out" / name
    with pytest.raises(lorafast.LorafastError, match=r"ends in \.safetensors") as raised:
        lorafast.convert(source, output, to="kohya", base=base)
    assert str(output) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_there_is_replaced_unless_asked(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(rank=4), lora_alpha=8)
    target = tmp_path / "out" / "x.safetensors"
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(lorafast.OutputError, match="overwrite"):
        lorafast.convert(adapter, target, to="kohya")
    assert target.read_text() == "mine"
    assert left_in(target.parent) == {"x.safetensors"}
    lorafast.convert(adapter, target, to="kohya", overwrite=True)
    assert left_in(target.parent) == {"x.safetensors"}
    with pytest.raises(lorafast.OutputError, match="is a file"):
        lorafast.convert(adapter, target, to="peft")
    with pytest.raises(ValueError, match="there are peft, kohya"):
        lorafast.convert(adapter, tmp_path / "y", to="onnx")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="unknown dtype"):
        lorafast.convert(adapter, tmp_path / "y", to="peft", dtype="int8")


def test_a_language_models_transformer_is_no_component(tmp_path: Path) -> None:
    modules = {"transformer.h.0.attn.c_attn": (24, 20), "transformer.h.1.mlp.c_fc": (50, 20)}
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(modules), lora_alpha=8)
    lorafast.convert(adapter, tmp_path / "x.safetensors", to="kohya")
    flat = {name.split(".")[0] for name in load_file(tmp_path / "x.safetensors")}
    assert flat == {"lora_unet_" + module.replace(".", "_") for module in modules}
    lorafast.convert(adapter, tmp_path / "mlx", to="mlx")
    back = lorafast.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    assert back.max_error == 0.0
    assert peft_updates(tmp_path / "back").keys() == modules.keys()


def test_what_is_in_the_format_already_keeps_its_names(tmp_path: Path) -> None:
    modules = {"double_blocks.0.img_attn.qkv": (24, 8)}
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(modules), lora_alpha=8)
    report = lorafast.convert(adapter, tmp_path / "half", to="peft", dtype="float16")
    assert report.max_error is not None
    assert 0 < report.max_error < 1e-3
    listing = lorafast.inspect(tmp_path / "half").to_dict()
    assert [module["name"] for module in listing["adapter"]["modules"]] == list(modules)


def test_flattened_names_need_the_base(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(rank=4), lora_alpha=8)
    lorafast.convert(adapter, tmp_path / "x.safetensors", to="kohya")
    with pytest.raises(lorafast.UnsupportedAdapterError, match="only the base tells"):
        lorafast.convert(tmp_path / "x.safetensors", tmp_path / "y", to="peft")
    assert not (tmp_path / "y").exists()


def loha(random: np.random.Generator, rows: int, columns: int) -> dict[str, Array]:
    sides = {"a": (rows, 3), "b": (3, columns)}
    return {
        f"hada_w{number}_{side}": random.normal(size=shape).astype(np.float32)
        for number in (1, 2)
        for side, shape in sides.items()
    }


def lokr(random: np.random.Generator, rows: int, columns: int) -> dict[str, Array]:
    del columns
    w1 = random.normal(size=(2, 4)).astype(np.float32)
    return {
        "lokr_w1": w1,
        "lokr_w2_a": random.normal(size=(rows // 2, 3)).astype(np.float32),
        "lokr_w2_b": random.normal(size=(3, 5)).astype(np.float32),
    }


@pytest.mark.parametrize("make", [loha, lokr])
def test_other_algorithms_become_plain_factors(make: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    random = np.random.default_rng(1)
    tensors = {}
    for module, (rows, columns) in MODULES.items():
        flat = "lora_unet_" + module.replace(".", "_")
        for part, value in make(random, rows, columns).items():
            tensors[f"{flat}.{part}"] = value
        tensors[f"{flat}.alpha"] = np.array(1.5, np.float32)
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    expected = {}
    for module in MODULES:
        own = {
            name.rsplit(".", 1)[1]: value.astype(np.float64)
            for name, value in tensors.items()
            if name.startswith("lora_unet_" + module.replace(".", "_") + ".")
        }
        if make is loha:
            left = own["hada_w1_a"] @ own["hada_w1_b"]
            expected[module] = 0.5 * left * (own["hada_w2_a"] @ own["hada_w2_b"])
        else:
            right = own["lokr_w2_a"] @ own["lokr_w2_b"]
            expected[module] = 0.5 * np.kron(own["lokr_w1"], right)
    # Kept as they are.
    kept = lorafast.convert(file, tmp_path / "kept.safetensors", to="kohya", base=base)
    assert kept.max_error == 0.0
    again = load_file(tmp_path / "kept.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)
    # As plain factors.
    report = lorafast.convert(file, tmp_path / "peft", to="peft", base=base, algorithm="lora")
    assert report.max_error is not None
    assert report.max_error < 1e-6
    assert_same(peft_updates(tmp_path / "peft"), expected, 1e-6)
    plain = tmp_path / "plain.safetensors"
    lorafast.convert(file, plain, to="kohya", base=base, algorithm="lora")
    assert {name.split(".", 1)[1] for name in load_file(plain)} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }


HIDDEN = 8


def flux(random: np.random.Generator) -> dict[str, Array]:
    """A block of each kind of a Flux-shaped model in its author's names."""

    def weight(rows: int, columns: int = HIDDEN) -> Array:
        return random.normal(size=(rows, columns)).astype(np.float32)

    return {
        "img_in.weight": weight(HIDDEN, 4),
        "double_blocks.0.img_attn.qkv.weight": weight(3 * HIDDEN),
        "double_blocks.0.img_attn.proj.weight": weight(HIDDEN),
        "double_blocks.0.txt_attn.qkv.weight": weight(3 * HIDDEN),
        "single_blocks.0.linear1.weight": weight(3 * HIDDEN + 4 * HIDDEN),
        "single_blocks.0.linear2.weight": weight(HIDDEN, 5 * HIDDEN),
        "single_blocks.0.modulation.lin.weight": weight(3 * HIDDEN),
        "final_layer.adaLN_modulation.1.weight": weight(2 * HIDDEN),
    }


def test_fused_projections_are_cut_and_joined(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    weights = flux(random)
    base = tmp_path / "flux.safetensors"
    save_file(weights, base)
    tensors = {}
    for name, weight in weights.items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = random.normal(size=(2, weight.shape[1]))
        tensors[f"{flat}.lora_up.weight"] = random.normal(size=(len(weight), 2))
        tensors[f"{flat}.alpha"] = np.array(1.0)
    file = tmp_path / "x.safetensors"
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, file)
    report = lorafast.convert(file, tmp_path / "peft", to="peft", base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-7
    modules = peft_updates(tmp_path / "peft")
    assert "single_transformer_blocks.0.proj_mlp" in modules
    assert len(modules) == len(weights) + 2 + 2 + 3
    halves = np.split(modules["norm_out.linear"], 2)
    own = 0.5 * (
        tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"].astype(np.float32)
        @ tensors["lora_unet_final_layer_adaLN_modulation_1.lora_down.weight"].astype(np.float32)
    )
    np.testing.assert_allclose(np.concatenate(halves[::-1]), own, atol=1e-6)
    lorafast.merge(base, file, tmp_path / "a")
    lorafast.merge(base, tmp_path / "peft", tmp_path / "b")
    merged = load_file(tmp_path / "a/flux.safetensors")
    for name, value in load_file(tmp_path / "b/flux.safetensors").items():
        np.testing.assert_allclose(value, merged[name], atol=1e-6, err_msg=name)
    back = lorafast.convert(tmp_path / "peft", tmp_path / "y.safetensors", to="kohya", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-6
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        # The parts share their A, so that the fused factors are the same again.
        np.testing.assert_array_equal(again[name], value.astype(np.float32), err_msg=name)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(rank=4), lora_alpha=8)
    target = tmp_path / "x.safetensors"
    assert main(["convert", str(adapter), "--to", "kohya", "-o", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "conversion"
    assert report["max_error"] == 0.0
    assert report["files"] == [str(target)]
    assert main(["convert", str(adapter), "--to", "kohya", "--output", str(target)]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main(["convert", str(adapter), "--to", "mlx", "-o", str(tmp_path / "m")]) == 0
    assert "of a module's update" in capsys.readouterr().out
