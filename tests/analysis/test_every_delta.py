"""What merges is measured: its figures are those of what a merge adds, and nothing is broken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.analysis import Array, spectrum_figures
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import adapter_config, make_adapter, make_base
from support.reference import PREFIX

R = 4


def normal(seed: int, *shape: int) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(scale=0.1, size=shape), "F64")


def pair(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(1, *a),
        f"{PREFIX}{module}.lora_B.weight": normal(2, *b),
    }


@dataclass
class Kind:
    """A kind of delta.

    Attributes:
        tensors: those of the adapter.
        weights: the shapes of the base's tensors.
        settings: of the adapter's config.
        others: what the adapter changes beside its products, so that figures are of these alone.
        stacked: the number of matrices that a weight is a stack of.
    """

    tensors: Mapping[str, Tensor]
    weights: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    others: bool = False
    stacked: int = 1


KINDS = {
    "linear": Kind(pair("layers.0.q", (R, 12), (20, R)), {"layers.0.q.weight": (20, 12)}),
    "rsLoRA": Kind(
        pair("layers.0.q", (R, 12), (20, R)),
        {"layers.0.q.weight": (20, 12)},
        {"use_rslora": True},
    ),
    "Conv1D": Kind(
        pair("layers.0.q", (R, 12), (20, R)),
        {"layers.0.q.weight": (12, 20)},
        {"fan_in_fan_out": True},
    ),
    "convolution": Kind(
        pair("layers.0.conv", (R, 6, 3, 3), (20, R, 1, 1)), {"layers.0.conv.weight": (20, 6, 3, 3)}
    ),
    "embedding": Kind(
        {
            f"{PREFIX}embed.lora_embedding_A": normal(1, R, 30),
            f"{PREFIX}embed.lora_embedding_B": normal(2, 12, R),
        },
        {"embed.weight": (30, 12)},
    ),
    "parts of a fused layer": Kind(
        pair("layers.0.qkv", (2 * R, 12), (2 * 10, R, 1)),
        {"layers.0.qkv.weight": (3 * 10, 12)},
        {"enable_lora": [True, False, True], "merge_weights": False},
    ),
    "one group of a fused layer": Kind(
        pair("layers.0.qkv", (R, 12), (10, R, 1)),
        {"layers.0.qkv.weight": (3 * 10, 12)},
        {"enable_lora": [False, True, False], "merge_weights": False},
    ),
    "block-diagonal A": Kind(
        pair("layers.0.q", (R, 6), (20, R)),
        {"layers.0.q.weight": (20, 12)},
        {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": [], "nblocks": 2}},
    ),
    "block-diagonal B": Kind(
        pair("layers.0.q", (R, 12), (20, R // 2)),
        {"layers.0.q.weight": (20, 12)},
        {"use_bdlora": {"target_modules_bd_a": [], "target_modules_bd_b": ["q"], "nblocks": 2}},
    ),
    "experts": Kind(
        pair("layers.0.mlp.experts", (3 * R, 12), (20, 3 * R)),
        {"layers.0.mlp.experts.down_proj": (3, 20, 12)},
        {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.20.0"},
        stacked=3,
    ),
    "transposed experts": Kind(
        pair("layers.0.mlp.experts", (3 * R, 20), (12, 3 * R)),
        {"layers.0.mlp.experts.down_proj": (3, 20, 12)},
        {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.18.0"},
        stacked=3,
    ),
    "a parameter": Kind(
        pair("layers.0.router", (R, 12), (20, R)),
        {"layers.0.router.table": (20, 12)},
        {"target_parameters": ["router.table"]},
    ),
    "an attention's output, added twice": Kind(
        pair("layers.0.attn.base_layer.out_proj", (R, 12), (12, R)),
        {
            "layers.0.attn.out_proj.weight": (12, 12),
            "layers.0.attn.in_proj_weight": (36, 12),
        },
    ),
    "a bias": Kind(
        pair("layers.0.q", (R, 12), (20, R))
        | {f"{PREFIX}layers.0.q.lora_B.bias": normal(3, 20)},
        {"layers.0.q.weight": (20, 12), "layers.0.q.bias": (20,)},
        {"lora_bias": True},
    ),
    "DoRA": Kind(
        pair("layers.0.q", (R, 12), (20, R))
        | {f"{PREFIX}layers.0.q.lora_magnitude_vector": normal(3, 20)},
        {"layers.0.q.weight": (20, 12)},
        {"use_dora": True},
        others=True,
    ),
}  # fmt: skip
#: What says that an adapter should not be used.
BROKEN = {"critical", "warning"}


def make(folder: Path, kind: Kind) -> tuple[Path, Path]:
    base = make_base(
        folder / "base",
        modules={},
        dtype="F64",
        others={name: normal(9, *shape) for name, shape in kind.weights.items()},
    )
    config = adapter_config(r=R, lora_alpha=6, **kind.settings)
    return base, make_adapter(folder / "adapter", kind.tensors, config=config)


def added(base: Path, merged: Path, kind: Kind) -> list[Array]:
    """What a merge added: the matrices of the weights that changed."""
    before, after = read_checkpoint(base), read_checkpoint(merged)
    matrices = []
    for name, shape in kind.weights.items():
        change = after[name].float64() - before[name].float64()
        if change.any() and not name.endswith(".bias"):
            height = shape[1] if kind.stacked > 1 else shape[0]
            matrices += list(change.reshape(kind.stacked, height, -1))
    return matrices


@pytest.mark.parametrize("name", KINDS)
def test_figures_are_those_of_what_a_merge_adds(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    base, adapter = make(tmp_path, kind)
    lorafast.merge(base, adapter, tmp_path / "out")
    analysis = lorafast.analyze(adapter, entries=True)
    assert not [f for f in analysis.findings if f.severity in BROKEN]
    assert "unmeasured" not in {f.kind for f in analysis.findings}
    fleet = lorafast.scan(adapter)
    assert not set(fleet.findings.table["severity"].tolist()) & BROKEN
    assert fleet.adapters["rank"].tolist() != [-1]
    assert np.isfinite(fleet.adapters["frobenius_norm"]).all()
    assert fleet.modules["module"].tolist() == list(analysis.modules)
    for figure in ("frobenius_norm", "effective_rank", "stable_rank", "scaling", "rank"):
        own = [getattr(module, figure) for module in analysis.modules.values()]
        assert fleet.modules[figure].tolist() == own, figure
    if kind.others:
        return
    matrices = added(base, tmp_path / "out", kind)
    assert len(matrices) == len(analysis.modules) > 0
    for matrix, module in zip(matrices, analysis.modules.values(), strict=True):
        values = np.linalg.svd(matrix, compute_uv=False)[: len(module.singular_values)]
        np.testing.assert_allclose(module.singular_values, values, rtol=1e-9)
        figures = spectrum_figures(values)
        for figure in ("frobenius_norm", "spectral_norm", "stable_rank", "effective_rank", "k90"):
            assert getattr(module, figure) == pytest.approx(figures[figure], rel=1e-9), figure
        assert module.entries is not None
        assert module.entries.max_abs == pytest.approx(np.abs(matrix).max(), rel=1e-6)
        assert sorted(module.shape) == sorted(matrix.shape)
    # And with the base beside it, of which some is in another form than the module's.
    beside = lorafast.analyze(adapter, base=base)
    before = read_checkpoint(base)
    for module in beside.modules.values():
        if module.base_norm is not None:
            assert module.base_tensor is not None
            weight = before[module.base_tensor].float64()
            assert module.base_norm == pytest.approx(np.linalg.norm(weight), rel=1e-12)
    assert (kind.stacked == 1 and name != "a parameter") == all(
        module.base_norm is not None for module in beside.modules.values()
    )


def test_kasas_diagonal_is_a_part_of_the_product(tmp_path: Path) -> None:
    factors = pair("layers.0.q", (R, 12), (20, R))
    diagonal = normal(3, R)
    tensors = factors | {f"{PREFIX}layers.0.q.lora_diag": diagonal}
    config = adapter_config(r=R, lora_alpha=6, kasa_config={"beta": 0.1})
    analysis = lorafast.analyze(make_adapter(tmp_path / "adapter", tensors, config=config))
    a, b = (factor.float64() for factor in factors.values())
    values = np.linalg.svd(6 / R * (b * diagonal.float64()) @ a, compute_uv=False)[:R]
    (module,) = analysis.modules.values()
    np.testing.assert_allclose(module.singular_values, values, rtol=1e-9)
    assert not [f for f in analysis.findings if f.severity in BROKEN]


def test_comparisons_are_of_the_same_products(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        _, one = make(tmp_path / name.replace(" ", "_"), kind)
        comparison = lorafast.compare([one, one])
        assert comparison.cosine[0, 1] == pytest.approx(1.0, abs=1e-12), name
        assert len(comparison.modules) == len(lorafast.analyze(one).modules), name


def test_a_large_file_is_measured_alike(tmp_path: Path) -> None:
    """Modules of files beyond 8 MiB are units of their own."""
    kind = KINDS["experts"]
    _, small = make(tmp_path / "small", kind)
    big = dict(kind.tensors) | {f"{PREFIX}head.weight": normal(4, 1100, 1000)}
    config = adapter_config(r=R, lora_alpha=6, modules_to_save=["head"], **kind.settings)
    large = make_adapter(tmp_path / "large", big, config=config)
    one, other = lorafast.scan(small), lorafast.scan(large)
    for column in ("frobenius_norm", "a_mean", "b_std", "effective_rank", "spectral_norm"):
        assert one.modules[column].tolist() == other.modules[column].tolist(), column


def test_a_quantized_base_is_no_obstacle(tmp_path: Path) -> None:
    kind = KINDS["linear"]
    _, adapter = make(tmp_path, kind)
    base = tmp_path / "integers"
    base.mkdir()
    weights = {"layers.0.q.weight": Tensor("I8", (20, 12), bytes(240))}
    write_safetensors(base / "model.safetensors", weights)
    analysis = lorafast.analyze(adapter, base=base)
    (module,) = analysis.modules.values()
    assert (module.base_norm, module.relative_norm) == (None, None)
    assert module.frobenius_norm > 0
    assert any("no norm of a base's weight" in finding.reason for finding in analysis.findings)


def test_bloom_in_pefts_first_layout(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (adapter,) = (real_data / "adapters").glob("bloom_legacy*")
    assert not [f for f in lorafast.analyze(adapter).findings if f.severity in BROKEN]
    fleet = lorafast.scan(adapter)
    assert not len(fleet.findings.table["kind"])
    assert fleet.adapters["rank"].tolist() == [16]
