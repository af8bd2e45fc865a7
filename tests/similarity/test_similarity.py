"""The matrix of all cosines against dense products, and what must not change it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import LorafastError, Similarity
from support.analysis import Array, random_factors, write_factors
from support.files import tensor, write_safetensors
from support.handmade import adapter_config
from support.reference import PREFIX
from support.similarity import SHAPES, dense_matrix, fleet, to_cosines

LIMIT = 60


@pytest.mark.parametrize(("precision", "error"), [("float64", 1e-12), ("float32", 1e-6)])
def test_cosines_are_those_of_the_dense_updates(
    tmp_path: Path, precision: Any, error: float
) -> None:
    products = dense_matrix(fleet(tmp_path))
    found = lorafast.similarity(tmp_path, precision=precision)
    assert found.names == [f"a{n}" for n in range(9)]
    assert found.paths == [tmp_path / name for name in found.names]
    assert found.precision == precision
    expected = to_cosines(products)
    assert np.abs(found.matrix - expected).max() < error
    assert (found.matrix == found.matrix.T).all()
    assert (found.matrix.diagonal() == 1.0).all()
    # Norms are in float64 whatever the products are.
    np.testing.assert_allclose(found.norms, np.sqrt(products.diagonal()), rtol=1e-7)
    assert np.abs(expected - np.eye(9)).max() > 0.1
    inner = lorafast.similarity(tmp_path, precision=precision, metric="inner_product")
    np.testing.assert_allclose(inner.matrix, products, atol=error * products.max())


def test_few_are_done_in_float64_by_themselves(tmp_path: Path) -> None:
    products = dense_matrix(fleet(tmp_path))
    found = lorafast.similarity(tmp_path)
    assert found.precision == "float64"
    assert np.abs(found.matrix - to_cosines(products)).max() < 1e-12


def test_each_module_by_itself(tmp_path: Path) -> None:
    updates = fleet(tmp_path)
    found = lorafast.similarity(tmp_path, per_module=True)
    assert found.per_module is not None
    assert set(found.per_module) == set(SHAPES)
    for path, matrix in found.per_module.items():
        own = [{path: update[path]} if path in update else {} for update in updates]
        with np.errstate(invalid="ignore"):
            expected = to_cosines(dense_matrix(own))
        assert np.isnan(matrix).any() == (path == "layers.0.q")
        np.testing.assert_allclose(matrix, expected, atol=1e-12)
    assert np.array_equal(found.matrix, lorafast.similarity(tmp_path).matrix)


def test_what_is_not_shared_is_counted_and_said(tmp_path: Path) -> None:
    fleet(tmp_path)
    found = lorafast.similarity(tmp_path)
    assert found.shared[0, 0] == 3
    assert found.shared[0, 1] == 2
    assert found.coverage[0, 1] == pytest.approx(2 / 3)
    assert found.coverage[0, 2] == 1.0
    assert any("2 adapters (a1, a5) of 9 lack modules" in note for note in found.notes)


def test_neither_threads_nor_memory_decide_about_a_bit(tmp_path: Path) -> None:
    for seed in range(14):
        shapes = {"x": (30, 20, 100), "y": (9, 70, 3)}
        write_factors(tmp_path / f"a{seed}", random_factors(shapes, seed), dtype="F32")
    for precision in ("float64", "float32"):
        first = lorafast.similarity(tmp_path, precision=precision, threads=1)
        for options in ({"threads": 3}, {"memory": 1}, {"memory": 300_000, "threads": 2}):
            again = lorafast.similarity(tmp_path, precision=precision, **options)
            assert np.array_equal(again.matrix, first.matrix)


def test_it_says_where_the_time_went(tmp_path: Path) -> None:
    fleet(tmp_path)
    begin = time.perf_counter()
    found = lorafast.similarity(tmp_path)
    whole = time.perf_counter() - begin
    assert set(found.seconds) == {"opening", "reading", "multiplying"}
    assert all(part > 0 for part in found.seconds.values())
    assert sum(found.seconds.values()) <= whole


def test_extreme_factors_keep_their_digits(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 1)
    updates = []
    for number, (left, right) in enumerate([(1.0, 1.0), (1e30, 1e-25), (1e-36, 1e-20)]):
        own = {p: (left * b, right * a) for p, (b, a) in factors.items()}
        write_factors(tmp_path / f"a{number}", own, dtype="F64")
        updates.append(own)
    for precision in ("float64", "float32"):
        found = lorafast.similarity(tmp_path, precision=precision)
        np.testing.assert_allclose(found.matrix, 1.0, atol=1e-6)


def test_a_zero_and_an_infinite_adapter_have_no_cosine_and_harm_no_other(tmp_path: Path) -> None:
    one, two = random_factors(SHAPES, 1), random_factors(SHAPES, 2)
    write_factors(tmp_path / "a", one)
    write_factors(tmp_path / "b", two)
    write_factors(tmp_path / "c", {p: (0 * b, a) for p, (b, a) in one.items()})
    broken = {p: (b.copy(), a) for p, (b, a) in two.items()}
    broken["layers.0.q"][0][3, 1] = np.nan
    write_factors(tmp_path / "d", broken)
    found = lorafast.similarity(tmp_path)
    expected = to_cosines(dense_matrix([{p: b @ a for p, (b, a) in f.items()} for f in (one, two)]))
    np.testing.assert_allclose(found.matrix[:2, :2], expected, atol=1e-12)
    assert np.isnan(found.matrix[2:]).all()
    assert np.isnan(found.matrix[:, 2:]).all()
    assert any(
        "1 adapter (c) has a low-rank update of zero and no cosine" in note for note in found.notes
    )
    assert any("1 adapter (d) holds NaN" in note for note in found.notes)
    assert found.nearest("a") == [("b", found.matrix[0, 1])]
    assert sorted(map(sorted, found.clusters(threshold=-1.0))) == [["a", "b"], ["c"], ["d"]]


def test_embeddings_convolutions_and_experts(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    updates: list[dict[str, Array]] = []
    for number in range(3):
        conv = random.normal(size=(2, 3, 3, 3)), random.normal(size=(5, 2, 1, 1))
        table = random.normal(size=(2, 11)), random.normal(size=(6, 2))
        # Three experts of rank 2: A one below the other, B with the expert as the fastest index.
        experts = random.normal(size=(3, 2, 7)), random.normal(size=(3, 4, 2))
        tensors = {
            f"{PREFIX}conv.lora_A.weight": tensor(conv[0]),
            f"{PREFIX}conv.lora_B.weight": tensor(conv[1]),
            f"{PREFIX}embed.lora_embedding_A": tensor(table[0]),
            f"{PREFIX}embed.lora_embedding_B": tensor(table[1]),
            f"{PREFIX}mlp.experts.lora_A.weight": tensor(experts[0].reshape(6, 7)),
            f"{PREFIX}mlp.experts.lora_B.weight": tensor(
                experts[1].transpose(1, 2, 0).reshape(4, 6)
            ),
        }
        path = tmp_path / f"a{number}"
        path.mkdir()
        config = adapter_config(r=2, lora_alpha=2, target_parameters=["mlp.experts.down_proj"])
        (path / "adapter_config.json").write_text(json.dumps(config))
        write_safetensors(path / "adapter_model.safetensors", tensors)
        updates.append(
            {
                "conv": conv[1].reshape(5, 2) @ conv[0].reshape(2, 27),
                "embed": table[1] @ table[0],
                "experts": experts[1] @ experts[0],
            }
        )
    found = lorafast.similarity(tmp_path)
    expected = to_cosines(dense_matrix(updates))
    assert np.abs(found.matrix - expected).max() < 1e-6
    assert found.modules[-3:] == [f"mlp.experts[{expert}]" for expert in range(3)]


def test_nearest_clusters_and_pairs(tmp_path: Path) -> None:
    """Two families, each a common update with something of its own."""
    random = np.random.default_rng(0)
    for family in range(2):
        common = random_factors(SHAPES, family)
        for child in range(3):
            own = {
                p: (b + 0.1 * (child + 1) * random.normal(size=b.shape), a)
                for p, (b, a) in common.items()
            }
            write_factors(tmp_path / f"{'xy'[family]}{child}", own, dtype="F32")
    found = lorafast.similarity(tmp_path)
    assert [name for name, _ in found.nearest("x0", 2)] == ["x1", "x2"]
    assert [name for name, _ in found.nearest(tmp_path / "x0", 2)] == ["x1", "x2"]
    assert len(found.nearest("x0", 100)) == 5
    clusters = found.clusters(threshold=0.5)
    assert sorted(map(sorted, clusters)) == [["x0", "x1", "x2"], ["y0", "y1", "y2"]]
    assert len(found.clusters(count=2)) == 2
    assert found.linkage().shape == (5, 4)
    assert {found.pairs(2)[0][0][0]} <= {"x", "y"}
    assert found.pairs(1)[0][2] == np.max(found.matrix - 2 * np.eye(6))
    with pytest.raises(KeyError, match="no adapter 'z'"):
        found.nearest("z")
    with pytest.raises(ValueError, match="k must be at least 1"):
        found.nearest("x0", 0)
    with pytest.raises(ValueError, match="method must be one of"):
        found.clusters(method="ward")  # type: ignore[arg-type]  # wrong on purpose


def test_the_picture_has_like_beside_like(tmp_path: Path) -> None:
    fleet(tmp_path)
    figure = lorafast.similarity(tmp_path).plot()
    heatmap = next(axes for axes in figure.axes if axes.images)
    labels = [label.get_text() for label in heatmap.get_yticklabels()]
    assert sorted(labels) == [f"a{n}" for n in range(9)]
    shown = heatmap.images[0].get_array()
    found = lorafast.similarity(tmp_path)
    places = [found.names.index(label) for label in labels]
    off = ~np.eye(9, dtype=bool)
    np.testing.assert_allclose(shown[off], found.matrix[np.ix_(places, places)][off])
    # a2, a5 and a8 share a direction with a0.
    family = sorted(labels.index(name) for name in ("a0", "a2", "a8"))
    assert family[-1] - family[0] <= 3


def test_saved_and_loaded(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet")
    found = lorafast.similarity(tmp_path / "fleet", per_module=True)
    found.save(tmp_path / "all.npz")
    again = Similarity.load(tmp_path / "all.npz")
    assert again.to_dict()["names"] == found.names
    assert np.array_equal(again.matrix, found.matrix)
    assert np.array_equal(again.norms, found.norms)
    assert np.array_equal(again.presence, found.presence)
    assert again.groups == found.groups
    assert again.per_module is not None
    assert found.per_module is not None
    for path, matrix in found.per_module.items():
        assert np.array_equal(again.per_module[path], matrix, equal_nan=True)
    plain = json.loads(found.to_json())
    assert plain["kind"] == "similarity"
    np.testing.assert_array_equal(plain["matrix"], found.matrix)
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(LorafastError, match="is no similarity"):
        Similarity.load(tmp_path / "bad.npz")


def bases(folder: Path) -> None:
    write_factors(folder / "a", random_factors(SHAPES, 1), base_model_name_or_path="hub/llama")
    write_factors(folder / "b", random_factors(SHAPES, 2), base_model_name_or_path="/data/Llama/")
    write_factors(folder / "c", random_factors(SHAPES, 3), base_model_name_or_path="hub/qwen")
    other = {p: (m + 1, n, r) for p, (m, n, r) in SHAPES.items()}
    write_factors(folder / "d", random_factors(other, 4), base_model_name_or_path="hub/qwen")


def test_adapters_of_different_bases_are_an_error_that_lists_them(tmp_path: Path) -> None:
    bases(tmp_path)
    with pytest.raises(LorafastError) as caught:
        lorafast.similarity(tmp_path)
    message = str(caught.value)
    assert "3 bases: hub/llama (2: a, b); hub/qwen (1: c); hub/qwen, shapes 2 (1: d)" in message
    assert "--group-by-base" in message
    assert "\n" not in message


def test_bases_are_split_or_ignored(tmp_path: Path) -> None:
    bases(tmp_path)
    found = lorafast.similarity(tmp_path, group_by_base=True)
    assert found.groups == {"hub/llama": [0, 1], "hub/qwen": [2], "hub/qwen, shapes 2": [3]}
    known = np.isfinite(found.matrix)
    expected = np.eye(4, dtype=bool)
    expected[0, 1] = expected[1, 0] = True
    assert np.array_equal(known, expected)
    parts = found.split()
    assert parts["hub/llama"].names == ["a", "b"]
    assert parts["hub/llama"].matrix[0, 1] == found.matrix[0, 1]
    assert sorted(map(len, found.clusters(threshold=-1.0))) == [1, 1, 2]
    found.plot()
    # d updates weights of other shapes and can be compared with none.
    shutil.rmtree(tmp_path / "d")
    assert np.isfinite(lorafast.similarity(tmp_path, ignore_base=True).matrix).all()
    shutil.rmtree(tmp_path / "c")
    assert lorafast.similarity(tmp_path).groups == {"hub/llama": [0, 1]}


def test_an_adapter_without_a_base_belongs_to_the_only_one(tmp_path: Path) -> None:
    write_factors(tmp_path / "a", random_factors(SHAPES, 1), base_model_name_or_path=None)
    write_factors(tmp_path / "b", random_factors(SHAPES, 2), base_model_name_or_path="hub/llama")
    assert lorafast.similarity(tmp_path).groups == {"hub/llama": [0, 1]}


def test_two_adapters_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for number, run in enumerate(("run-1", "run-2")):
        write_factors(tmp_path / run / "final", random_factors(SHAPES, number))
    found = lorafast.similarity(tmp_path)
    assert found.names == ["run-1/final", "run-2/final"]
    assert found.nearest("run-1/final")[0][0] == "run-2/final"


def test_a_broken_adapter_is_an_error_among_the_good(tmp_path: Path) -> None:
    for number in range(3):
        write_factors(tmp_path / f"a{number}", random_factors(SHAPES, number))
    weights = tmp_path / "a1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    found = lorafast.similarity(tmp_path)
    assert found.names == ["a0", "a2"]
    (error,) = found.errors
    assert error.path == tmp_path / "a1"
    assert "truncated" in error.reason


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(lorafast.AdapterError, match="no adapter was found"):
        lorafast.similarity(tmp_path)
    with pytest.raises(FileNotFoundError):
        lorafast.similarity(tmp_path / "nowhere")
    broken = write_factors(tmp_path / "a", random_factors(SHAPES))
    (broken / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(lorafast.AdapterError, match="no adapter could be read"):
        lorafast.similarity(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "angle"}, "metric must be one of"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"memory": 0}, "memory must be"),
        ({"threads": 0}, "threads is 0; it is 1 to 1024"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_factors(tmp_path / "a", random_factors(SHAPES))
    with pytest.raises(ValueError, match=message):
        lorafast.similarity(tmp_path, **options)


def test_a_fleet_is_taken_as_it_is(tmp_path: Path) -> None:
    fleet(tmp_path)
    scanned = lorafast.scan(tmp_path, metrics="headers")
    found = lorafast.similarity(scanned)
    assert found.names == scanned.names
    assert np.array_equal(found.matrix, lorafast.similarity(tmp_path).matrix)


def test_progress_is_told_and_its_error_ends_the_work(tmp_path: Path) -> None:
    fleet(tmp_path)
    seen: list[tuple[int, int]] = []
    lorafast.similarity(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0

    def fail(done: int, total: int) -> None:
        raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        lorafast.similarity(tmp_path, progress=fail)


# Resuming

COUNT, SIZE, RANK = 40, 2048, 64
CODE = """
    import sys, lorafast
    folder, cache = sys.argv[1:]
    lorafast.similarity(folder, cache=cache, memory=1, threads=1, precision="float64")
    print("finished")
