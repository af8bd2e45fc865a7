"""What counts beside the algorithms' formulas: scales, magnitudes, analyses, sequences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.algorithms import (
    ALGORITHMS,
    DORA,
    KEY,
    LAYERS,
    MODULE,
    WITH_MAGNITUDES,
    Array,
    based,
    close,
    flat,
    full,
    generator,
    loha,
    lokr,
    low_rank,
    made,
    new_weight,
    ones,
    wide,
)
from support.files import Tensor, read_checkpoint, tensor, write_safetensors


def merge_parts(
    tmp_path: Path,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    dtype: str = "F32",
    **options: Any,
) -> tuple[Tensor, Array, Path]:
    base, weight = based(tmp_path / "base", shape, dtype)
    file = write_safetensors(
        tmp_path / "style.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    lorafast.merge(base, file, tmp_path / "out", **options)
    assert lorafast.verify(base, file, tmp_path / "out", **options).ok
    return read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"], weight, file


SHAPES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, algorithm in ALGORITHMS.items()
    for kind in algorithm.kinds
    if kind in {"square", "tall"} and name != "whole"
]


@pytest.mark.parametrize(("name", "kind"), SHAPES)
def test_matrices_that_are_square_or_narrower_than_a_rank(
    name: str, kind: str, tmp_path: Path
) -> None:
    tensors, parts = made(name, kind, "F32")
    merged, weight, _ = merge_parts(tmp_path, LAYERS[kind], tensors)
    close(merged, new_weight(name, parts, weight), weight)


@pytest.mark.parametrize("name", WITH_MAGNITUDES)
@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["linear", "square", "conv 3x3"])
def test_magnitudes_rescale_the_sum_on_their_axis(
    name: str, axis: str, kind: str, tmp_path: Path
) -> None:
    if kind not in ALGORITHMS[name].kinds:
        pytest.skip("a core is a convolution's")
    shape = LAYERS[kind]
    tensors, parts = made(name, kind, "F32")
    count = shape[0] if axis == "outputs" else shape[1]
    magnitude = 1 + generator(name, axis).uniform(size=count)
    lies = (count, 1, *ones(shape)) if axis == "outputs" else (1, count, *ones(shape))
    tensors["dora_scale"] = tensor(magnitude.reshape(lies))
    parts["dora_scale"] = tensors["dora_scale"].float64()
    merged, weight, file = merge_parts(tmp_path, shape, tensors)
    expected = new_weight(name, parts, weight)
    close(merged, expected, weight)
    # A part of it is a part of the whole change.
    lorafast.merge(tmp_path / "base", file, tmp_path / "half", strategy="weighted", weights=[0.5])
    half = read_checkpoint(tmp_path / "half")[f"{MODULE}.weight"]
    close(half, weight + 0.5 * (expected - weight), weight)
    features = lorafast.analyze(file).summary["features"]
    assert any("magnitude" in feature for feature in features)
    with pytest.raises(lorafast.LorafastError, match="neither the merged model nor the adapter"):
        lorafast.subtract(tmp_path / "out", file, tmp_path / "back")


def test_a_vector_of_magnitudes_is_the_outputs(tmp_path: Path) -> None:
    tensors, parts = made("lora", "square", "F32")
    tensors["dora_scale"] = tensor(1 + generator("vector").uniform(size=20))
    parts["dora_scale"] = tensors["dora_scale"].float64()
    merged, weight, _ = merge_parts(tmp_path, LAYERS["square"], tensors)
    close(
        merged,
        new_weight("lora", parts | {"dora_scale": parts["dora_scale"][:, None]}, weight),
        weight,
    )


def test_norms_and_biases_are_added_unscaled(tmp_path: Path) -> None:
    random = generator("norms")
    base, weight = based(tmp_path / "base", (24, 20), "F32", bias=True)
    tensors, parts = made("lora", "linear", "F32")
    file = {f"{KEY}.{part}": value for part, value in tensors.items()}
    file[f"{KEY}.diff_b"] = tensor(random.normal(size=24))
    file["lora_te_model_norm.w_norm"] = tensor(random.normal(size=20))
    adapter = write_safetensors(tmp_path / "x.safetensors", file)
    lorafast.merge(base, adapter, tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    close(after[f"{MODULE}.weight"], new_weight("lora", parts, weight), weight)
    for name, part in {
        f"{MODULE}.bias": f"{KEY}.diff_b",
        "model.norm.weight": "lora_te_model_norm.w_norm",
    }.items():
        start = before[name].float64()
        close(after[name], start + file[part].float64(), start)
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    lorafast.subtract(tmp_path / "out", adapter, tmp_path / "back")
    back = read_checkpoint(tmp_path / "back")
    for name, value in before.items():
        assert np.allclose(back[name].float64(), value.float64(), atol=1e-5)
    kinds = {module.kind for module in lorafast.analyze(adapter).modules.values()}
    assert kinds == {"linear", "norm", "bias"}


def test_an_explicit_scale_counts_more_than_an_alpha(tmp_path: Path) -> None:
    tensors, parts = made("lora", "linear", "F32")
    tensors["scale"] = tensor(np.array(0.25))
    merged, weight, file = merge_parts(tmp_path, (24, 20), tensors)
    close(merged, weight + low_rank(parts, weight, 0.25), weight)
    uses = {
        one["name"]: one["use"] for one in lorafast.inspect(file)["adapter"]["coverage"]["tensors"]
    }
    assert uses[f"{KEY}.alpha"] == "not_needed"


@pytest.mark.parametrize("dtype", ["I64", "F16", "BF16"])
def test_an_alpha_is_of_whatever_type(dtype: str, tmp_path: Path) -> None:
    tensors, parts = made("lora", "linear", "F32")
    tensors["alpha"] = tensor(np.array([2]), dtype)
    merged, weight, file = merge_parts(tmp_path, (24, 20), tensors)
    close(merged, weight + low_rank(parts, weight, 0.5), weight)
    lorafast.analyze(file)
    lorafast.scan(file)


def test_products_of_half_precision_factors_do_not_overflow(tmp_path: Path) -> None:
    random = generator("overflow")
    big = {
        "hada_w1_a": random.uniform(-6e4, 6e4, size=(24, 2)),
        "hada_w1_b": random.normal(size=(2, 20)),
        "hada_w2_a": random.uniform(-6e4, 6e4, size=(24, 2)),
        "hada_w2_b": random.normal(size=(2, 20)) * 1e-6,
    }
    tensors = {part: tensor(value, "F16") for part, value in big.items()}
    parts = {part: value.float64() for part, value in tensors.items()}
    merged, weight, _ = merge_parts(tmp_path, (24, 20), tensors)
    close(merged, weight + loha(parts, weight, 1.0), weight)


PRODUCTS = [
    name
    for name, algorithm in ALGORITHMS.items()
    if algorithm.formula in {low_rank, loha, lokr, full} and not name.startswith("dora")
]


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_analysis_measures_the_update_itself(name: str, tmp_path: Path) -> None:
    kind = ALGORITHMS[name].kinds[-1]
    shape = LAYERS[kind]
    tensors, parts = made(name, kind, "F32")
    file = write_safetensors(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    zero = np.zeros(shape)
    delta = flat(new_weight(name, parts, zero))
    module = next(iter(lorafast.analyze(file).modules.values()))
    sigma = np.linalg.svd(delta, compute_uv=False)
    assert module.frobenius_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    found = np.array(module.singular_values)[: len(sigma)]
    assert np.allclose(found, sigma[: len(found)], atol=1e-6 * sigma[0])
    assert module.shape == (shape[0], wide(shape))
    if ("lokr_w1" not in tensors or "lokr_w2" not in tensors) and name != "full":
        assert module.rank == ALGORITHMS[name].rank
    fleet = lorafast.scan(tmp_path)
    assert len(fleet) == 1
    # The same update as one plain product: the same update.
    left, sizes, right = np.linalg.svd(delta, full_matrices=False)
    plain = {
        f"{KEY}.lora_down.weight": tensor(right.reshape(-1, *shape[1:])),
        f"{KEY}.lora_up.weight": tensor((left * sizes).reshape(shape[0], -1, *ones(shape))),
    }
    other = write_safetensors(tmp_path / "y.safetensors", plain)
    similarity = lorafast.similarity([file, other])
    assert similarity.matrix[0][1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["glora", "ia3, inputs", "oft", "boft"])
def test_what_needs_the_base_is_blank_without_it(name: str, tmp_path: Path) -> None:
    tensors, _ = made(name, "linear", "F32")
    file = write_safetensors(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    plain, _ = made("lora", "linear", "F32")
    other = write_safetensors(
        tmp_path / "y.safetensors", {f"{KEY}.{part}": value for part, value in plain.items()}
    )
    analysis = lorafast.analyze(file)
    assert len(analysis.modules) == 0
    assert any("base's whole weight" in feature for feature in analysis.summary["features"])
    lorafast.compare([file, other])
    assert len(lorafast.scan(tmp_path)) == 2
    base, _ = based(tmp_path / "base", (24, 20), "F32")
    with pytest.raises(lorafast.LorafastError, match="whole of the base's weight"):
        lorafast.subtract(base, file, tmp_path / "back")


def test_in_sequence_each_is_made_of_what_the_one_before_left(tmp_path: Path) -> None:
    base, weight = based(tmp_path / "base", (24, 20), "F32")
    files, expected = [], weight
    for name in ("glora", "lora", "oft"):
        tensors, parts = made(name, "linear", "F32")
        files.append(
            write_safetensors(
                tmp_path / f"{name}.safetensors",
                {f"{KEY}.{part}": value for part, value in tensors.items()},
            )
        )
        expected = new_weight(name, parts, expected)
    lorafast.merge(base, files, tmp_path / "out")
    close(read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"], expected, weight)
    assert lorafast.verify(base, files, tmp_path / "out").ok
    pytest.importorskip("torch")
    lorafast.merge(base, files, tmp_path / "torch", device="torch:cpu")
    assert read_checkpoint(tmp_path / "torch") == read_checkpoint(tmp_path / "out")
    weighted = weight.copy()
    for name, share in zip(("glora", "lora", "oft"), (0.5, 0.25, 2.0), strict=True):
        _, parts = made(name, "linear", "F32")
        weighted += share * (new_weight(name, parts, weight) - weight)
    options: dict[str, Any] = {"strategy": "weighted", "weights": [0.5, 0.25, 2.0]}
    lorafast.merge(base, files, tmp_path / "weighted", **options)
    close(read_checkpoint(tmp_path / "weighted")[f"{MODULE}.weight"], weighted, weight)
    assert lorafast.verify(base, files, tmp_path / "weighted", **options).ok


@pytest.mark.parametrize("name", ["loha", "lokr, both whole", "glora", "ia3, inputs", "oft", DORA])
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_torch_and_loaded_modules_take_the_same(name: str, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import lorafast.torch

    algorithm = "lora" if name == DORA else name
    shape = LAYERS[kind]
    tensors, parts = made(algorithm, kind, "F32")
    if name == DORA:
        tensors["dora_scale"] = tensor(1 + generator("torch").uniform(size=(1, 20, *ones(shape))))
        parts["dora_scale"] = tensors["dora_scale"].float64()
    base, weight = based(tmp_path / "base", shape, "F32")
    file = write_safetensors(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in tensors.items()}
    )
    expected = new_weight(algorithm, parts, weight)
    lorafast.merge(base, file, tmp_path / "out", device="torch:cpu")
    close(read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"], expected, weight)
    layer = torch.nn.Linear(20, 24, bias=False) if kind == "linear" else torch.nn.Conv2d(20, 24, 3)
    layer.weight.data.copy_(torch.tensor(weight))
    block = torch.nn.Module()
    block.layer = layer
    net = torch.nn.Module()
    net.down_blocks = torch.nn.ModuleList([block])
    lorafast.torch.merge_into(net, file)
    close(tensor(layer.weight.detach().double().numpy()), expected, weight)


def test_early_glora_has_its_pairs_the_other_way_round(tmp_path: Path) -> None:
    tensors, parts = made("glora", "linear", "F32")
    swapped = {f"{a}{b}.weight": tensors[f"{a}{c}.weight"] for a in "ab" for b, c in ("12", "21")}
    swapped["alpha"] = tensors["alpha"]
    merged, weight, _ = merge_parts(tmp_path, (24, 20), swapped)
    close(merged, new_weight("glora", parts, weight), weight)


def test_packed_embeddings_are_left_out_by_name_alone(tmp_path: Path) -> None:
    base, weight = based(tmp_path / "base", (24, 20), "F32")
    tensors, parts = made("lora", "linear", "F32")
    file = {f"{KEY}.{part}": value for part, value in tensors.items()}
    file["bundle_emb.style.string_to_param.*"] = tensor(np.ones((2, 20)))
    adapter = write_safetensors(tmp_path / "x.safetensors", file)
    with pytest.raises(lorafast.LorafastError, match="embeddings of a textual inversion"):
        lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.merge(base, adapter, tmp_path / "out", allow=["bundle_emb"])
    merged = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"]
    close(merged, new_weight("lora", parts, weight), weight)
