"""Converting to torchtune's and tinker's formats and back, against float64 references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from lorafast._cli.main import main
from safetensors.numpy import load_file
from support.files import read_checkpoint, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

Array = npt.NDArray[Any]

HEADS, KEYS, SIZE, HIDDEN = 4, 2, 6, 20
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "hidden_size": HIDDEN,
}
#: Hugging Face's name, torchtune's, (out, in).
MODULES = {
    "model.layers.0.self_attn.q_proj": ("layers.0.attn.q_proj", (HEADS * SIZE, HIDDEN)),
    "model.layers.0.self_attn.k_proj": ("layers.0.attn.k_proj", (KEYS * SIZE, HIDDEN)),
    "model.layers.0.self_attn.v_proj": ("layers.0.attn.v_proj", (KEYS * SIZE, HIDDEN)),
    "model.layers.0.self_attn.o_proj": ("layers.0.attn.output_proj", (HIDDEN, HEADS * SIZE)),
    "model.layers.1.mlp.gate_proj": ("layers.1.mlp.w1", (30, HIDDEN)),
    "model.layers.1.mlp.down_proj": ("layers.1.mlp.w2", (HIDDEN, 30)),
    "model.layers.1.mlp.up_proj": ("layers.1.mlp.w3", (30, HIDDEN)),
    "lm_head": ("output", (40, HIDDEN)),
}
SHAPES = {path: shape for path, (_, shape) in MODULES.items()}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SETTINGS: dict[str, dict[str, Any]] = {
    "power": {"lora_alpha": 8},
    "three halves": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {"lora_alpha": 4, "alpha_pattern": {Q: 1.5, UP: 16}},
}


def make(path: Path, *, ranks: dict[str, int] | None = None, **settings: Any) -> Path:
    tensors = {}
    for module, shape in SHAPES.items():
        tensors |= adapter_tensors({module: shape}, rank=(ranks or {}).get(module, 4))
    return make_adapter(path, tensors, rank_pattern=ranks or {}, **settings)


def updates(adapter: Path, suffixes: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Array]:
    """ΔW of every module that a file of PEFT's or torchtune's kind holds, by its own keys."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    first, second = suffixes
    found = {}
    for name, a in tensors.items():
        if f".{first}." not in name:
            continue
        module = name.removeprefix(PREFIX).split(f".{first}.")[0]
        alpha = config["lora_alpha"]
        for pattern, value in config.get("alpha_pattern", {}).items():
            if pattern.strip("^$").replace("\\", "") == module:
                alpha = value
        rank = len(a)
        scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
        b = tensors[name.replace(first, second)].astype(np.float64)
        found[module] = scale * b @ a.astype(np.float64)
    return found