"""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of which 15 blocks of products take a moment each."""
    folder = tmp_path_factory.mktemp("heavy")
    random = np.random.default_rng(0)
    # Bytes of bfloat16 between 2^-7 and 2^-6, of both signs.
    bits = random.integers(0x3C00, 0x3C80, (RANK * SIZE * 2,), dtype=np.uint16)
    bits |= random.integers(0, 2, bits.shape, dtype=np.uint16) << np.uint16(15)
    from support.files import Tensor

    for number in range(COUNT):
        path = folder / f"a{number}"
        path.mkdir()
        own = np.roll(bits, 977 * number)
        half = RANK * SIZE
        tensors = {
            f"{PREFIX}m.lora_A.weight": Tensor("BF16", (RANK, SIZE), own[:half].tobytes()),
            f"{PREFIX}m.lora_B.weight": Tensor("BF16", (SIZE, RANK), own[half:].tobytes()),
        }
        write_safetensors(path / "adapter_model.safetensors", tensors)
        config = json.dumps(adapter_config(r=RANK, lora_alpha=RANK))
        (path / "adapter_config.json").write_text(config)
    return folder


def blocks(cache: Path) -> dict[Path, int]:
    """The finished blocks, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("products-*/block-??????")}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if condition():
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    pytest.fail("ended, or did nothing, before it could be killed")


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_in_the_middle_and_started_again(heavy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CODE), str(heavy), str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(blocks(cache)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL
    assert "finished" not in printed
    before = blocks(cache)
    assert 3 <= len(before) < 15, "too fast to be killed: make the adapters larger"

    options: dict[str, Any] = {"memory": 1, "precision": "float64"}
    resumed = lorafast.similarity(heavy, cache=cache, **options)
    after = blocks(cache)
    assert len(after) == 15
    assert {path: after[path] for path in before} == before, "what was done is not done again"
    whole = lorafast.similarity(heavy, **options)
    assert np.array_equal(resumed.matrix, whole.matrix)
    # And a third time, from the cache alone.
    again = lorafast.similarity(heavy, cache=cache, **options)
    assert blocks(cache) == after
    assert np.array_equal(again.matrix, whole.matrix)


def test_a_damaged_cache_is_not_believed(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet")
    cache = tmp_path / "cache"
    expected = lorafast.similarity(tmp_path / "fleet", cache=cache).matrix
    (block,) = blocks(cache)
    sound = block.read_bytes()
    for damage in (sound[:-5], sound[:40] + b"\x55" + sound[41:], b"", sound + b"\0"):
        block.write_bytes(damage)
        found = lorafast.similarity(tmp_path / "fleet", cache=cache)
        assert np.array_equal(found.matrix, expected)
    assert block.read_bytes() == sound


def test_the_cache_notices_what_changed(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet", 4)
    cache = tmp_path / "cache"
    lorafast.similarity(tmp_path / "fleet", cache=cache)
    shutil.rmtree(tmp_path / "fleet" / "a2")
    write_factors(tmp_path / "fleet" / "a2", random_factors(SHAPES, 99), dtype="F16")
    found = lorafast.similarity(tmp_path / "fleet", cache=cache)
    assert np.array_equal(found.matrix, lorafast.similarity(tmp_path / "fleet").matrix)
    config = tmp_path / "fleet" / "a3" / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["alpha_pattern"] = {"layers.0.q": -7.0}
    config.write_text(json.dumps(settings))
    found = lorafast.similarity(tmp_path / "fleet", cache=cache)
    assert np.array_equal(found.matrix, lorafast.similarity(tmp_path / "fleet").matrix)


def test_a_cache_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lorafast.similarity(tmp_path / "fleet", cache=tmp_path / "file" / "cache")
