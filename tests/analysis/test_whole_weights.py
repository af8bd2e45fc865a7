"""Figures of what is made of a base's whole weight: W′ − W₀ of IA³, GLoRA, orthogonal blocks and
DoRA, held against what a merge writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support import image_formats as toys
from support.files import read_checkpoint, tensor, write_safetensors
from support.handmade import make_base

Array = NDArray[np.float64]

PATHS = [f"down_blocks.0.layer{number}" for number in range(6)]
SHAPE = (24, 20)
#: What the file calls the modules.
KEYS = [f"lora_unet_{path.replace('.', '_')}" for path in PATHS]


def generator(*seed: object) -> np.random.Generator:
    return np.random.default_rng([ord(char) for char in repr(seed)])


def parts_of(name: str, path: str, outputs: int = 24, inputs: int = 20) -> dict[str, Array]:
    random = generator(name, path)

    def normal(*shape: int) -> Array:
        return 0.2 * random.normal(size=shape)

    lora = {"lora_down.weight": normal(3, inputs), "lora_up.weight": normal(outputs, 3)}
    return {
        "ia3": {"weight": normal(outputs), "on_input": np.array(0.0)},
        "ia3 of inputs": {"weight": normal(inputs), "on_input": np.array(1.0)},
        "glora": {
            "a1.weight": normal(inputs, 2),
            "a2.weight": normal(2, inputs),
            "b1.weight": normal(outputs, 2),
            "b2.weight": normal(2, inputs),
        },
        "oft": {"oft_blocks": normal(outputs // 4, 4, 4)},
        "boft": {"oft_blocks": normal(2, outputs // 4, 4, 4)},
        "dora": lora | {"dora_scale": 3 + normal(outputs, 1)},
        "dora of inputs": lora | {"dora_scale": 3 + normal(1, inputs)},
    }[name]


def base_of(path: Path, weights: Mapping[str, Array]) -> Path:
    others = {f"{name}.weight": tensor(value, "F64") for name, value in weights.items()}
    return make_base(path, modules={}, dtype="F64", others=others, config={"model_type": "x"})


def adapter_of(path: Path, modules: Mapping[str, Mapping[str, Array]]) -> Path:
    tensors = {
        f"lora_unet_{module.replace('.', '_')}.{part}": tensor(value)
        for module, parts in modules.items()
        for part, value in parts.items()
    }
    return write_safetensors(path, tensors)


def weights_of(shape: tuple[int, ...] = SHAPE) -> dict[str, Array]:
    return {path: generator(path, "weight").normal(size=shape) for path in PATHS}


NAMES = ["ia3", "ia3 of inputs", "glora", "oft", "boft", "dora", "dora of inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_with_a_base_the_change_is_measured(name: str, tmp_path: Path) -> None:
    weights = weights_of()
    base = base_of(tmp_path / "base", weights)
    adapter = adapter_of(tmp_path / "x.safetensors", {path: parts_of(name, path) for path in PATHS})
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    found = lorafast.analyze(adapter, base=base, entries=True)
    assert list(found.modules) == KEYS
    for path, module in zip(PATHS, found.modules.values(), strict=True):
        weight = weights[path]
        change = merged[f"{path}.weight"].float64() - weight
        size = np.linalg.norm(change)
        assert module.change_norm == pytest.approx(size, rel=1e-5)
        assert module.base_norm == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        assert module.base_tensor == f"{path}.weight"
        assert module.shape == SHAPE
        assert module.rescaled == name.startswith("dora")
        assert module.made_of_weight == (not name.startswith("dora"))
        if module.made_of_weight:
            sigma = np.linalg.svd(change, compute_uv=False)
            assert module.frobenius_norm == pytest.approx(size, rel=1e-5)
            assert np.allclose(module.singular_values, sigma, atol=1e-5 * sigma[0])
            assert module.relative_norm == pytest.approx(size / np.linalg.norm(weight), rel=1e-5)
            assert module.entry_mean == pytest.approx(change.mean(), abs=1e-6)
            assert module.entries is not None
            assert module.entries.max == pytest.approx(change.max(), rel=1e-4)
    features = " ".join(found.summary["features"])
    assert name.startswith("dora") or "whose figures are of W′ − W₀" in features
    kinds = {finding.kind for finding in found.findings}
    assert not kinds & {"no_modules", "exhausted_rank", "unused_rank", "unmeasured"} or (
        name.startswith("dora")
    )
    # All views take them.
    for view in (found.to_json(), found.to_markdown(), found.to_html()):
        assert PATHS[0].rsplit(".")[-1] in view
    assert len(found.to_pandas()) == len(PATHS)


def test_a_large_change_has_norms_alone(tmp_path: Path) -> None:
    random = generator("large")
    weight = random.normal(size=(1544, 1540))
    base = base_of(tmp_path / "base", {PATHS[0]: weight})
    parts = parts_of("ia3", PATHS[0], 1544, 1540)
    adapter = adapter_of(tmp_path / "x.safetensors", {PATHS[0]: parts})
    found = lorafast.analyze(adapter, base=base)
    (module,) = found.modules.values()
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")[f"{PATHS[0]}.weight"].float64()
    change = merged - weight
    assert module.frobenius_norm == pytest.approx(np.linalg.norm(change), rel=1e-5)
    largest = np.linalg.norm(change, 2)
    assert 0.97 * largest < module.spectral_norm < 1.0001 * largest
    assert module.singular_values == []
    assert np.isnan(module.effective_rank)
    (reason,) = [each.reason for each in found.findings if each.kind == "unmeasured"]
    assert "norms alone" in reason
    assert found.to_html()


def test_pieces_of_a_weight_count_as_one(tmp_path: Path) -> None:
    weights = toys.flux()
    base = toys.pipeline(tmp_path / "base", transformer=weights)
    module = "double_blocks.0.img_attn.qkv"
    width = len(weights["transformer_blocks.0.attn.to_q.weight"])
    adapter = adapter_of(
        tmp_path / "x.safetensors", {module: parts_of("ia3", module, 3 * width, width)}
    )
    (found,) = lorafast.analyze(adapter, base=base).modules.values()
    merged = toys.merge(base, adapter, tmp_path / "out")
    names = [f"transformer_blocks.0.attn.to_{letter}.weight" for letter in "qkv"]
    before = np.concatenate([weights[name] for name in names])
    after = np.concatenate([merged[f"transformer.{name}"] for name in names])
    assert found.shape == before.shape
    assert found.frobenius_norm == pytest.approx(np.linalg.norm(after - before), rel=1e-5)
    assert found.base_norm == pytest.approx(np.linalg.norm(before), rel=1e-6)


def test_without_what_fits_there_is_a_note(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {"other": np.ones(SHAPE)})
    adapter = adapter_of(tmp_path / "x.safetensors", {PATHS[0]: parts_of("ia3", PATHS[0])})
    found = lorafast.analyze(adapter, base=base)
    assert len(found.modules) == 0
    (reason,) = [each.reason for each in found.findings if each.kind == "unmeasured"]
    assert "cannot be merged into this base" in reason
    assert "fits no tensor" in reason


def dora_with_one_idle(
    weights: Mapping[str, Array], magnitude: float
) -> dict[str, dict[str, Array]]:
    """DoRA of outputs, where B of the first module is next to nothing, and its magnitudes are the
    norms of the weight's rows times this."""
    modules = {}
    for path in PATHS:
        norms = np.linalg.norm(weights[path], axis=1, keepdims=True)
        parts = parts_of("dora", path)
        modules[path] = parts | {"dora_scale": 1.2 * norms}
    first = modules[PATHS[0]]
    norms = np.linalg.norm(weights[PATHS[0]], axis=1, keepdims=True)
    modules[PATHS[0]] = first | {
        "lora_up.weight": 1e-7 * first["lora_up.weight"],
        "dora_scale": magnitude * norms,
    }
    return modules


