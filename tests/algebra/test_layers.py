"""Combining what is no linear layer's product: norms, biases, embeddings and convolutions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from support.algebra import random_modules, write_lora
from support.files import tensor
from support.handmade import make_base
from support.image_formats import FLUX, UNET, pipeline, save
from support.reference import PREFIX

Array = npt.NDArray[Any]

AT = "model.layers.0.self_attn"
SHAPES = {f"{AT}.q_proj": (24, 16), f"{AT}.o_proj": (16, 24)}


def merged(base: Path, adapters: Any, output: Path, **options: Any) -> dict[str, Array]:
    lorafast.merge(base, adapters, output, **options)
    found: dict[str, Array] = {}
    for file in sorted(output.rglob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_merge(
    base: Path, adapters: list[Path], combined: Path, place: Path, weights: list[float]
) -> None:
    one = merged(base, combined, place / "one")
    two = merged(base, adapters, place / "two", strategy="weighted", weights=weights)
    assert one.keys() == two.keys()
    for name, value in two.items():
        np.testing.assert_allclose(one[name], value, atol=2e-5, err_msg=name)


def with_biases(path: Path, seed: int, alpha: float, modules: list[str]) -> Path:
    factors = random_modules(seed, {name: SHAPES[name] for name in modules}, 2)
    write_lora(path, factors, alpha=alpha, lora_bias=True)
    file = path / "adapter_model.safetensors"
    random = np.random.default_rng(seed)
    biases = {
        f"{PREFIX}{name}.lora_B.bias": random.standard_normal(SHAPES[name][0]).astype(np.float32)
        for name in modules
    }
    save_file(load_file(file) | biases, file)
    return path


def bias_of(path: Path, module: str) -> Array:
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["lora_bias"]
    tensors = load_file(path / "adapter_model.safetensors")
    stored = tensors[f"{PREFIX}{module}.lora_B.bias"].astype(np.float64)
    pattern = f"^{module}$".replace(".", "\\.")
    alpha = config.get("alpha_pattern", {}).get(pattern, config["lora_alpha"])
    scale: float = alpha / len(tensors[f"{PREFIX}{module}.lora_A.weight"])
    return stored * scale


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_biases_of_second_factors_have_the_coefficients(tmp_path: Path, method: Any) -> None:
    q, o = SHAPES
    one = with_biases(tmp_path / "1", 1, 8.0, [q, o])
    two = with_biases(tmp_path / "2", 2, 1.0, [q])
    # And one that has none: its own module gets a bias of zeros, as the config speaks of all.
    three = write_lora(tmp_path / "3", random_modules(3, {o: SHAPES[o]}, 2), alpha=2.0)
    adapters = [one, two] if method == "slerp" else [one, two, three]
    report = lorafast.combine(
        adapters, tmp_path / "out", method=method, rank=16 if method == "ties" else None
    )
    record = report.modules[q]
    c = record.coefficients or (1.0, 1.0)
    wanted = c[0] * bias_of(one, q) + c[1] * bias_of(two, q)
    assert bias_of(tmp_path / "out", q) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    c = report.modules[o].coefficients or (1.0, 1.0)
    assert bias_of(tmp_path / "out", o) == pytest.approx(c[0] * bias_of(one, o), rel=1e-6)


def test_a_module_that_one_adapter_has_without_a_bias_gets_zeros(tmp_path: Path) -> None:
    q, o = SHAPES
    one = with_biases(tmp_path / "1", 1, 8.0, [q])
    two = write_lora(tmp_path / "2", random_modules(2, {o: SHAPES[o]}, 2), alpha=2.0)
    report = lorafast.combine([one, two], tmp_path / "out")
    assert not bias_of(tmp_path / "out", o).any()
    assert any("bias of zeros" in note for note in report.notes)


def test_biases_stay_where_the_products_cancel(tmp_path: Path) -> None:
    q, _ = SHAPES
    one = with_biases(tmp_path / "1", 1, 8.0, [q])
    two = with_biases(tmp_path / "2", 1, 8.0, [q])
    file = two / "adapter_model.safetensors"
    name = f"{PREFIX}{q}.lora_B.bias"
    save_file(load_file(file) | {name: np.ones(SHAPES[q][0], np.float32)}, file)
    lorafast.combine([one, two], tmp_path / "out", weights=[1, -1], rank="energy:0.9")
    wanted = bias_of(one, q) - 4
    assert bias_of(tmp_path / "out", q) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def lycoris(path: Path, seed: int, *, has_bias: bool = True) -> Path:
    """Factors beside differences of a norm and of a layer's bias."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> Array:
        return random.normal(size=shape).astype(np.float32)

    at = "lycoris_transformer_blocks_0_attn"
    tensors = {
        f"{at}_to_q.lora_down.weight": values(2, 12),
        f"{at}_to_q.lora_up.weight": values(12, 2),
        f"{at}_to_q.alpha": np.array(1.0, np.float32),
        f"{at}_norm_q.w_norm": values(3),
    }
    if has_bias:
        tensors[f"{at}_to_q.diff_b"] = values(12)
    return save(path, tensors)