def assert_same(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        error = np.linalg.norm(found[module] - update) / np.linalg.norm(update)
        assert error <= tolerance, (module, error)


def interleaved(path: str, rows: Array) -> Array:
    """Rows in Meta's order of the rotary embedding."""
    heads = {"q_proj": HEADS, "k_proj": KEYS}.get(path.rsplit(".", 1)[-1])
    if heads is None:
        return rows
    return rows.reshape(heads, 2, SIZE // 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("through", ["torchtune", "tinker", "mlx", "gguf"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("ranks", [None, {Q: 2, UP: 7}], ids=["one rank", "ranks"])
def test_there_and_back(
    through: Any, settings: dict[str, Any], ranks: dict[str, int] | None, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", modules=SHAPES, config=CONFIG)
    adapter = make(tmp_path / "peft", ranks=ranks, **settings)
    between = tmp_path / f"between{'.gguf' if through == 'gguf' else ''}"
    report = lorafast.convert(adapter, between, to=through, base=base)
    assert (report.source_format, report.target_format) == ("peft", through)
    assert report.modules == len(MODULES)
    assert report.lost == ()
    assert report.max_error is not None
    assert report.max_error < 1e-6
    assert lorafast.inspect(between).to_dict()["format"] == through
    back = lorafast.convert(between, tmp_path / "back", to="peft", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-6
    assert_same(updates(tmp_path / "back"), updates(adapter), 1e-6)
    if ranks is None and settings == SETTINGS["power"]:
        assert report.max_error == back.max_error == 0.0


@pytest.mark.parametrize(("model", "permuted"), [("llama", True), ("qwen2", False)])
def test_torchtune_has_its_names_and_its_order_of_rows(
    model: str, permuted: bool, tmp_path: Path
) -> None:
    config = CONFIG | {"model_type": model}
    base = make_base(tmp_path / "base", modules=SHAPES, config=config)
    adapter = make(tmp_path / "peft", ranks={UP: 7}, lora_alpha=8, alpha_pattern={Q: 3})
    report = lorafast.convert(adapter, tmp_path / "tune", to="torchtune", base=base)
    found = updates(tmp_path / "tune", ("lora_a", "lora_b"))
    order = interleaved if permuted else (lambda _, rows: rows)
    expected = {MODULES[path][0]: order(path, update) for path, update in updates(adapter).items()}
    assert_same(found, expected, 1e-6)
    # One rank and one alpha in all, as torchtune has them.
    written = json.loads((tmp_path / "tune/adapter_config.json").read_text())
    assert written["r"] == 7
    assert not {"rank_pattern", "alpha_pattern"} & set(written)
    assert {len(a) for name, a in load_file(report.files[1]).items() if "lora_a" in name} == {7}
    # The config that is copied beside it tells the order without the base.
    without = lorafast.convert(tmp_path / "tune", tmp_path / "back", to="peft")
    assert without.max_error == 0.0
    assert_same(updates(tmp_path / "back"), updates(adapter), 1e-6)


def test_magnitudes_go_to_torchtune_with_their_rows(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=SHAPES, config=CONFIG)
    tensors = dict(adapter_tensors(SHAPES, rank=4))
    random = np.random.default_rng(3)
    for module, (rows, _) in SHAPES.items():
        magnitude = tensor(1 + random.random(rows))
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
    adapter = make_adapter(tmp_path / "peft", tensors, lora_alpha=4, use_dora=True)
    report = lorafast.convert(adapter, tmp_path / "tune", to="torchtune", base=base)
    assert report.max_error == 0.0
    lorafast.merge(base, adapter, tmp_path / "a")
    lorafast.merge(base, tmp_path / "tune", tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(lorafast.UnsupportedAdapterError, match="DoRA's magnitudes"):
        lorafast.convert(adapter, tmp_path / "tinker", to="tinker", base=base)


def test_the_order_of_rows_needs_the_base(tmp_path: Path) -> None:
    adapter = make(tmp_path / "peft", lora_alpha=8)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="give the base"):
        lorafast.convert(adapter, tmp_path / "tune", to="torchtune")
    assert not (tmp_path / "tune").exists()
    # What has no such rows does not.
    plain = make_adapter(tmp_path / "plain", adapter_tensors({UP: SHAPES[UP]}), lora_alpha=8)
    assert lorafast.convert(plain, tmp_path / "tune", to="torchtune").max_error == 0.0
    assert not (tmp_path / "tune/config.json").exists()


def test_what_torchtune_has_no_name_for_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=SHAPES, config=CONFIG | {"model_type": "falcon"})
    adapter = make(tmp_path / "peft", lora_alpha=8)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="falcon"):
        lorafast.convert(adapter, tmp_path / "tune", to="torchtune", base=base)
    modules = {"transformer.h.0.attn.c_attn": (24, 20)}
    other = make_adapter(tmp_path / "other", adapter_tensors(modules), lora_alpha=8)
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"c_attn, a module that torchtune"):
        lorafast.convert(other, tmp_path / "tune", to="torchtune")
    assert not (tmp_path / "tune").exists()


def test_tinker_calls_the_head_by_its_own_name(tmp_path: Path) -> None:
    adapter = make(tmp_path / "peft", lora_alpha=8)
    report = lorafast.convert(adapter, tmp_path / "tinker", to="tinker")
    assert (report.max_error, report.notes) == (0.0, ())
    found = updates(tmp_path / "tinker")
    found["lm_head"] = found.pop("model.unembed_tokens")
    assert_same(found, updates(adapter), 0.0)


def test_tinker_s_file_may_be_peft_s(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(), lora_alpha=8)
    report = lorafast.convert(adapter, tmp_path / "tinker", to="tinker")
    assert report.target_format == "tinker"
    assert "as which it is read" in report.notes[0]
    assert_same(updates(tmp_path / "tinker"), updates(adapter), 0.0)


def test_gpt_oss_has_another_attention_there(tmp_path: Path) -> None:
    modules = {f"model.layers.0.self_attn.{name}_proj": (24, 20) for name in "qv"}
    experts = tensor(np.ones((2, 20, 24)))
    base = make_base(
        tmp_path / "base",
        modules=modules,
        others={"model.layers.0.mlp.experts.gate_up_proj": experts},
        config={"model_type": "gpt_oss"},
    )
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(modules), lora_alpha=8)
    lorafast.convert(adapter, tmp_path / "tinker", to="tinker", base=base)
    own = {module.replace("self_attn", "attn") for module in modules}
    assert updates(tmp_path / "tinker").keys() == own
    lorafast.merge(base, adapter, tmp_path / "a")
    lorafast.merge(base, tmp_path / "tinker", tmp_path / "b")
    assert read_checkpoint(tmp_path / "a") == read_checkpoint(tmp_path / "b")


def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make(tmp_path / "peft", lora_alpha=8)
    base = make_base(tmp_path / "base", modules=SHAPES, config=CONFIG)
    for to in ("torchtune", "tinker"):
        target = str(tmp_path / to)
        arguments = ["convert", str(adapter), "--to", to, "-o", target, "-b", str(base), "--json"]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["target_format"] == to
