"""Merges that round the real number once: against whole numbers, by every path, by digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.exact import merged as merged_exactly
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

SETS: list[str] = lorafast.build_info()["instruction_sets"]
MODULES = {"model.layers.0.q_proj": (25, 37), "model.layers.0.up_proj": (41, 9)}
Q, UP = MODULES
DTYPES = ("BF16", "F16", "F32", "F64")
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def factors(adapter: Path, module: str) -> tuple[Any, Any]:
    tensors = read_checkpoint(adapter / "adapter_model.safetensors")
    key = f"{PREFIX}{module}.lora_"
    return tensors[f"{key}B.weight"].float64(), tensors[f"{key}A.weight"].float64()


def bits(values: Any) -> Any:
    return np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)


def assert_same(found: Tensor, expected: Any) -> None:
    different = bits(found.float64()) != bits(expected)
    assert not different.any(), (
        f"{different.sum()} differ, the first at {np.argwhere(different)[0]}: "
        f"{found.float64()[different][0]!r} instead of {expected[different][0]!r}"
    )


def coarse(modules: Any, dtype: str, seed: int, *, rank: int = 4) -> dict[str, Tensor]:
    """Factors of one or two digits, so that sums are ties all the time."""
    random = np.random.default_rng(seed)
    made = {}
    for module, (rows, columns) in modules.items():
        for name, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = random.integers(-2, 3, size=shape) * 2.0 ** random.integers(-5, 0, size=shape)
            made[f"{PREFIX}{module}.lora_{name}.weight"] = tensor(values, dtype)
    return made


@pytest.mark.parametrize("written", DTYPES[:3])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_every_weight_is_the_real_number_rounded_once(
    tmp_path: Path, kind: str, stored: str, written: str
) -> None:
    base = make_base(tmp_path / "base", modules=MODULES, dtype=stored, scale=1.0)
    adapters, weights = [], [0.7, -1.3, 2.0]
    for place, dtype in enumerate(("F32", "BF16", "F16")):
        made = adapter_tensors(MODULES, dtype=dtype, seed=place + 3)
        tensors = made if kind == "fine" else coarse(MODULES, dtype, place)
        adapters.append(make_adapter(tmp_path / f"{place}", tensors, r=4, lora_alpha=3 + place))
    if kind == "coarse":
        weights = [0.5, -1.0, 2.0]
    report = lorafast.merge(
        base,
        adapters,
        tmp_path / "out",
        weights=weights,
        precision="exact",
        dtype=NAMES[written],
        sync=False,
    )
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for module in MODULES:
        name = f"{module}.weight"
        products = [
            (*factors(adapter, module), (3 + place) / 4, weight)
            for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
        ]
        assert_same(after[name], merged_exactly(before[name], products, written))
    assert report.precision == "exact"
    assert report.recomputed is not None
    if kind == "coarse" and stored == written == "BF16":
        assert report.recomputed["in_integers"] > 10
    assert lorafast.verify(base, adapters, tmp_path / "out", weights=weights, precision="exact").ok


def test_float64_is_kept_to_the_last_digit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=MODULES, dtype="F64")
    adapter = make_adapter(tmp_path / "a", adapter_tensors(MODULES, dtype="F64"), lora_alpha=3)
    lorafast.merge(base, adapter, tmp_path / "out", precision="exact", sync=False)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for module in MODULES:
        name = f"{module}.weight"
        products = [(*factors(adapter, module), 0.75, 1.0)]
        assert_same(after[name], merged_exactly(before[name], products, "F64"))


def test_ends_of_the_range_and_zeros(tmp_path: Path) -> None:
    top, least = 3.3895313892515355e38, 2.0**-133
    values = [[0.0, -0.0, 1.0, least, -least, top, -top, least]]
    base = tmp_path / "base"
    base.mkdir()
    weight = {f"{Q}.weight": tensor(np.array(values), "BF16")}
    write_safetensors(base / "model.safetensors", weight)
    # Cancellation to nothing, half of the smallest number, and half a unit of the largest.
    right = [[0.0, 0.0, -1.0, -least / 2, least / 2, 0.0, 0.0, -least]]
    tensors = {
        f"{PREFIX}{Q}.lora_A.weight": tensor(np.array(right)),
        f"{PREFIX}{Q}.lora_B.weight": tensor(np.array([[1.0]])),
    }
    adapter = make_adapter(tmp_path / "a", tensors, r=1, lora_alpha=1, target_modules=["q_proj"])
    lorafast.merge(base, adapter, tmp_path / "out", precision="exact", sync=False)
    found = read_checkpoint(tmp_path / "out")[f"{Q}.weight"]
    expected = [[0.0, 0.0, 0.0, 0.0, -0.0, top, -top, 0.0]]
    assert_same(found, np.array(expected))
    tensors[f"{PREFIX}{Q}.lora_A.weight"] = tensor(np.array([[0.0] * 5 + [top / 200, 0, 0]]))
    adapter = make_adapter(tmp_path / "b", tensors, r=1, lora_alpha=1, target_modules=["q_proj"])
    with pytest.raises(lorafast.NumericError, match="finite weight NaN or infinite"):
        lorafast.merge(base, adapter, tmp_path / "too far", precision="exact")
    assert not (tmp_path / "too far").exists()


def test_embeddings_convolutions_and_biases(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    values = {
        "model.embed_tokens.weight": (13, 8),
        "model.conv.weight": (6, 4, 3, 3),
        "model.layers.0.q_proj.weight": (8, 8),
        "model.layers.0.q_proj.bias": (8,),
    }
    base = tmp_path / "base"
    base.mkdir()
    stored = {name: tensor(random.normal(size=shape), "BF16") for name, shape in values.items()}
    write_safetensors(base / "model.safetensors", stored)
    made = {
        "model.embed_tokens.lora_embedding_A": (2, 13),
        "model.embed_tokens.lora_embedding_B": (8, 2),
        "model.conv.lora_A.weight": (2, 4, 3, 3),
        "model.conv.lora_B.weight": (6, 2, 1, 1),
        "model.layers.0.q_proj.lora_A.weight": (2, 8),
        "model.layers.0.q_proj.lora_B.weight": (8, 2),
        "model.layers.0.q_proj.lora_B.bias": (8,),
    }
    tensors = {f"{PREFIX}{name}": tensor(random.normal(size=shape)) for name, shape in made.items()}
    of_layer = {name: tensors.pop(name) for name in list(tensors) if "q_proj" in name}
    adapter = make_adapter(
        tmp_path / "a",
        tensors,
        r=2,
        lora_alpha=3,
        target_modules=["embed_tokens", "conv"],
    )
    biased = make_adapter(
        tmp_path / "b", of_layer, r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj"]
    )
    lorafast.merge(base, [adapter, biased], tmp_path / "out", precision="exact", sync=False)
    tensors |= of_layer
    after = read_checkpoint(tmp_path / "out")

    def of(name: str, *shape: int) -> Any:
        return tensors[f"{PREFIX}model.{name}"].float64().reshape(shape)

    a, b = of("embed_tokens.lora_embedding_A", 2, 13), of("embed_tokens.lora_embedding_B", 8, 2)
    expected = {
        "model.embed_tokens.weight": (a.T, b.T),
        "model.conv.weight": (of("conv.lora_B.weight", 6, 2), of("conv.lora_A.weight", 2, 36)),
        "model.layers.0.q_proj.weight": (
            of("layers.0.q_proj.lora_B.weight", 8, 2),
            of("layers.0.q_proj.lora_A.weight", 2, 8),
        ),
        "model.layers.0.q_proj.bias": (
            of("layers.0.q_proj.lora_B.bias", 8, 1),
            np.ones((1, 1)),
        ),
    }
    for name, (left, right) in expected.items():
        assert_same(after[name], merged_exactly(stored[name], [(left, right, 1.5, 1.0)], "BF16"))


def test_shares_of_parameters_that_were_trained_whole(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=MODULES, dtype="BF16")
    own = tensor(np.random.default_rng(3).normal(size=MODULES[UP]))
    only = {Q: MODULES[Q]}
    tensors = adapter_tensors(only) | {f"{PREFIX}{UP}.weight": own}
    settings = {"modules_to_save": ["up_proj"], "target_modules": ["q_proj"]}
    saved = make_adapter(tmp_path / "a", tensors, **settings)
    plain = make_adapter(tmp_path / "b", adapter_tensors(MODULES, seed=9), lora_alpha=3)
    both = [saved, plain]
    lorafast.merge(base, both, tmp_path / "out", weights=[0.3, 1.7], precision="exact", sync=False)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    name = f"{UP}.weight"
    products = [(*factors(plain, UP), 0.75, 1.7)]
    expected = merged_exactly(before[name], products, "BF16", [(0.3, own)])
    assert_same(after[name], expected)
    lorafast.merge(base, both, tmp_path / "whole", precision="exact", sync=False)
    products = [(*factors(plain, UP), 0.75, 1.0)]
    found = read_checkpoint(tmp_path / "whole")[name]
    assert_same(found, merged_exactly(own, products, found.dtype))


def digests(output: Path) -> dict[str, str]:
    files = sorted(output.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights_of(output: Path) -> dict[str, Tensor]:
    return dict(read_checkpoint(output))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rank", [5, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_the_same_bytes_by_every_path(tmp_path: Path, dtype: str, rank: int) -> None:
    modules = {"model.layers.0.q_proj": (203, 133), "model.layers.0.up_proj": (37, 303)}
    base = make_base(tmp_path / "base", modules=modules, dtype=dtype, shards=2)
    cut_anew = make_base(tmp_path / "cut anew", modules=modules, dtype=dtype)
    adapters = [
        make_adapter(tmp_path / "a", adapter_tensors(modules, rank=rank), r=rank, lora_alpha=7),
        make_adapter(tmp_path / "b", coarse(modules, "BF16", 1), r=4, lora_alpha=4),
    ]
    report = lorafast.merge(base, adapters, tmp_path / "out", precision="exact", sync=False)
    expected = digests(tmp_path / "out")
    assert report.shard_sha256 == expected
    plan = lorafast.plan(base, adapters, precision="exact")
    for instruction_set in SETS:
        for threads in (1, 2, 7):
            options = {"threads": threads, "instruction_set": instruction_set, "overwrite": True}
            lock = plan.core.execute(tmp_path / "again", options)[1]
            assert not lock.release()
            assert digests(tmp_path / "again") == expected, (instruction_set, threads)
    lorafast.merge(cut_anew, adapters, tmp_path / "one", precision="exact", sync=False)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "out")
    with lorafast.open_merged(base, adapters, framework="numpy", precision="exact") as view:
        rows = view.get_slice("model.layers.0.q_proj.weight")[3:7] if dtype != "BF16" else None
    if rows is not None:
        found = weights_of(tmp_path / "out")["model.layers.0.q_proj.weight"].float64()[3:7]
        assert (np.asarray(rows, dtype=np.float64) == found).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_torch_makes_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("torch")
    modules = {"model.layers.0.q_proj": (203, 133), "model.layers.0.up_proj": (37, 303)}
    base = make_base(tmp_path / "base", modules=modules, dtype=dtype)
    adapters = [
        make_adapter(tmp_path / "a", adapter_tensors(modules, rank=5), r=5, lora_alpha=7),
        make_adapter(tmp_path / "b", coarse(modules, "BF16", 1), r=4, lora_alpha=4),
    ]
    settings: dict[str, Any] = {"precision": "exact", "sync": False}
    lorafast.merge(base, adapters, tmp_path / "cpu", **settings)
    report = lorafast.merge(base, adapters, tmp_path / "torch", device="torch:cpu", **settings)
    assert digests(tmp_path / "torch") == digests(tmp_path / "cpu")
    assert not report.fallbacks
    assert report.recomputed is not None
    assert report.recomputed["near_ties"] > 0


def merge_small(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = make_base(tmp_path / "base", modules=MODULES, dtype="BF16", shards=2)
    adapter = make_adapter(tmp_path / "a", adapter_tensors(MODULES))
    output = tmp_path / "out"
    lorafast.merge(base, adapter, output, precision="exact", sync=False, verify=True)
    return base, adapter, output


def test_one_bit_is_not_the_merge(tmp_path: Path) -> None:
    base, adapter, output = merge_small(tmp_path)
    assert lorafast.verify(base, adapter, output, precision="exact").ok
    shard = next(
        path
        for path in sorted(output.glob("*.safetensors"))
        if f"{Q}.weight" in path.read_text("latin-1")
    )
    content = bytearray(shard.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + header[f"{Q}.weight"]["data_offsets"][0]
    content[start + 2 * 40] ^= 1
    shard.write_bytes(content)
    found = lorafast.verify(base, adapter, output, precision="exact")
    assert not found.ok
    assert f"tensor {Q}.weight: row 1, column 3: is " in found.problems[0]
    assert "to which the exact sum is rounded" in found.problems[0]


def test_digests_prove_a_merge_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, output = merge_small(tmp_path)
    report = shutil.copy(output / "merge_report.json", tmp_path / "told.json")
    shutil.rmtree(output)
    found = lorafast.verify(base, adapter, report, digests=True)
    assert found.ok
    assert found.tensors_merged == len(MODULES)
    other = lorafast.verify(base, adapter, report, digests=True, weights=[0.5])
    assert not other.ok
    assert "its SHA-256 is" in other.problems[0]
    inputs = ["--base", str(base), "--adapters", str(adapter), "--merged", str(report)]
    assert main(["verify", *inputs, "--digests"]) == 0
    assert "The merge is right" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no such report; give the merge_report\.json"):
        lorafast.verify(base, adapter, tmp_path / "nowhere.json", digests=True)
    lorafast.merge(base, adapter, tmp_path / "plain", sync=False)
    with pytest.raises(ValueError, match=r"no digests of shards, .*--precision exact"):
        lorafast.verify(base, adapter, tmp_path / "plain", digests=True)


def test_the_default_has_other_bytes_and_no_digests(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=MODULES, dtype="F32")
    adapter = make_adapter(tmp_path / "a", adapter_tensors(MODULES))
    report = lorafast.merge(base, adapter, tmp_path / "out", sync=False)
    assert (report.precision, report.recomputed, report.shard_sha256) == ("default", None, None)
    lorafast.merge(base, adapter, tmp_path / "exact", sync=False, precision="exact")
    assert weights_of(tmp_path / "exact") != weights_of(tmp_path / "out")
    # A merge in float32 is right within its bound, and is not the exact one.
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    assert not lorafast.verify(base, adapter, tmp_path / "out", precision="exact").ok


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strategy": "ties"}, "the strategy ties decides by values"),
        ({"strategy": "slerp"}, "the strategy slerp finds its coefficients by values"),
        ({"compat": "peft"}, "compat asks for the roundings of PEFT"),
        ({"precision": "best"}, "unknown precision"),
    ],
)
def test_what_is_no_definition_is_refused(
    tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    base = make_base(tmp_path / "base", modules=MODULES)
    adapters = [
        make_adapter(tmp_path / name, adapter_tensors(MODULES, seed=seed))
        for seed, name in enumerate("ab")
    ]
    with pytest.raises(ValueError, match=message):
        lorafast.plan(base, adapters, **({"precision": "exact"} | asked))


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=MODULES)
    magnitudes = {
        f"{PREFIX}{module}.lora_magnitude_vector": tensor(np.ones(rows))
        for module, (rows, _) in MODULES.items()
    }
    tensors = adapter_tensors(MODULES) | magnitudes
    adapter = make_adapter(tmp_path / "a", tensors, use_dora=True)
    with pytest.raises(
        lorafast.UnsupportedAdapterError,
        match=r'precision="exact" rounds sums .* DoRA\'s norms, which are square roots \(.*q_proj',
    ):
        lorafast.merge(base, adapter, tmp_path / "out", precision="exact")
    assert not (tmp_path / "out").exists()


def near_ties(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A merge whose sums are half way between two numbers, and next to nothing beside it."""
    step = np.array([0.0, 2.0**-60, -(2.0**-60), 2.0**-40, -(2.0**-40), 2.0**-20] * 6)
    units = 1.0 + 2.0**-7 * (np.arange(36) // 6)
    modules = {Q: (1, 36)}
    base = make_base(tmp_path / "base", modules=modules, dtype="BF16")
    weight = tensor(units[None], "BF16")
    write_safetensors(base / "model.safetensors", {f"{Q}.weight": weight})
    tensors = {
        f"{PREFIX}{Q}.lora_A.weight": tensor(np.stack([np.full(36, 2.0**-8), step])),
        f"{PREFIX}{Q}.lora_B.weight": tensor(np.array([[1.0, 1.0]])),
    }
    adapter = make_adapter(tmp_path / "a", tensors, r=2, lora_alpha=2, target_modules=["q_proj"])
    products = [(*factors(adapter, Q), 1.0, 1.0)]
    return base, adapter, merged_exactly(weight, products, "BF16")


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_next_to_nothing_beside_a_tie_decides(tmp_path: Path, device: str) -> None:
    base, adapter, expected = near_ties(tmp_path)
    report = lorafast.merge(
        base, adapter, tmp_path / "out", precision="exact", device=device, sync=False
    )
    assert_same(read_checkpoint(tmp_path / "out")[f"{Q}.weight"], expected)
    assert report.recomputed is not None
    assert report.recomputed["near_ties"] >= 30
    assert 18 <= report.recomputed["in_integers"] <= 30


def test_without_bounds_it_would_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = pytest.importorskip("lorafast._torch.exact")
    base, adapter, expected = near_ties(tmp_path)
    for name in ("UNIT", "UNIT_OF_SINGLE", "FLOOR", "FLOOR_OF_SINGLE"):
        monkeypatch.setattr(exact, name, 0.0)
    lorafast.merge(
        base, adapter, tmp_path / "out", precision="exact", device="torch:cpu", sync=False
    )
    found = read_checkpoint(tmp_path / "out")[f"{Q}.weight"].float64()
    assert (bits(found) != bits(expected)).sum() >= 6
