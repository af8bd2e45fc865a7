"""Strategies that merge element by element, against dense NumPy and PEFT's own functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support.files import read_checkpoint, snapshot, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base, write_checkpoint
from support.reference import PREFIX

Array = NDArray[np.float64]

REPORTS = {"README.md", "merge_report.json", "merge_report.md"}
MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15

P = np.array([[-14, -1, 9], [-4, -22, -10], [-13, -5, 6], [12, 28, 8]], float)
Q = np.array([[-4, 10, 6], [20, -14, -18], [-13, 1, 9], [17, -11, -15]], float)
FACTORS = {
    "P": ([[-3, 2], [-2, -4], [-3, 1], [4, 4]], [[4, 3, -1], [-1, 4, 3]]),
    "Q": ([[-4, 2], [4, 2], [1, -4], [3, 2]], [[3, -3, -3], [4, -1, -3]]),
}


# The methods, written again from their definitions.


def mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def uniform(seed: int, module: str, ordinal: int, count: int) -> Array:
    """The numbers of a tensor's elements, in their order."""
    digest = 0xCBF29CE484222325
    for byte in f"{module}#{ordinal}".encode():
        digest = ((digest ^ byte) * 0x100000001B3) & MASK
    key = mix((seed + STEP) & MASK) ^ digest
    numbers = [mix((key + (index + 1) * STEP) & MASK) >> 11 for index in range(count)]
    return np.array(numbers, float) * 2.0**-53


def largest(values: Array, count: int) -> NDArray[np.bool_]:
    """A mask of the largest magnitudes, of equal ones the first."""
    keys = np.abs(values.ravel().astype(np.float32))
    order = np.lexsort((np.arange(keys.size), -keys.astype(float)))
    mask = np.zeros(keys.size, bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)


def trim_largest(values: Array, options: Mapping[str, Any], _: Array) -> Array:
    kept = largest(values, int(options.get("density", 1) * values.size))
    return np.where(kept, values, 0)


def trim_middle(values: Array, options: Mapping[str, Any], _: Array) -> Array:
    count = int(options.get("density", 1) * values.size)
    top = min(int(options.get("gamma", 0.01) * values.size), values.size - count)
    kept = largest(values, top + count) & ~largest(values, top)
    return np.where(kept, values, 0)


def trim_random(values: Array, options: Mapping[str, Any], numbers: Array) -> Array:
    density = options.get("density", 1)
    return np.where(numbers.reshape(values.shape) < density, values / density, 0)


def trim_ranked(values: Array, options: Mapping[str, Any], numbers: Array) -> Array:
    density, epsilon = options["density"], options.get("epsilon", 0.15)
    keys = np.abs(values.astype(np.float32))
    ranks = np.empty(values.shape)
    for row, key in enumerate(keys):
        ranks[row, np.lexsort((-np.arange(key.size), key))] = np.arange(key.size)
    chances = density - epsilon + 2 * epsilon * ranks / (values.shape[1] - 1)
    return np.where(numbers.reshape(values.shape) < chances, values / chances, 0)


def elect(kept: list[Array], weights: list[float], options: Mapping[str, Any]) -> Array:
    terms = np.array([weight * values for weight, values in zip(weights, kept, strict=True)])
    sign = np.where(terms.sum(0) >= 0, 1.0, -1.0)
    agree = terms * sign > 0
    total = np.where(agree, terms, 0).sum(0)
    share = np.where(agree, np.abs(np.array(weights))[:, None, None], 0).sum(0)
    divide = options.get("normalize", True)
    return total / np.where(share > 0, share, 1) if divide else np.asarray(total)


def add(kept: list[Array], weights: list[float], _: Mapping[str, Any]) -> Array:
    return np.asarray(sum(weight * values for weight, values in zip(weights, kept, strict=True)))


def sce(updates: list[Array], options: Mapping[str, Any]) -> Array:
    stack = np.array(updates)
    spread = np.sqrt(((stack - stack.mean(0)) ** 2).mean(0)).astype(np.float32)
    share = options.get("select_topk", 1.0)
    if share < 1:
        stack = stack * largest(spread.astype(float), int(share * np.count_nonzero(spread)))
    squares = (stack**2).mean((1, 2))
    weights = squares / squares.sum()
    sign = np.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = np.where(stack * sign > 0, weights[:, None, None], 0)
    return np.asarray((agree * stack).sum(0) / np.where(agree.sum(0) > 0, agree.sum(0), 1))


