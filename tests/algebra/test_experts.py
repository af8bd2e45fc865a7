"""Parameters that hold a matrix for each expert: combined, resized and baked expert by expert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from support.dense_methods import dare, iso_c, knots, ties, truncated, tsv_m, uniform
from support.files import read_checkpoint, tensor
from support.handmade import make_base
from support.reference import PREFIX

Array = npt.NDArray[Any]

EXPERTS, HIDDEN, WIDTH = 3, 20, 12
AT = "model.layers.0.mlp.experts"
#: The parameters and the keys of PEFT's wrappers, the first one innermost.
SHAPES = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
KEYS = {"gate_up_proj": f"{PREFIX}{AT}.base_layer", "down_proj": f"{PREFIX}{AT}"}


def make(
    path: Path, rank: int, seed: int, *, scale: float = 2.0, dtype: Any = np.float32, true: int = 0
) -> tuple[Path, dict[str, Array]]:
    """An adapter of `target_parameters`, and ΔW of each parameter, (experts, out, in)."""
    random = np.random.default_rng(seed)
    tensors, deltas = {}, {}
    for name, (outputs, inputs) in SHAPES.items():
        a = random.standard_normal((EXPERTS, rank, inputs)).astype(dtype)
        b = random.standard_normal((EXPERTS, outputs, rank)).astype(dtype)
        if true:
            # Ranks that differ from expert to expert.
            for index in range(EXPERTS):
                b[index, :, true + index :] = 0
        deltas[name] = scale * np.matmul(b.astype(np.float64), a.astype(np.float64))
        tensors[f"{KEYS[name]}.lora_A.weight"] = a.reshape(-1, inputs)
        tensors[f"{KEYS[name]}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(outputs, -1).copy()
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": [],
        "target_parameters": [f"{AT}.{name}" for name in SHAPES],
        "peft_version": "0.19.1",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, deltas


def read(path: Path) -> dict[str, Array]:
    """ΔW of each parameter of a PEFT adapter, by PEFT's own layout."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    found = {}
    for name, key in KEYS.items():
        if f"{key}.lora_A.weight" not in tensors:
            continue
        a = tensors[f"{key}.lora_A.weight"].astype(np.float64)
        b = tensors[f"{key}.lora_B.weight"].astype(np.float64)
        rank = len(a) // EXPERTS
        pattern = config["rank_pattern"].get(f"^{AT}.{name}$".replace(".", "\\."), config["r"])
        assert rank == pattern
        alphas = config["alpha_pattern"]
        alpha = alphas.get(f"^{AT}.{name}$".replace(".", "\\."), config["lora_alpha"])
        scale = alpha / (np.sqrt(rank) if config["use_rslora"] else rank)
        a = a.reshape(EXPERTS, rank, -1)
        b = b.reshape(len(b), rank, EXPERTS).transpose(2, 0, 1)
        found[name] = scale * np.matmul(b, a)
    return found


def make_model(path: Path) -> Path:
    random = np.random.default_rng(12)
    others = {
        f"{AT}.{name}": tensor(random.normal(size=(EXPERTS, *shape)), "F32")
        for name, shape in SHAPES.items()
    }
    return make_base(path, modules={}, others=others, config={"model_type": "qwen3_moe"})


def assert_near(found: dict[str, Array], wanted: dict[str, Array], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error < tolerance, (name, error)


def slerp(one: Array, other: Array, t: float) -> Array:
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    angle = np.arccos((one * other).sum() / norms)
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)


def projection(one: Array, other: Array) -> Array:
    return one - (one * other).sum() / (other * other).sum() * other


