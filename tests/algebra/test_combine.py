"""Combining adapters: the updates of the result are the combination of those of its inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lorafast._cli.main import main
from support.algebra import (
    MODULE,
    TOYS,
    distance,
    exact,
    random_modules,
    updates_of,
    write_lora,
    write_toy,
)

SHAPES = {f"model.layers.{i}.self_attn.q_proj": (24, 32) for i in range(3)} | {
    "model.layers.0.mlp.down_proj": (32, 40)
}


@pytest.fixture
def toys(tmp_path: Path) -> dict[str, Path]:
    return {name: write_toy(tmp_path / "toys", name) for name in TOYS}


def combined(inputs: list[Path], output: Path, **options: Any) -> np.ndarray[Any, Any]:
    lorafast.combine(inputs, output, overwrite=True, **options)
    return updates_of(output)[MODULE]


def toy(name: str) -> np.ndarray[Any, Any]:
    return np.array([[float(value) for value in row] for row in exact(name)])


def test_a_sum_of_toys_is_exact(toys: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = combined([toys["X"], toys["Y"]], output, weights=[1, -0.5])
    assert found.tolist() == [[1, 3.5, 8], [-1.5, 2, 1.5], [3, 1, 7], [2.5, -1, 1.5]]
    found = combined([toys["X"], toys["Y"], toys["Z"]], output, weights=[1, -0.5, 2])
    assert found.tolist() == [[7, 9.5, 2], [10.5, 14, -10.5], [3, 1, 7], [8.5, 5, -4.5]]
    report = lorafast.combine([toys["X"], toys["Y"]], output, overwrite=True)
    assert report.error == 0
    assert report.ranks == {MODULE: 4}


def test_a_truncated_sum_is_that_of_the_reference(toys: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = lorafast.combine(
        [toys["X"], toys["Y"]], output, weights=[1, -0.5], rank=1, dtype="float64"
    )
    [module] = report.modules.values()
    sigma = [11.69473879397714, 4.173426909222615, 0.2561100818448561]
    assert module.singular_values == pytest.approx(sigma, rel=1e-14)
    assert report.error == pytest.approx(0.3366638166, abs=1e-10)
    assert module.error * module.norm == pytest.approx(4.181277859775, abs=1e-11)
    rows = updates_of(output)[MODULE]
    assert rows[0] == pytest.approx([2.0916134411, 2.4903008603, 8.0287989886], abs=1e-9)
    report = lorafast.combine(
        [toys["X"], toys["Y"]], output, weights=[1, -0.5], rank=2, dtype="float64", overwrite=True
    )
    assert report.error == pytest.approx(0.0206212072, abs=2e-10)
    rows = updates_of(output)[MODULE]
    assert rows[0] == pytest.approx([0.9394677168, 3.4249538035, 8.0390466551], abs=1e-9)
    assert rows[1] == pytest.approx([-1.5040500495, 1.9949788642, 1.5026125049], abs=1e-9)


@pytest.mark.parametrize(
    ("method", "options", "names", "wanted"),
    [
        ("slerp", {"t": 0.25}, "PQ", [0.8631542461, 0.3346081106]),
        ("karcher", {}, "PQ", [0.6221834205, 0.6443498589]),
        ("model_stock", {}, "PQ", [0.1984380018, 0.1984380018]),
        ("karcher", {}, "XYZ", [0.38874231, 0.88634212, 0.43897084]),
        ("multislerp", {}, "XYZ", [0.38963757, 0.92005283, 0.41525247]),
        ("model_stock", {}, "XYZ", [0.3977327943 / 3] * 3),
        ("centroid", {}, "XYZ", [1 / 3] * 3),
        ("projection", {}, "PQ", [1, -502 / 1958]),
        ("linear", {"lambda": 0.5}, "XY", [0.5, 0.5]),
    ],
)
def test_coefficients_are_those_of_the_reference(
    tmp_path: Path, method: Any, options: dict[str, float], names: str, wanted: list[float]
) -> None:
    output = tmp_path / "out"
    toys = {name: write_toy(tmp_path / "toys", name) for name in names}
    report = lorafast.combine(
        [toys[name] for name in names], output, method=method, options=options
    )
    [module] = report.modules.values()
    assert module.coefficients == pytest.approx(wanted, abs=2e-8)
    total = sum(c * toy(name) for c, name in zip(module.coefficients or (), names, strict=True))
    assert updates_of(output)[MODULE] == pytest.approx(total, rel=1e-6, abs=1e-6)


def test_a_row_of_karcher_is_that_of_the_reference(toys: dict[str, Path], tmp_path: Path) -> None:
    inputs = [toys[name] for name in "XYZ"]
    found = combined(inputs, tmp_path / "out", method="karcher", dtype="float64")
    assert found[0] == pytest.approx([3.867081, 3.758224, 1.793026], abs=1e-5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    weights=st.lists(st.integers(-40, 40).map(lambda n: n / 19), min_size=4, max_size=4),
    rule=st.tuples(
        st.sampled_from([None, 3, 40, "energy:0.9", "error:0.1", "budget:ranks=9", "auto"]),
        st.sampled_from(["float32", "float16", "float64"]),
    ),
    seed=st.integers(0, 1000),
)
def test_errors_are_those_of_the_dense_difference(
    tmp_path: Path,
    ranks: list[int],
    weights: list[float],
    rule: tuple[int | str | None, str],
    seed: int,
) -> None:
    weights = weights[: len(ranks)]
    rank, dtype = rule
    inputs = []
    total = dict.fromkeys(SHAPES, 0.0)
    for index, (own, weight) in enumerate(zip(ranks, weights, strict=True)):
        # The last adapter lacks a module.
        shapes = dict(list(SHAPES.items())[: 4 if index == 0 else 3])
        modules = random_modules(seed + index, shapes, own, decay=0.7)
        inputs.append(write_lora(tmp_path / str(index), modules, alpha=1.7))
        for name, update in updates_of(inputs[-1]).items():
            total[name] = total[name] + weight * update
    if not any(np.any(update) for update in total.values()):
        return
    output = tmp_path / "out"
    report = lorafast.combine(
        inputs, output, weights=weights, rank=rank, dtype=dtype, overwrite=True
    )
    found = distance(updates_of(output), total)
    # What is tiny beside float32's rounding of the inputs is known to fewer digits.
    assert report.error == pytest.approx(found, rel=1e-5, abs=1e-13)
    for name, module in report.modules.items():
        norm = np.linalg.norm(total[name])
        assert module.norm == pytest.approx(norm, rel=1e-9, abs=1e-12)
        if module.singular_values:
            values = np.linalg.svd(np.atleast_2d(total[name]), compute_uv=False)
            count = len(module.singular_values)
            assert module.singular_values == pytest.approx(
                values[:count], rel=1e-8, abs=1e-12 * norm
            )


@pytest.mark.parametrize("rank", [None, 2, "energy:0.9", "auto", "budget:ranks=4"])
def test_what_only_a_weight_of_zero_has_is_left_out(tmp_path: Path, rank: int | str | None) -> None:
    one, *others = SHAPES.items()
    first = write_lora(tmp_path / "first", random_modules(1, dict([one]), 2), alpha=2)
    second = write_lora(tmp_path / "second", random_modules(2, dict(others), 2), alpha=2)
    report = lorafast.combine([first, second], tmp_path / "out", weights=[0, 1], rank=rank)
    assert report.ranks[one[0]] == 0
    assert one[0] not in updates_of(tmp_path / "out")


def test_weights_go_by_the_names_of_modules(tmp_path: Path) -> None:
    modules = random_modules(1, SHAPES, 4)
    adapter = write_lora(tmp_path / "a", modules, alpha=4)
    weights = [{"*.down_proj": 0.25, "model.layers.[!]": 3, "model.layers.1.*": -1}]
    with pytest.raises(ValueError, match=r"no module fits the pattern 'model.layers.\[!\]'|fits"):
        lorafast.combine([adapter], tmp_path / "out", weights=weights)
    weights = [{"*.down_proj": 0.25, "model.layers.1.*": -1}]
    lorafast.combine([adapter], tmp_path / "out", weights=weights)
    found, own = updates_of(tmp_path / "out"), updates_of(adapter)
    for name, update in own.items():
        factor = 0.25 if "down" in name else -1 if "layers.1." in name else 1
        assert np.array_equal(found[name], factor * update), name


def test_formats_and_ranks_may_differ(tmp_path: Path) -> None:
    peft = write_lora(tmp_path / "a", random_modules(1, SHAPES, 4), alpha=6)
    other = write_lora(
        tmp_path / "b",
        random_modules(2, SHAPES, dict(zip(SHAPES, (3, 5, 2, 7), strict=True))),
        alpha=6,
    )
    lorafast.convert(other, tmp_path / "b.safetensors", to="kohya")
    report = lorafast.combine([tmp_path / "b.safetensors", peft], tmp_path / "out", dtype="float64")
    assert report.target_format == "peft"
    one, two = updates_of(peft), updates_of(other)
    total = {name: one[name] + two[name] for name in one}
    assert distance(updates_of(tmp_path / "out"), total) < 1e-7
    assert set(report.ranks.values()) == {7, 9, 6, 11}


def test_the_bytes_depend_on_nothing_but_the_updates(tmp_path: Path) -> None:
    inputs = [
        write_lora(tmp_path / str(seed), random_modules(seed, SHAPES, 5), alpha=3)
        for seed in range(3)
    ]
    contents = set()
    for threads in (1, 2, 7):
        lorafast.combine(
            inputs, tmp_path / "out", rank="energy:0.8", threads=threads, overwrite=True
        )
        contents.add((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert len(contents) == 1


def test_directions_that_adapters_share_are_found_once(tmp_path: Path) -> None:
    modules = random_modules(3, SHAPES, 4)
    random = np.random.default_rng(0)
    turned = {}
    for name, (b, a) in modules.items():
        gauge = np.linalg.qr(random.standard_normal((4, 4)))[0]
        turned[name] = ((b @ gauge).astype(np.float32), (gauge.T @ a).astype(np.float32))
    one = write_lora(tmp_path / "a", modules, alpha=4)
    other = write_lora(tmp_path / "b", turned, alpha=4)
    report = lorafast.combine([one, other], tmp_path / "out", rank="auto")
    assert set(report.ranks.values()) == {4}
    assert report.error < 1e-6
    # What cancels is nothing, and not the rounding that is left of it.
    with pytest.raises(ValueError, match="nothing would be left"):
        lorafast.combine([one, one], tmp_path / "no", weights=[1, -1], rank=4)
    report = lorafast.combine([one, other], tmp_path / "no", weights=[1, -1], rank=4)
    exact_sum = {n: updates_of(one)[n] - updates_of(other)[n] for n in SHAPES}
    assert distance(updates_of(tmp_path / "no"), exact_sum) == pytest.approx(report.error, rel=1e-3)


@pytest.mark.parametrize("method", ["linear", "normalized", "svd", "iso_c", "knots", "core_space"])
@pytest.mark.parametrize("rank", [None, 3, "energy:0.9", "budget:ranks=9"])
def test_modules_in_which_no_adapter_has_a_weight_are_left_out(
    tmp_path: Path, method: Any, rank: Any
) -> None:
    first = dict(list(SHAPES.items())[:2])
    inputs = [
        write_lora(tmp_path / str(seed), random_modules(seed, shapes, 2), alpha=3)
        for seed, shapes in enumerate((SHAPES, first))
    ]
    report = lorafast.combine(inputs, tmp_path / "out", method=method, weights=[0, 1], rank=rank)
    assert set(updates_of(tmp_path / "out")) == set(first)
    assert {name for name, found in report.ranks.items() if found == 0} == set(SHAPES) - set(first)
    with pytest.raises(ValueError, match=r"nothing would be left|divided by their sum"):
        lorafast.combine(inputs, tmp_path / "no", method=method, weights=[0, 0], rank=rank)
    assert not (tmp_path / "no").exists()


def test_a_result_tells_where_it_comes_from(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 4), alpha=4)
    report = lorafast.combine([adapter], tmp_path / "out", weights=[2])
    found = json.loads((tmp_path / "out" / "adapter_provenance.json").read_text())
    assert found["verb"] == "combine"
    assert found["parameters"]["method"] == "linear"
    [source] = found["inputs"]
    weights = adapter / "adapter_model.safetensors"
    assert source["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert str(tmp_path / "out" / "adapter_provenance.json") in report.files
    # A later merge takes the file for what it is: no weights.
    assert lorafast.inspect(tmp_path / "out").to_dict()["format"] == "peft"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "there are linear"),
        ({"weights": [1]}, "1 weights for 2 adapters"),
        ({"weights": [1, float("nan")]}, "finite"),
        ({"method": "normalized", "weights": [1, -1]}, "divided by their sum"),
        ({"method": "slerp", "options": {"t": 2}}, "option t is 2"),
        ({"method": "slerp", "options": {"density": 0.5}}, "density"),
        ({"method": "linear", "options": {"t": 0.5}}, "takes no option"),
        ({"method": "centroid", "weights": [1, 1]}, "takes no weights"),
        ({"rank": 0}, "leave nothing"),
        ({"rank": "energy:2"}, "a share"),
        ({"rank": "budget:ranks=0"}, "rank is"),
        ({"rank": "budget:bytes=3"}, "leaves room for nothing"),
        ({"to": "onnx"}, "onnx"),
        ({"dtype": "int8"}, "int8"),
        ({"compat": "mergekit"}, "compat"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    inputs = [
        write_lora(tmp_path / str(seed), random_modules(seed, SHAPES, 2), alpha=3)
        for seed in range(2)
    ]
    with pytest.raises(ValueError, match=message):
        lorafast.combine(inputs, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_adapters_of_different_models_are_refused(tmp_path: Path) -> None:
    one = write_lora(tmp_path / "a", random_modules(1, SHAPES, 2), alpha=3)
    wide = {name: (out, inputs + 8) for name, (out, inputs) in SHAPES.items()}
    other = write_lora(tmp_path / "b", random_modules(2, wide, 2), alpha=3)
    with pytest.raises(lorafast.AdapterError):
        lorafast.combine([one, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_sum_is_refused_by_name(tmp_path: Path) -> None:
    plain = write_lora(tmp_path / "a", random_modules(1, SHAPES, 2), alpha=3)
    dora = write_lora(tmp_path / "b", random_modules(1, SHAPES, 2), alpha=3, use_dora=True)
    with pytest.raises(lorafast.AdapterError):
        lorafast.combine([plain, dora], tmp_path / "out")
    pissa = write_lora(
        tmp_path / "c", random_modules(1, SHAPES, 2), alpha=3, init_lora_weights="pissa"
    )
    with pytest.raises(lorafast.UnsupportedAdapterError, match="PiSSA"):
        lorafast.combine([plain, pissa], tmp_path / "out")


def test_a_rehearsal_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [
        str(write_lora(tmp_path / str(seed), random_modules(seed, SHAPES, 2), alpha=3))
        for seed in range(2)
    ]
    flags = ["--rank", "3", "-o", str(tmp_path / "out")]
    assert (
        main(["combine", *inputs, *flags, "--dry-run", "--weights", "1", "*.q_proj=0.5,*=2"]) == 0
    )
    assert "nothing was written" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert main(["combine", *inputs, *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "combination"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert main(["combine", *inputs, *flags]) == 1
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [None, 2, "energy:0.9", "auto"])
def test_a_module_whose_weights_are_all_zero_is_left_out(tmp_path: Path, rank: Any) -> None:
    modules = random_modules(0, SHAPES, 3, decay=0.7)
    first = next(iter(SHAPES))
    path = write_lora(tmp_path / "in", modules, alpha=1.7)
    report = lorafast.combine([path, path], tmp_path / "out", weights=[{first: 0}] * 2, rank=rank)
    assert report.ranks[first] == 0
    assert all(found for name, found in report.ranks.items() if name != first)
    assert first not in updates_of(tmp_path / "out")