Trim = Callable[[Array, Mapping[str, Any], Array], Array]
METHODS: dict[str, tuple[Trim, Callable[..., Array]]] = {
    "ties": (trim_largest, elect),
    "dare_linear": (trim_random, add),
    "dare_ties": (trim_random, elect),
    "della": (trim_ranked, elect),
    "della_linear": (trim_ranked, add),
    "breadcrumbs": (trim_middle, add),
    "breadcrumbs_ties": (trim_middle, elect),
    "magnitude_prune": (trim_largest, add),
}


def merged_update(
    module: str,
    updates: list[Array | None],
    name: str,
    options: Mapping[str, Any],
    *,
    weights: list[float],
    seed: int,
) -> Array:
    """What a method makes of the updates of one tensor; `None` where an adapter has none."""
    present = [values for values in updates if values is not None]
    if name == "sce":
        result = sce([np.zeros_like(present[0]) if u is None else u for u in updates], options)
        return result * options.get("lambda", 1.0)
    trim, join = METHODS[name]
    kept = [
        trim(values, options, uniform(seed, module, ordinal, values.size))
        for ordinal, values in enumerate(updates)
        if values is not None
    ]
    own = [weight for weight, values in zip(weights, updates, strict=True) if values is not None]
    return join(kept, own, options) * options.get("lambda", 1.0)


def make_adapters(folder: Path) -> tuple[list[Path], list[dict[str, Array]]]:
    """Adapters of different ranks, scales and modules, and their updates in float64."""
    some = dict(list(MODULES.items())[1:3])
    kinds = [
        (adapter_tensors(rank=4, seed=1), {"r": 4, "lora_alpha": 8}, 2.0),
        (adapter_tensors(some, rank=7, seed=2), {"r": 7, "lora_alpha": 3.5}, 0.5),
        (adapter_tensors(rank=33, dtype="F16", seed=3), {"r": 33, "lora_alpha": 33}, 1.0),
    ]
    paths, updates = [], []
    for number, (tensors, settings, scale) in enumerate(kinds):
        paths.append(make_adapter(folder / f"adapter-{number}", tensors, **settings))
        own = {}
        for module in MODULES:
            if f"{PREFIX}{module}.lora_A.weight" in tensors:
                a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
                b = tensors[f"{PREFIX}{module}.lora_B.weight"].float64()
                own[module] = scale * (b @ a)
        updates.append(own)
    return paths, updates


def model_bytes(output: Path) -> dict[str, str]:
    """The hashes of everything but the reports, which hold times and paths."""
    return {name: value for name, value in snapshot(output).items() if name not in REPORTS}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.2, "normalize": False}),
    ("ties", {}),
    ("magnitude_prune", {"density": 0.3, "lambda": 0.5}),
    ("dare_linear", {"density": 0.4}),
    ("dare_ties", {"density": 0.7}),
    ("della", {"density": 0.5, "epsilon": 0.2}),
    ("della_linear", {"density": 0.5}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.3}),
    ("sce", {"select_topk": 0.5}),
    ("sce", {}),
]


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_against_dense_updates(
    tmp_path: Path, name: str, options: dict[str, Any], dtype: str
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shards=2)
    adapters, updates = make_adapters(tmp_path)
    given = None if name == "sce" else [1.0, -0.5, 0.8]
    arguments: dict[str, Any] = {
        "strategy": name,
        "strategy_options": options,
        "seed": 5,
        "weights": given,
    }
    lorafast.merge(base, adapters, tmp_path / "out", **arguments)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for module in MODULES:
        own = [each.get(module) for each in updates]
        change = merged_update(module, own, name, options, weights=given or [1.0] * 3, seed=5)
        wanted = before[f"{module}.weight"].float64() + change
        found = after[f"{module}.weight"].float64()
        assert np.abs(change).max() > 0.01
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    name = "model.norm.weight"
    assert after[name].data == before[name].data
    for full in (False, True):
        proof = lorafast.verify(base, adapters, tmp_path / "out", full=full, **arguments)
        assert proof.ok, proof.problems
    assert not lorafast.verify(base, adapters, tmp_path / "out", weights=[0.9, -0.5, 0.8]).ok


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_what_is_stored_is_the_sum_rounded_once(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapters, updates = make_adapters(tmp_path)
    options = {"density": 0.5}
    arguments: dict[str, Any] = {"strategy": "ties", "strategy_options": options}
    lorafast.merge(base, adapters, tmp_path / "out", **arguments)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    digits = {"BF16": 8, "F16": 11}[dtype]
    for module in MODULES:
        own = [each.get(module) for each in updates]
        change = merged_update(module, own, "ties", options, weights=[1.0] * 3, seed=0)
        wanted = before[f"{module}.weight"].float64() + change
        found = after[f"{module}.weight"].float64()
        assert (np.abs(found - wanted) <= 2.0**-digits * np.abs(wanted) * 1.001 + 1e-6).all()
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **arguments).ok