def test_differences_of_norms_and_biases_are_summed(tmp_path: Path) -> None:
    one = lycoris(tmp_path / "1.safetensors", 1)
    two = lycoris(tmp_path / "2.safetensors", 2, has_bias=False)
    output = tmp_path / "out.safetensors"
    report = lorafast.combine([one, two], output, to="lycoris", weights=[2, -0.5])
    own, other, found = load_file(one), load_file(two), load_file(output)
    at = "lycoris_transformer_blocks_0_attn"
    norm = f"{at}_norm_q.w_norm"
    assert found[norm] == pytest.approx(2 * own[norm] - 0.5 * other[norm], rel=1e-6)
    assert found[f"{at}_to_q.diff_b"] == pytest.approx(2 * own[f"{at}_to_q.diff_b"], rel=1e-6)
    assert any("norms and biases" in note for note in report.notes)
    base = pipeline(tmp_path / "base", transformer=FLUX)
    assert_same_merge(base, [one, two], output, tmp_path, [2, -0.5])


def test_vectors_have_coefficients_of_their_own(tmp_path: Path) -> None:
    one, two = (lycoris(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    output = tmp_path / "out.safetensors"
    lorafast.combine([one, two], output, to="lycoris", method="projection")
    norm = "lycoris_transformer_blocks_0_attn_norm_q.w_norm"
    x, y = (load_file(each)[norm].astype(np.float64) for each in (one, two))
    assert load_file(output)[norm] == pytest.approx(x - (x @ y) / (y @ y) * y, rel=1e-5)


def test_a_format_without_norms_says_so(tmp_path: Path) -> None:
    one, two = (lycoris(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    base = pipeline(tmp_path / "base", transformer=FLUX)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="updates of norms"):
        lorafast.combine([one, two], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(40, 16), (16, 16)], ids=["tall", "square"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["columns first", "tokens first"])
def test_embeddings_of_both_orientations(
    tmp_path: Path, shape: tuple[int, int], order: tuple[int, int]
) -> None:
    tokens, width = shape
    name = "model.embed_tokens"
    random = np.random.default_rng(1)

    def values(*shape: int) -> Array:
        return random.normal(size=shape).astype(np.float32)

    # PEFT's product is the transpose of the weight.
    a, b = values(2, tokens), values(width, 2)
    one = tmp_path / "1"
    one.mkdir()
    save_file(
        {f"{PREFIX}{name}.lora_embedding_A": a, f"{PREFIX}{name}.lora_embedding_B": b},
        one / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name]}
    (one / "adapter_config.json").write_text(json.dumps(config))
    # A format that knows no embeddings has it as the weight is.
    down, up = values(3, width), values(tokens, 3)
    two = write_lora(tmp_path / "2", {name: (up, down)}, alpha=3)
    adapters = [[one, two][place] for place in order]
    weights = [[1.0, -0.5][place] for place in order]
    report = lorafast.combine(adapters, tmp_path / "out", weights=weights)
    assert report.ranks == {name: 5}
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    delta = (
        found[f"{PREFIX}{name}.lora_embedding_B"].astype(np.float64)
        @ found[f"{PREFIX}{name}.lora_embedding_A"]
    ).T
    wanted = (b.astype(np.float64) @ a).T - 0.5 * up.astype(np.float64) @ down
    assert delta == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    base = make_base(
        tmp_path / "base",
        modules={},
        others={f"{name}.weight": tensor(values(tokens, width), "F32")},
        config={"model_type": "llama"},
    )
    assert_same_merge(base, adapters, tmp_path / "out", tmp_path, weights)


CONV = "down_blocks.0.resnets.0.conv1"


def convolution(path: Path, kind: str, seed: int) -> Path:
    """An update of the kernel (4, 4, 3, 3) as a trainer writes it."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> Array:
        return random.normal(size=shape).astype(np.float32)

    key = f"lora_unet_{CONV.replace('.', '_')}"
    if kind == "peft":
        path.mkdir()
        factors = {
            f"{PREFIX}{CONV}.lora_A.weight": values(2, 4, 3, 3),
            f"{PREFIX}{CONV}.lora_B.weight": values(4, 2, 1, 1),
        }
        save_file(factors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [CONV]}
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path
    tensors = {f"{key}.alpha": np.array(2.0, np.float32)}
    match kind:
        case "kohya":
            tensors |= {
                f"{key}.lora_down.weight": values(2, 4, 3, 3),
                f"{key}.lora_up.weight": values(4, 2, 1, 1),
            }
        case "mid":
            tensors |= {
                f"{key}.lora_down.weight": values(2, 4, 1, 1),
                f"{key}.lora_mid.weight": values(2, 2, 3, 3),
                f"{key}.lora_up.weight": values(4, 2, 1, 1),
            }
        case "flat":
            tensors |= {
                f"{key}.hada_w1_a": values(4, 1),
                f"{key}.hada_w1_b": values(1, 36),
                f"{key}.hada_w2_a": values(4, 1),
                f"{key}.hada_w2_b": values(1, 36),
            }
    return save(path.with_suffix(".safetensors"), tensors)


KINDS = ["peft", "kohya", "mid", "flat"]


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_convolutions_of_every_trainer(tmp_path: Path, one: str, other: str) -> None:
    base = pipeline(tmp_path / "base", unet=UNET)
    adapters = [convolution(tmp_path / "1", one, 1), convolution(tmp_path / "2", other, 2)]
    weights = [1.0, -0.5]
    if (one, other) == ("flat", "flat"):
        # Nothing but the base tells the kernel.
        output = tmp_path / "out.safetensors"
        lorafast.combine(adapters, output, to="kohya", base=base, weights=weights)
    else:
        output = tmp_path / "out"
        lorafast.combine(adapters, output, base=base, weights=weights)
    assert_same_merge(base, adapters, output, tmp_path, weights)
