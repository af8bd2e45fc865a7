"""Statistics against NumPy, spectra against SciPy, on made and on real adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import scipy.linalg
from lorafast._report.serialize import from_plain
from support.analysis import (
    graded_factors,
    numpy_statistics,
    random_factors,
    spectrum_figures,
    write_factors,
)
from support.files import Tensor, read_safetensors, tensor, widen
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base

PERCENTILES = [0.1, 1, 5, 25, 50, 75, 95, 99, 99.9]
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}


def float64(stored: Tensor) -> Any:
    if stored.dtype in INTEGERS:
        return np.frombuffer(stored.data, INTEGERS[stored.dtype]).astype(np.float64)
    return widen(stored.dtype, stored.data)


def check_statistics(found: lorafast.TensorStatistics, values: Any, bins: int) -> None:
    finite = values[np.isfinite(values)]
    assert found.count == values.size
    assert found.non_finite == values.size - finite.size
    if not finite.size:
        assert math.isnan(found.mean)
        return
    expected = numpy_statistics(finite, bins)
    for name in ("min", "max", "max_norm", "zeros"):
        assert getattr(found, name) == expected[name], name
    assert found.zero_share == expected["zeros"] / finite.size
    for name in ("std", "l1_norm", "l2_norm"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-12), name
    # A mean near zero, and moments made of it, are known to the rounding of their terms.
    scale = expected["l1_norm"] / finite.size
    assert abs(found.mean - math.fsum(finite.tolist()) / finite.size) <= 1e-14 * scale
    for name in ("skewness", "kurtosis"):
        assert getattr(found, name) == pytest.approx(
            expected[name], rel=1e-12, abs=1e-12, nan_ok=True
        ), name
    assert list(found.percentiles) == PERCENTILES
    assert list(found.percentiles.values()) == np.percentile(finite, PERCENTILES).tolist()
    counts, edges = expected["histogram"]
    assert found.histogram.edges == edges.tolist()
    assert found.histogram.counts == counts.tolist()
    counts, edges = expected["log_histogram"]
    # To the last bit of the two logarithms, also where an edge lies beside zero.
    last_bits = 1e-14 * np.abs(edges).max()
    np.testing.assert_allclose(found.log_histogram.edges, edges, rtol=1e-14, atol=last_bits)
    # Two logarithms may differ in their last bit, and with it the bin of a value on an edge.
    logarithms = np.sort(np.log10(np.abs(finite) + 1e-8))
    below = np.cumsum(found.log_histogram.counts)
    assert below[-1] == finite.size
    near = 1e-14 * np.abs(edges[1:-1])
    assert np.all(below[:-1] >= np.searchsorted(logarithms, edges[1:-1] - near))
    assert np.all(below[:-1] <= np.searchsorted(logarithms, edges[1:-1] + near))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_statistics_are_numpys(tmp_path: Path, dtype: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(dtype=dtype))
    analysis = lorafast.analyze(adapter, histogram_bins=37)
    stored = read_safetensors(adapter / "adapter_model.safetensors")
    assert list(analysis.tensors) == list(stored)
    for name, found in analysis.tensors.items():
        assert (found.dtype, found.shape) == (dtype, stored[name].shape)
        check_statistics(found, float64(stored[name]), 37)
    together = np.concatenate([float64(value) for value in stored.values()])
    check_statistics(analysis.weights, together, 37)


@pytest.mark.parametrize("dtype", ["I64", "I32", "I16", "I8", "U8", "BOOL"])
def test_statistics_of_saved_integers(tmp_path: Path, dtype: str) -> None:
    values = np.arange(-40, 61) if dtype[0] == "I" else np.arange(101) % 2
    name = "base_model.model.counter"
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | {name: tensor(values, dtype)})
    analysis = lorafast.analyze(adapter)
    check_statistics(analysis.tensors[name], values.astype(np.float64), 50)
    assert analysis.tensors[name].shape == (101,)


def test_nan_and_infinity_are_counted_and_left_out(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    b, a = random.normal(size=(30, 4)), random.normal(size=(4, 20))
    b[3, 1], b[7, 2], a[0, 5] = np.nan, np.inf, -np.inf
    clean = random_factors({"layers.1.q": (30, 20, 4)})
    path = write_factors(tmp_path / "adapter", {"layers.0.q": (b, a)} | clean)
    analysis = lorafast.analyze(path, entries=True)
    record = analysis.modules["layers.0.q"]
    check_statistics(analysis.tensors[record.b_name], b.ravel(), 50)
    check_statistics(analysis.tensors[record.a_name], a.ravel(), 50)
    assert math.isnan(record.frobenius_norm)
    assert all(map(math.isnan, record.singular_values))
    assert record.k99 == 0
    assert math.isfinite(analysis.modules["layers.1.q"].frobenius_norm)
    assert math.isfinite(analysis.weights.mean)
    kinds = [(f.severity, f.kind, f.module, f.value) for f in analysis.findings[:2]]
    assert sorted(kinds) == sorted(
        [
            ("critical", "non_finite", record.b_name, 2.0),
            ("critical", "non_finite", record.a_name, 1.0),
        ]
    )
    parsed = json.loads(analysis.to_json(), parse_constant=pytest.fail)
    assert parsed["modules"]["layers.0.q"]["frobenius_norm"] is None


@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_spectra_are_those_of_the_dense_product(tmp_path: Path, rank: int, smallest: float) -> None:
    sigma = np.geomspace(3.0, 3.0 * smallest, rank)
    b, a = graded_factors(210, 150, sigma)
    b, a = b.astype(np.float32).astype(np.float64), a.astype(np.float32).astype(np.float64)
    path = write_factors(tmp_path / "adapter", {"layers.0.q": (b, a)}, dtype="F32", alpha=0.7)
    scale = 0.7 / rank
    record = lorafast.analyze(path).modules["layers.0.q"]
    expected = scipy.linalg.svdvals(scale * (b @ a))[:rank]
    np.testing.assert_allclose(record.singular_values, expected, rtol=1e-6)
    assert record.scaling == scale
    for name, value in spectrum_figures(expected).items():
        assert getattr(record, name) == pytest.approx(value, rel=1e-6), name
    assert record.entry_mean == pytest.approx(np.mean(scale * (b @ a)), rel=1e-9, abs=1e-15)
    assert record.numerical_rank == rank


def test_scale_follows_alpha_rank_and_rslora(tmp_path: Path) -> None:
    factors = random_factors({"layers.0.q": (20, 12, 4)})
    plain = write_factors(tmp_path / "plain", factors, alpha=6.0)
    stabilised = write_factors(tmp_path / "rs", factors, alpha=6.0, use_rslora=True)
    first, second = (lorafast.analyze(path).modules["layers.0.q"] for path in (plain, stabilised))
    assert (first.alpha, first.rank, first.scaling) == (6.0, 4, 1.5)
    assert second.scaling == 3.0
    assert second.frobenius_norm == pytest.approx(2 * first.frobenius_norm, rel=1e-13)


def test_convolutions_and_embeddings_are_modules(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    a, b = random.normal(size=(4, 3, 3, 3)), random.normal(size=(10, 4, 1, 1))
    tokens, into = random.normal(size=(4, 31)), random.normal(size=(10, 4))
    prefix = "base_model.model."
    path = make_adapter(
        tmp_path / "adapter",
        {
            f"{prefix}conv.lora_A.weight": tensor(a, "F64"),
            f"{prefix}conv.lora_B.weight": tensor(b, "F64"),
            f"{prefix}embed.lora_embedding_A": tensor(tokens, "F64"),
            f"{prefix}embed.lora_embedding_B": tensor(into, "F64"),
        },
    )
    modules = lorafast.analyze(path).modules
    kinds = {name: (module.kind, module.shape) for name, module in modules.items()}
    assert kinds == {"conv": ("convolution", (10, 27)), "embed": ("embedding", (10, 31))}
    for name, dense in (
        ("conv", 2 * b.reshape(10, 4) @ a.reshape(4, 27)),
        ("embed", 2 * into @ tokens),
    ):
        expected = scipy.linalg.svdvals(dense)[:4]
        np.testing.assert_allclose(modules[name].singular_values, expected, rtol=1e-12)


def test_more_than_products_is_analysed_and_named(tmp_path: Path) -> None:
    others = {
        f"base_model.model.{path}.lora_magnitude_vector": tensor(1.0 + np.arange(shape[0]))
        for path, shape in MODULES.items()
    }
    others["base_model.model.lm_head.weight"] = tensor(np.ones((7, 5)))
    rows = "base_model.model.embed.token_adapter.trainable_tokens_delta"
    others[rows] = tensor(np.ones((2, 5)))
    adapter = make_adapter(
        tmp_path / "adapter",
        adapter_tensors() | others,
        use_dora=True,
        modules_to_save=["lm_head"],
        trainable_token_indices=[3, 1],
    )
    analysis = lorafast.analyze(adapter)
    assert set(others) < set(analysis.tensors)
    assert set(analysis.modules) == set(MODULES)
    reasons = " ".join(f.reason for f in analysis.findings if f.kind == "feature")
    assert "DoRA" in reasons
    assert "lm_head" in reasons
    assert "rows of embeddings" in reasons


def test_entries_are_those_of_the_product(tmp_path: Path) -> None:
    ((b, a),) = random_factors({"q": (150, 90, 6)}, seed=8).values()
    b, a = b.astype(np.float32).astype(np.float64), a.astype(np.float32).astype(np.float64)
    path = write_factors(tmp_path / "adapter", {"layers.0.q": (b, a)}, dtype="F32")
    record = lorafast.analyze(path, entries=True, histogram_bins=20).modules["layers.0.q"]
    found = record.entries
    assert found is not None
    dense = b @ a
    assert found.count == dense.size
    assert found.max_abs == pytest.approx(np.abs(dense).max(), rel=1e-6)
    assert found.min == pytest.approx(dense.min(), rel=1e-6)
    typical = np.sqrt(np.mean(dense**2))
    assert found.threshold == pytest.approx(0.01 * typical, rel=1e-6)
    assert found.below_share == pytest.approx(np.mean(np.abs(dense) < 0.01 * typical), abs=1e-3)
    counts = np.histogram(dense, found.histogram.edges)[0]
    # float32 entries may fall on the other side of an edge.
    assert np.abs(counts - found.histogram.counts).sum() <= 4
    assert sum(found.histogram.counts) == dense.size
    assert lorafast.analyze(path).modules["layers.0.q"].entries is None


def test_norms_relative_to_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    adapter = make_adapter(tmp_path / "adapter")
    weights: dict[str, Any] = {}
    for file in base.glob("*.safetensors"):
        weights |= read_safetensors(file)
    for path, record in lorafast.analyze(adapter, base=base).modules.items():
        assert record.base_tensor == f"{path}.weight"
        norm = np.linalg.norm(weights[record.base_tensor].float64())
        assert record.base_norm == pytest.approx(norm, rel=1e-12)
        assert record.relative_norm == pytest.approx(record.frobenius_norm / norm, rel=1e-12)
    assert lorafast.analyze(adapter).modules[path].relative_norm is None


def test_a_base_of_another_model_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules={"model.layers.0.self_attn.q_proj": (24, 20)})
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(lorafast.PlanError, match=r"mlp\.up_proj"):
        lorafast.analyze(adapter, base=base)


@pytest.mark.parametrize("bins", [0, -1, 70_000])
def test_bins_outside_their_domain(tmp_path: Path, bins: int) -> None:
    with pytest.raises(ValueError, match="histogram_bins"):
        lorafast.analyze(make_adapter(tmp_path / "adapter"), histogram_bins=bins)


def test_threads_outside_their_domain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads"):
        lorafast.analyze(make_adapter(tmp_path / "adapter"), threads=0)


def test_no_adapter_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        lorafast.analyze(tmp_path / "absent")
    assert "absent" in str(raised.value)


def test_a_pickled_adapter_gives_the_same_figures(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    adapter = make_adapter(tmp_path / "adapter")
    expected = lorafast.analyze(adapter)
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    found = lorafast.analyze(adapter)
    assert found.modules == expected.modules
    assert found.tensors == expected.tensors


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.analyze(adapter, progress=lambda done, total: calls.append((done, total)))
    assert calls
    assert calls[-1][0] == calls[-1][1] > 0


def test_blocks_and_layers_are_told_from_the_path(tmp_path: Path) -> None:
    paths = {
        "model.layers.11.self_attn.q_proj": (11, "self_attn.q_proj"),
        "model.layers.2.experts.7.w1": (2, "experts.7.w1"),
        "lm_head": (None, "lm_head"),
    }
    factors = random_factors(dict.fromkeys(paths, (8, 6, 2)))
    modules = lorafast.analyze(write_factors(tmp_path / "one", factors)).modules
    assert {p: (m.block, m.layer) for p, m in modules.items()} == paths
    both = {"encoder.block.0.q": (8, 6, 2), "decoder.block.0.q": (8, 6, 2)}
    modules = lorafast.analyze(write_factors(tmp_path / "two", random_factors(both))).modules
    assert {(m.block, m.layer) for m in modules.values()} == {
        (0, "encoder.block.q"),
        (0, "decoder.block.q"),
    }


def test_everything_survives_json(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    analysis = lorafast.analyze(adapter, base=make_base(tmp_path / "base"), entries=True)
    plain = json.loads(analysis.to_json())
    assert plain["schema_version"] == 2
    assert plain["kind"] == "adapter_analysis"
    assert from_plain(plain) == analysis
    assert from_plain(analysis.to_dict()) == analysis
    with pytest.raises(lorafast.LorafastError, match="schema version"):
        from_plain(plain | {"schema_version": 99})
    with pytest.raises(lorafast.LorafastError, match="damaged"):
        from_plain({key: value for key, value in plain.items() if key != "modules"})


def test_tables_have_a_row_for_each_module(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    analysis = lorafast.analyze(make_adapter(tmp_path / "adapter"))
    frame = analysis.to_pandas()
    assert frame["path"].tolist() == list(analysis.modules)
    assert frame["k99"].tolist() == [m.k99 for m in analysis.modules.values()]
    assert frame["out_features"].tolist() == [m.shape[0] for m in analysis.modules.values()]
    polars = pytest.importorskip("polars")
    assert isinstance(analysis.to_polars(), polars.DataFrame)
    assert analysis.to_polars()["path"].to_list() == list(analysis.modules)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    analysis = lorafast.analyze(make_adapter(tmp_path / "adapter"))
    with pytest.raises(lorafast.MissingDependencyError, match=r"lorafast\[polars\]"):
        analysis.to_polars()


def test_the_page_is_short_whatever_the_adapter(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.{block}.part{part}.`odd|name`": (8, 6, 2)
        for block in range(70)
        for part in range(50)
    }
    analysis = lorafast.analyze(write_factors(tmp_path / "adapter", random_factors(shapes)))
    page = analysis.to_markdown()
    assert len(page.splitlines()) < 200
    assert page.index("## Findings") < page.index("## Summary")
    for line in page.splitlines():
        # No name breaks a table: as many bars that are no text as the table's header has.
        if line.startswith("| `model"):
            assert line.replace("\\|", "").count("|") == 9
    assert "more layers are left out" in page


def test_the_repr_is_a_line(tmp_path: Path) -> None:
    analysis = lorafast.analyze(make_adapter(tmp_path / "style"))
    assert repr(analysis).startswith("<AdapterAnalysis 'style': 4 modules of rank 4, ")
    assert "\n" not in repr(analysis)
    assert "style" in analysis._repr_html_()


# What others trained


def adapter_folders(real_data: Path) -> list[Path]:
    return sorted(path for path in (real_data / "adapters").iterdir() if path.is_dir())


@pytest.mark.real_data
def test_known_answers(real_data: Path) -> None:
    analysis = lorafast.analyze(real_data / "adapters" / "tiny_lora")
    record = analysis.modules["transformer.h.0.attn.c_attn"]
    unscaled = [value / record.scaling for value in record.singular_values]
    assert unscaled[0] == pytest.approx(14.705266559158, rel=1e-12)
    assert unscaled[-1] == pytest.approx(11.991573203301, rel=1e-12)
    assert record.frobenius_norm / record.scaling == pytest.approx(37.5675737749, rel=1e-11)
    assert record.effective_rank == pytest.approx(7.98266150, rel=1e-8)
    assert record.energy_effective_rank == pytest.approx(7.93130077, rel=1e-8)
    assert record.stable_rank == pytest.approx(6.52650227, rel=1e-8)
    assert analysis.weights.count == 221184
    assert analysis.weights.mean == pytest.approx(-1.909088540e-4, rel=1e-9)
    assert analysis.weights.std == pytest.approx(0.099951866291, rel=1e-11)


@pytest.mark.real_data
@pytest.mark.exhaustive
def test_every_adapter_that_opens_agrees_with_numpy_and_scipy(real_data: Path) -> None:
    done = 0
    for folder in adapter_folders(real_data):
        try:
            analysis = lorafast.analyze(folder)
        except lorafast.LorafastError:
            continue
        file = folder / "adapter_model.safetensors"
        if not file.exists():
            continue
        done += 1
        stored = read_safetensors(file)
        assert list(analysis.tensors) == list(stored)
        for name, found in analysis.tensors.items():
            check_statistics(found, float64(stored[name]), 50)
        for module in analysis.modules.values():
            a, b = stored[module.a_name].float64(), stored[module.b_name].float64()
            dense = b.reshape(len(b), -1) @ a.reshape(len(a), -1) * module.scaling
            if dense.size > 600_000:
                continue
            count = len(module.singular_values)
            expected = scipy.linalg.svdvals(dense)[:count]
            kept = expected > 1e-7 * expected[0]
            np.testing.assert_allclose(
                np.array(module.singular_values)[kept], expected[kept], rtol=1e-6
            )
    assert done >= 4


def tensors_of_any_file(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file or a pickle, whatever format their names are of."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    return {f"{name}": value for name, value in pairs}


@pytest.mark.real_data
def test_every_tensor_of_every_file_agrees_with_numpy(real_data: Path, tmp_path: Path) -> None:
    """Files of formats that are no adapter here yet, as the saved tensors of one that is."""
    from safetensors.torch import save_file

    files = tensors = 0
    for path in sorted((real_data / "adapters").glob("*/*")):
        if path.suffix not in {".safetensors", ".bin", ".pt"}:
            continue
        values = tensors_of_any_file(path)
        # No name may look like a factor: the numbers are what matters here.
        renamed = {f"saved.{index}": value for index, value in enumerate(values.values())}
        adapter = make_adapter(tmp_path / str(files))
        save_file(
            {name: value.detach().clone().contiguous() for name, value in renamed.items()},
            adapter / "adapter_model.safetensors",
        )
        analysis = lorafast.analyze(adapter)
        assert len(analysis.tensors) == len(values)
        stored = read_safetensors(adapter / "adapter_model.safetensors")
        for name, found in analysis.tensors.items():
            check_statistics(found, float64(stored[name]), 50)
        files += 1
        tensors += len(values)
    assert files >= 20
    assert tensors > 4000