def toys(tmp_path: Path, **config: Any) -> tuple[Path, list[Path]]:
    """P and Q on a weight of zeros, so that what is written is what was merged."""
    base = tmp_path / "base"
    make_base(base, modules={"layer.proj": (4, 3)})
    write_checkpoint(base, {"layer.proj.weight": tensor(np.zeros((4, 3)), "F32")})
    adapters = []
    for name, (b, a) in FACTORS.items():
        tensors = {
            f"{PREFIX}layer.proj.lora_A.weight": tensor(np.array(a, float), "F32"),
            f"{PREFIX}layer.proj.lora_B.weight": tensor(np.array(b, float), "F32"),
        }
        settings = {"r": 2, "lora_alpha": 2, "target_modules": ["proj"]} | config
        adapters.append(make_adapter(tmp_path / name, tensors, **settings))
    return base, adapters


@pytest.mark.parametrize(
    ("options", "weights", "wanted"),
    [
        ({}, [1, 1], [[-14, 0, 0], [20, -18, -14], [-13, 0, 0], [29 / 2, 28, -15]]),
        (
            {"normalize": False},
            [1, 1],
            [[-14, 0, 0], [20, -36, -28], [-26, 0, 0], [29, 28, -15]],
        ),
        (
            {},
            [0.25, 1],
            [[-14, 0, 0], [20, -78 / 5, -82 / 5], [-13, 0, 0], [16, 28, -15]],
        ),
        # mergekit divides by the sum of negative weights, and keeps Q's own signs (+20, -15).
        ({}, [1, -0.5], [[-14, 0, 0], [-20, -22, -10], [-13, 0, 0], [12, 28, 15]]),
    ],
)
def test_ties_of_the_toys_is_exact(
    tmp_path: Path, options: dict[str, Any], weights: list[float], wanted: list[list[float]]
) -> None:
    base, adapters = toys(tmp_path)
    options = {"density": 0.5, **options}
    lorafast.merge(
        base,
        adapters,
        tmp_path / "out",
        strategy="ties",
        strategy_options=options,
        weights=weights,
    )
    found = read_checkpoint(tmp_path / "out")["layer.proj.weight"].float64()
    assert np.array_equal(found, np.array(wanted, np.float32))