Method = Callable[[Array, Array, str], Array]
#: Methods with their options and what they make of one expert's updates, and whether of full rank.
CASES: dict[str, tuple[str, dict[str, Any], list[float] | None, Method, bool]] = {
    "linear": ("linear", {}, [1.0, -0.5], lambda x, y, _: x - 0.5 * y, False),
    "normalized": ("normalized", {}, [3.0, 1.0], lambda x, y, _: 0.75 * x + 0.25 * y, False),
    "slerp": ("slerp", {"t": 0.25}, None, lambda x, y, _: slerp(x, y, 0.25), False),
    "projection": ("projection", {}, None, lambda x, y, _: projection(x, y), False),
    "tsv_m": ("tsv_m", {}, None, lambda x, y, _: tsv_m([x, y], [1, 1]), False),
    "iso_c": ("iso_c", {}, None, lambda x, y, _: iso_c(x + y), False),
    "knots": (
        "knots",
        {"merge": "ties", "density": 0.5},
        None,
        lambda x, y, _: knots([x, y], lambda both: ties(both, [1, 1], 0.5)),
        False,
    ),
    "ties": ("ties", {"density": 0.5}, None, lambda x, y, _: ties([x, y], [1, 1], 0.5), True),
    "dare_linear": (
        "dare_linear",
        {"density": 0.5},
        None,
        lambda x, y, name: (
            dare(x, 0.5, uniform(7, name, 0, x.shape)) + dare(y, 0.5, uniform(7, name, 1, y.shape))
        ),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_expert_is_combined_by_itself(tmp_path: Path, case: str) -> None:
    method, options, weights, function, is_full = CASES[case]
    one, deltas = make(tmp_path / "1", 2, 1)
    two, others = make(tmp_path / "2", 3, 2, scale=0.5)
    rank = WIDTH if is_full else None
    report = lorafast.combine(
        [one, two],
        tmp_path / "out",
        method=method,  # type: ignore[arg-type]
        options=options,
        weights=weights,
        rank=rank,
        seed=7,
    )
    assert report.ranks == {f"{AT}.{name}": WIDTH if is_full else 5 for name in SHAPES}
    wanted = {}
    for name in SHAPES:
        key = KEYS[name].removeprefix(PREFIX)
        own = [
            function(deltas[name][index], others[name][index], f"{key}.{index}")
            for index in range(EXPERTS)
        ]
        wanted[name] = np.stack([truncated(each, rank) if rank else each for each in own])
    assert_near(read(tmp_path / "out"), wanted, 3e-6)
    for name, shape in SHAPES.items():
        record = report.modules[f"{AT}.{name}"]
        assert record.shape == shape
        assert record.expert_ranks == (record.rank,) * EXPERTS


MERGED: list[tuple[str, dict[str, Any], list[float] | None]] = [
    ("linear", {}, [1.0, -0.5]),
    ("slerp", {"t": 0.25}, None),
    ("karcher", {}, None),
    ("multislerp", {}, None),
    ("model_stock", {}, None),
    ("projection", {}, None),
    ("ties", {"density": 0.5}, [1.0, 0.5]),
    ("dare_ties", {"density": 0.7}, None),
    ("della", {"density": 0.5, "epsilon": 0.2}, None),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}, None),
    ("sce", {"select_topk": 0.5}, None),
]


@pytest.mark.parametrize(("method", "options", "weights"), MERGED, ids=[one[0] for one in MERGED])
def test_the_merged_combination_is_the_merge(
    tmp_path: Path, method: Any, options: dict[str, Any], weights: list[float] | None
) -> None:
    base = make_model(tmp_path / "base")
    adapters = [make(tmp_path / str(seed), 3, seed)[0] for seed in (1, 2)]
    is_sum = method in ("linear", "slerp", "karcher", "multislerp", "model_stock", "projection")
    lorafast.combine(
        adapters,
        tmp_path / "both",
        method=method,
        options=options,
        weights=weights,
        rank=None if is_sum else HIDDEN,
        seed=7,
    )
    lorafast.merge(base, tmp_path / "both", tmp_path / "one")
    lorafast.merge(
        base,
        adapters,
        tmp_path / "two",
        strategy=method,
        strategy_options=options,
        weights=weights,
        seed=7,
    )
    before = read_checkpoint(base)
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    for name in SHAPES:
        update = two[f"{AT}.{name}"].float64() - before[f"{AT}.{name}"].float64()
        off = one[f"{AT}.{name}"].float64() - two[f"{AT}.{name}"].float64()
        assert np.linalg.norm(update) > 1
        assert np.linalg.norm(off) / np.linalg.norm(update) < 3e-6