@pytest.mark.parametrize(("magnitude", "is_dead"), [(1.3, False), (1.0, True)])
def test_a_module_of_dora_is_dead_only_if_its_weight_stays(
    magnitude: float, is_dead: bool, tmp_path: Path
) -> None:
    weights = weights_of()
    base = base_of(tmp_path / "base", weights)
    adapter = adapter_of(tmp_path / "x.safetensors", dora_with_one_idle(weights, magnitude))
    with_base = lorafast.analyze(adapter, base=base)
    dead = [each.module for each in with_base.findings if each.kind == "dead_module"]
    assert dead == ([KEYS[0]] if is_dead else [])
    # Without a base nothing tells.
    alone = lorafast.analyze(adapter)
    assert not any(each.kind == "dead_module" for each in alone.findings)
    fleet = lorafast.scan(tmp_path / "x.safetensors")
    assert "dead_module" not in set(fleet.findings.table["kind"])


def test_a_plain_module_is_dead_beside_those_of_dora(tmp_path: Path) -> None:
    weights = weights_of()
    modules = {path: parts_of("dora", path) for path in PATHS}
    for path in PATHS:
        del modules[path]["dora_scale"]
    modules[PATHS[0]]["lora_up.weight"] *= 1e-7
    adapter = adapter_of(tmp_path / "x.safetensors", modules)
    for base in (None, base_of(tmp_path / "base", weights)):
        found = lorafast.analyze(adapter, base=base).findings
        assert [each.module for each in found if each.kind == "dead_module"] == [KEYS[0]]
    table = lorafast.scan(tmp_path / "x.safetensors").findings.table
    assert "dead_module" in set(table["kind"])