def test_breadcrumbs_and_sce_of_the_toys(tmp_path: Path) -> None:
    base, adapters = toys(tmp_path)
    options = {"density": 0.5, "gamma": 0.25}
    lorafast.merge(
        base, adapters[0], tmp_path / "b", strategy="breadcrumbs", strategy_options=options
    )
    found = read_checkpoint(tmp_path / "b")["layer.proj.weight"].float64()
    assert found.tolist() == [[0, 0, 9], [0, 0, -10], [-13, 0, 6], [12, 0, 8]]
    lorafast.merge(
        base, adapters, tmp_path / "s", strategy="sce", strategy_options={"select_topk": 0.5}
    )
    found = read_checkpoint(tmp_path / "s")["layer.proj.weight"].float64()
    wanted = [[-9.5174206968, 10, 0], [20, 0, 0], [0, 0, 0], [0, 28, -15]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_equal_magnitudes_are_kept_in_their_order(tmp_path: Path) -> None:
    """An update of one magnitude, of which exactly k elements are kept."""
    base = make_base(tmp_path / "base", modules={"layer.proj": (40, 30)})
    tensors = {
        f"{PREFIX}layer.proj.lora_A.weight": tensor(np.ones((1, 30)), "F32"),
        f"{PREFIX}layer.proj.lora_B.weight": tensor(np.ones((40, 1)), "F32"),
    }
    settings: dict[str, Any] = {"r": 1, "lora_alpha": 1, "target_modules": ["proj"]}
    adapter = make_adapter(tmp_path / "adapter", tensors, **settings)
    options = {"density": 0.37}
    lorafast.merge(
        base, adapter, tmp_path / "out", strategy="magnitude_prune", strategy_options=options
    )
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    change = after["layer.proj.weight"].float64() - before["layer.proj.weight"].float64()
    wanted = np.arange(1200) < int(0.37 * 1200)
    assert np.array_equal(change.ravel() > 0.5, wanted)


@pytest.mark.parametrize(("name", "options"), [CASES[0], CASES[4], CASES[6], CASES[8], CASES[10]])
def test_bytes_depend_on_no_threads_tiles_or_shards(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    # Tiles of 512 KiB: a weight of several.
    modules = {"model.layers.0.mlp.up_proj": (700, 520), "model.layers.1.mlp.up_proj": (9, 520)}
    whole = make_base(tmp_path / "whole", modules=modules, seed=4)
    cut = make_base(tmp_path / "cut", modules=modules, seed=4, shards=3)
    adapters = [
        make_adapter(tmp_path / f"adapter-{seed}", adapter_tensors(modules, rank=seed, seed=seed))
        for seed in (2, 4)
    ]
    for adapter, rank in zip(adapters, (2, 4), strict=True):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
    arguments: dict[str, Any] = {"strategy": name, "strategy_options": options, "seed": 3}
    seen = []
    for threads in (1, 2, 7):
        output = tmp_path / f"out-{threads}"
        lorafast.merge(whole, adapters, output, threads=threads, **arguments)
        seen.append(model_bytes(output))
    assert seen[0] == seen[1] == seen[2]
    lorafast.merge(cut, adapters, tmp_path / "out-cut", threads=2, **arguments)
    one, other = read_checkpoint(tmp_path / "out-1"), read_checkpoint(tmp_path / "out-cut")
    assert {name: value.data for name, value in one.items()} == {
        name: value.data for name, value in other.items()
    }
    # The whole in NumPy, over the ends of tiles.
    module = "model.layers.0.mlp.up_proj"
    updates = []
    for rank in (2, 4):
        tensors = adapter_tensors(modules, rank=rank, seed=rank)
        a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
        b = tensors[f"{PREFIX}{module}.lora_B.weight"].float64()
        updates.append(8 / rank * (b @ a))
    change = merged_update(module, list(updates), name, options, weights=[1.0] * 2, seed=3)
    before = read_checkpoint(whole)[f"{module}.weight"].float64()
    found = one[f"{module}.weight"].float64()
    # Of elements within a rounding of a threshold, either is right.
    assert np.mean(np.abs(found - before - change) > 1e-5) < 1e-4


def test_a_seed_decides_what_is_kept(tmp_path: Path) -> None:
    base, adapters = toys(tmp_path)
    options = {"density": 0.5}

    def run(name: str, seed: int) -> list[list[float]]:
        lorafast.merge(
            base,
            adapters[:1],
            tmp_path / name,
            strategy="dare_linear",
            strategy_options=options,
            seed=seed,
        )
        found: list[list[float]] = (
            read_checkpoint(tmp_path / name)["layer.proj.weight"].float64().tolist()
        )
        return found

    first = run("one", 42)
    assert first == run("two", 42) != run("three", 43)
    kept = uniform(42, "layer.proj", 0, 12).reshape(4, 3) < 0.5
    assert first == np.where(kept, 2 * P, 0).tolist()


def test_as_peft_trims_and_merges(tmp_path: Path) -> None:
    """PEFT's functions on dense updates: the same where weights are one and its count is theirs."""
    pytest.importorskip("torch")
    from peft.utils import merge_utils

    base, adapters = toys(tmp_path)
    for name, (b, a) in FACTORS.items():
        assert np.array_equal(np.array(b) @ np.array(a), {"P": P, "Q": Q}[name])
    import torch

    updates = [torch.from_numpy(P), torch.from_numpy(Q)]
    weights = torch.ones(2, dtype=torch.float64)
    wanted = {
        "ties": merge_utils.ties(updates, weights, 0.5),
        "magnitude_prune": merge_utils.magnitude_prune(updates, weights, 0.5),
        "ties_svd": merge_utils.ties(updates, weights, 0.5),
        "magnitude_prune_svd": merge_utils.magnitude_prune(updates, weights, 0.5),
    }
    for name, theirs in wanted.items():
        lorafast.merge(
            base,
            adapters,
            tmp_path / name,
            strategy=name,
            strategy_options={"density": 0.5},
        )
        found = read_checkpoint(tmp_path / name)["layer.proj.weight"].float64()
        assert np.array_equal(found, theirs.numpy()), name


def test_a_plan_and_a_report_say_how_it_was_merged(tmp_path: Path) -> None:
    base, adapters = toys(tmp_path)
    arguments: dict[str, Any] = {
        "strategy": "dare_ties",
        "strategy_options": {"density": 0.5},
        "seed": 9,
    }
    described = lorafast.plan(base, adapters, **arguments).to_dict()
    assert described["strategy"] == "dare_ties"
    assert described["strategy_options"] == {"density": 0.5}
    assert described["seed"] == 9
    report = lorafast.merge(base, adapters, tmp_path / "out", **arguments)
    assert report.strategy == "dare_ties"
    assert report.strategy_options == {"density": 0.5}
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["strategy_options"] == {"density": 0.5}
    assert written["seed"] == 9


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ties", {"density": 0}, "density is 0"),
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("ties", {"gamma": 0.5}, 'takes no option "gamma"'),
        ("ties", {"speed": 0.5}, "speed"),
        ("della", {"density": 0.1}, "keep probabilities"),
        ("sequential", {"density": 0.5}, "takes none"),
        ("tie", {}, "unknown strategy"),
    ],
)
def test_what_a_strategy_does_not_take_is_refused(
    tmp_path: Path, name: Any, options: dict[str, Any], words: str
) -> None:
    base, adapters = toys(tmp_path)
    with pytest.raises(ValueError, match=words):
        lorafast.merge(base, adapters, tmp_path / "out", strategy=name, strategy_options=options)
    assert not (tmp_path / "out").exists()


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    base, adapters = toys(tmp_path)
    with pytest.raises(ValueError, match="takes no weights"):
        lorafast.merge(base, adapters, tmp_path / "out", strategy="sce", weights=[1, 2])
    with pytest.raises(ValueError, match="seed"):
        lorafast.merge(base, adapters, tmp_path / "out", strategy="ties", seed=-1)
    with pytest.raises(ValueError, match="PEFT"):
        lorafast.merge(base, adapters, tmp_path / "out", strategy="ties", compat="peft")
    with pytest.raises(ValueError, match="original"):
        lorafast.subtract(base, adapters, tmp_path / "out", strategy="ties")