@pytest.mark.parametrize("rule", [2, "energy:0.9", "error:0.3", "auto", "budget:ranks=5"])
def test_experts_are_cut_by_themselves_to_one_rank(tmp_path: Path, rule: int | str) -> None:
    adapter, deltas = make(tmp_path / "a", 6, 3, true=2)
    report = lorafast.resize(adapter, tmp_path / "out", rank=rule)
    wanted, ranks = {}, {}
    spectra = {
        name: np.array([np.linalg.svd(each, compute_uv=False) for each in delta])
        for name, delta in deltas.items()
    }
    if str(rule).startswith("budget"):
        # Of one more triplet of every expert of one parameter.
        worth = [(value, name) for name, s in spectra.items() for value in (s**2).sum(axis=0)]
        best = [name for _, name in sorted(worth, reverse=True)[:5]]
    for name, delta in deltas.items():
        own = []
        for index, values in enumerate(spectra[name]):
            energy = np.cumsum(values**2) / np.sum(values**2)
            match rule:
                case 2:
                    own.append(2)
                case "energy:0.9":
                    own.append(int(np.argmax(energy >= 0.9)) + 1)
                case "error:0.3":
                    own.append(int(np.argmax(energy >= 1 - 0.09)) + 1)
                case "auto":
                    own.append(2 + index)
                case _:
                    own.append(best.count(name))
        ranks[f"{AT}.{name}"] = max(own)
        wanted[name] = np.stack(
            [truncated(each, rank) for each, rank in zip(delta, own, strict=True)]
        )
        record = report.modules[f"{AT}.{name}"]
        assert record.expert_ranks == tuple(own)
        lost = np.linalg.norm(wanted[name] - delta) / np.linalg.norm(delta)
        assert record.error == pytest.approx(lost, abs=1e-6)
        assert record.norm == pytest.approx(np.linalg.norm(delta), rel=1e-12)
    assert report.ranks == ranks
    found = read(tmp_path / "out")
    assert_near(found, wanted)
    extents = sum(EXPERTS * (m + n) * ranks[f"{AT}.{name}"] * 4 for name, (m, n) in SHAPES.items())
    assert report.bytes == extents
    if report.budget is not None:
        assert (report.budget.spent, report.budget.gap) == (5, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "fold"},
        {"alpha": 1.0},
        {"rslora": True},
        {"pad_to": 8},
        {"gauge": "balanced"},
        {"gauge": "orthonormal"},
    ],
    ids=str,
)
def test_baking_keeps_every_expert(tmp_path: Path, options: dict[str, Any]) -> None:
    adapter, deltas = make(tmp_path / "a", 3, 5)
    report = lorafast.bake(adapter, tmp_path / "out", **options)
    assert_near(read(tmp_path / "out"), deltas, 1e-6)
    assert report.ranks == {f"{AT}.{name}": 8 if "pad_to" in options else 3 for name in SHAPES}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    if "scale" in options:
        assert config["lora_alpha"] == config["r"]
    if "alpha" in options:
        assert config["lora_alpha"] == 1.0
    if options.get("gauge") == "orthonormal":
        tensors = load_file(tmp_path / "out/adapter_model.safetensors")
        a = tensors[f"{KEYS['down_proj']}.lora_A.weight"].reshape(EXPERTS, 3, -1)
        for each in a.astype(np.float64):
            gram = each @ each.T
            assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-5 * gram.max()


@pytest.mark.parametrize("to", ["mlx", "tinker"])
def test_other_formats_take_them(tmp_path: Path, to: Any) -> None:
    base = make_model(tmp_path / "base")
    one, two = make(tmp_path / "1", 2, 1)[0], make(tmp_path / "2", 3, 2)[0]
    lorafast.combine([one, two], tmp_path / "there", to=to, base=base)
    lorafast.combine([one, two], tmp_path / "here")
    lorafast.merge(base, tmp_path / "there", tmp_path / "a")
    lorafast.merge(base, tmp_path / "here", tmp_path / "b")
    first, second = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    for name in SHAPES:
        np.testing.assert_allclose(
            first[f"{AT}.{name}"].float64(), second[f"{AT}.{name}"].float64(), atol=1e-5
        )
    # And an adapter of one format beside one of another.
    lorafast.convert(two, tmp_path / "other", to=to, base=base)
    lorafast.combine([one, tmp_path / "other"], tmp_path / "mixed", base=base)
    lorafast.merge(base, tmp_path / "mixed", tmp_path / "c")
    third = read_checkpoint(tmp_path / "c")
    for name in SHAPES:
        np.testing.assert_allclose(
            third[f"{AT}.{name}"].float64(), second[f"{AT}.{name}"].float64(), atol=1e-5
        )


def test_threads_do_not_matter(tmp_path: Path) -> None:
    adapters = [make(tmp_path / str(seed), 3, seed, true=1)[0] for seed in (1, 2)]
    for threads in (1, 3):
        lorafast.combine(adapters, tmp_path / f"out{threads}", rank="energy:0.8", threads=threads)
    one, other = (
        (tmp_path / f"out{threads}/adapter_model.safetensors").read_bytes() for threads in (1, 3)
    )
    assert one == other


def test_an_older_layout_is_refused_by_name(tmp_path: Path) -> None:
    adapter, _ = make(tmp_path / "a", 2, 1)
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace("0.19.1", "0.18.0"))
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"before 0\.19\.1"):
        lorafast.resize(adapter, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