def test_what_is_no_product_is_refused_by_name(tmp_path: Path) -> None:
    embedding = "model.embed_tokens"
    others = {f"{embedding}.weight": tensor(np.ones((9, 20)), "F32")}
    base = make_base(tmp_path / "base", others=others)
    tensors = adapter_tensors(seed=1)
    name = f"{PREFIX}{embedding}.token_adapter.trainable_tokens_delta"
    tensors[name] = tensor(np.zeros((2, 20)), "F32")
    rows = {"trainable_token_indices": {"embed_tokens": [3, 7]}}
    trained = make_adapter(tmp_path / "trained", tensors, **rows)
    plain = make_adapter(tmp_path / "plain")
    with pytest.raises(lorafast.UnsupportedAdapterError, match="trained rows") as caught:
        lorafast.merge(base, [plain, trained], tmp_path / "out", strategy="ties")
    assert "and 1 more" in str(caught.value)
    assert "ties" in str(caught.value)


def test_the_command_takes_options_by_name(tmp_path: Path) -> None:
    from lorafast._cli.main import main

    base, adapters = toys(tmp_path)
    words = ["merge", "--base", str(base), "--adapters", *map(str, adapters)]
    words += ["--output", str(tmp_path / "out"), "--strategy", "ties"]
    words += ["--strategy-option", "density=0.5", "--strategy-option", "normalize=false"]
    assert main(words) == 0
    found = read_checkpoint(tmp_path / "out")["layer.proj.weight"].float64()
    assert found[:2].tolist() == [[-14, 0, 0], [20, -36, -28]]
    assert main([*words, "--overwrite", "--strategy-option", "density"]) == 2
