"""Weights by patterns of module names, in merges, proofs and subtractions of every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from numpy.typing import NDArray
from support.dense_methods import dare, della, elected, ties, uniform
from support.files import read_checkpoint, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

Array = NDArray[np.float64]
NAMES = list(MODULES)
#: 0.5 for the first module, 2 for the second, and 1 for the others.
WEIGHTS: list[Any] = [{NAMES[0]: 0.5, f"{NAMES[1][:-1]}?": 2.0}, 0.25]


def inputs(folder: Path) -> tuple[Path, list[Path], list[dict[str, Array]]]:
    base = make_base(folder / "base", dtype="F32")
    paths, deltas = [], []
    for seed in (1, 2):
        tensors = adapter_tensors(rank=4, seed=seed)
        paths.append(make_adapter(folder / str(seed), tensors, lora_alpha=8))
        own = {}
        for module in MODULES:
            a = tensors[f"{PREFIX}{module}.lora_A.weight"].float64()
            b = tensors[f"{PREFIX}{module}.lora_B.weight"].float64()
            own[module] = 2 * b @ a
        deltas.append(own)
    return base, paths, deltas


def of_module(module: str) -> list[float]:
    return [0.5 if module == NAMES[0] else 2.0 if module == NAMES[1] else 1.0, 0.25]


def nuslerp(deltas: list[Array], weights: list[float]) -> Array:
    norms = [np.linalg.norm(delta) for delta in deltas]
    angle = np.arccos((deltas[0] * deltas[1]).sum() / norms[0] / norms[1])
    t = weights[1] / sum(weights)
    first, second = np.sin((1 - t) * angle), np.sin(t * angle)
    return np.asarray((first * deltas[0] + second * deltas[1]) / np.sin(angle))


def reference(name: str, module: str, deltas: list[Array], weights: list[float]) -> Array:
    numbers = [uniform(3, module, place, delta.shape) for place, delta in enumerate(deltas)]
    match name:
        case "normalized":
            return np.asarray(
                sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
            )
        case "nuslerp":
            return nuslerp(deltas, weights)
        case "ties":
            return ties(deltas, weights, 0.5)
        case "dare_ties":
            kept = [dare(d, 0.5, n) for d, n in zip(deltas, numbers, strict=True)]
            return elected(kept, weights)
        case "della_linear":
            kept = [della(d, 0.5, 0.2, n) for d, n in zip(deltas, numbers, strict=True)]
            return np.asarray(sum(w * k for w, k in zip(weights, kept, strict=True)))
    return np.asarray(sum(w * d for w, d in zip(weights, deltas, strict=True)))


CASES: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    ("weighted", {}),
    ("linear", {}),
    ("normalized", {}),
    ("nuslerp", {}),
    ("ties", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}),
    ("della_linear", {"density": 0.5, "epsilon": 0.2}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[str(case[0]) for case in CASES])
def test_each_module_has_its_weight(tmp_path: Path, name: Any, options: dict[str, Any]) -> None:
    base, adapters, deltas = inputs(tmp_path)
    given: dict[str, Any] = {
        "strategy": name,
        "strategy_options": options,
        "weights": WEIGHTS,
        "seed": 3,
    }
    lorafast.merge(base, adapters, tmp_path / "out", **given)
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    for module in MODULES:
        change = after[f"{module}.weight"].float64() - before[f"{module}.weight"].float64()
        own = [delta[module] for delta in deltas]
        expected = reference(str(name), module, own, of_module(module))
        assert np.linalg.norm(change - expected) <= 2e-6 * np.linalg.norm(expected) + 1e-5
    assert lorafast.verify(base, adapters, tmp_path / "out", full=True, **given).ok
    wrong = {**given, "weights": [1.0, 0.25]}
    assert not lorafast.verify(base, adapters, tmp_path / "out", **wrong).ok
    back = lorafast.subtract(tmp_path / "out", adapters, tmp_path / "back", original=base, **given)
    assert back.exact
    assert back.weights == WEIGHTS
    if name in (None, "weighted", "linear", "normalized"):
        report = lorafast.subtract(tmp_path / "out", adapters, tmp_path / "sums", **given)
        assert report.weights == WEIGHTS
        again = read_checkpoint(tmp_path / "sums")
        for module in MODULES:
            np.testing.assert_allclose(
                again[f"{module}.weight"].float64(),
                before[f"{module}.weight"].float64(),
                atol=1e-6,
            )


def test_a_merge_is_the_merge_of_the_combination(tmp_path: Path) -> None:
    base, adapters, _ = inputs(tmp_path)
    lorafast.combine(adapters, tmp_path / "both", weights=WEIGHTS)
    lorafast.merge(base, tmp_path / "both", tmp_path / "one")
    lorafast.merge(base, adapters, tmp_path / "two", weights=WEIGHTS)
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    for name, value in one.items():
        np.testing.assert_allclose(value.float64(), two[name].float64(), atol=1e-6)


def test_reports_and_the_card_have_the_patterns(tmp_path: Path) -> None:
    base, adapters, _ = inputs(tmp_path)
    report = lorafast.merge(base, adapters, tmp_path / "out", weights=WEIGHTS)
    assert report.strategy == "weighted"
    assert report.weights == WEIGHTS
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["weights"] == WEIGHTS
    assert {group["weight"] for group in written["groups"]} == {0.25, 0.5, 1.0, 2.0}
    for page in ("merge_report.md", "README.md"):
        assert f"`{NAMES[0]}` 0.5" in (tmp_path / "out" / page).read_text()
    plan = lorafast.plan(base, adapters, weights=WEIGHTS).to_dict()
    assert plan["weights"] == WEIGHTS
    found = {
        update["module"].removeprefix(PREFIX): update["weight"]
        for each in plan["tensors"]
        for update in each["updates"]
        if update["adapter"] == 0
    }
    assert found == {module: of_module(module)[0] for module in MODULES}


def test_saved_modules_have_a_weight(tmp_path: Path) -> None:
    weight = np.arange(24.0).reshape(6, 4)
    base = make_base(tmp_path / "base", dtype="F32", others={"head.weight": tensor(weight, "F32")})
    paths = []
    for seed in (1, 2):
        tensors = adapter_tensors(seed=seed)
        tensors[f"{PREFIX}head.weight"] = tensor(weight + seed, "F32")
        paths.append(make_adapter(tmp_path / str(seed), tensors, modules_to_save=["head"]))
    weights: list[Any] = [{"head": 0.5}, {"*": 2.0}]
    lorafast.merge(base, paths, tmp_path / "out", weights=weights)
    found = read_checkpoint(tmp_path / "out")["head.weight"].float64()
    np.testing.assert_allclose(found, weight + 0.5 * 1 + 2 * 2)


@pytest.mark.parametrize(
    ("strategy", "weights", "words"),
    [
        ("weighted", [{"*.other": 1}, 1], r'no module fits the pattern "\*.other"'),
        ("ties", [{"*": float("inf")}, 1], "not a finite number"),
        ("normalized", [{NAMES[0]: -1}, 1], f"divided by their sum.*{NAMES[0]}"),
        ("nuslerp", [{NAMES[0]: 0}, {NAMES[0]: 0}], f"divided by their sum.*{NAMES[0]}"),
        ("average", [{"*": 1}, 1], "only the strategy"),
        ("slerp", [{"*": 1}, 1], "takes no weights"),
    ],
)
def test_weights_that_make_no_sense(
    tmp_path: Path, strategy: Any, weights: list[Any], words: str
) -> None:
    base, adapters, _ = inputs(tmp_path)
    with pytest.raises(ValueError, match=words):
        lorafast.plan(base, adapters, strategy=strategy, weights=weights)


def test_an_adapter_of_weight_zero_everywhere_is_said(tmp_path: Path) -> None:
    base, adapters, _ = inputs(tmp_path)
    plan = lorafast.plan(base, adapters, weights=[{"*": 0}, {NAMES[0]: 0}])
    (warning,) = [each for each in plan.warnings if "its weight is 0" in each]
    assert warning.startswith(str(adapters[0]))


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_the_command_has_the_same_syntax(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    base, adapters, _ = inputs(tmp_path)
    names = [str(path) for path in adapters]
    given = {
        "merge": ["merge", "--base", str(base), "--adapters", *names],
        "combine": ["combine", *names],
    }[command]
    weights = ["--weights", f"{NAMES[0]}=0.5,*=-2e0", "0.25"]
    assert main([*given, *weights, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    python: list[Any] = [{NAMES[0]: 0.5, "*": -2.0}, 0.25]
    if command == "merge":
        lorafast.merge(base, adapters, tmp_path / "same", weights=python)
        file = "model.safetensors"
    else:
        lorafast.combine(adapters, tmp_path / "same", weights=python)
        file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    capsys.readouterr()
    for wrong in ("much", "*=much", "=1"):
        assert main([*given, "--weights", wrong, "1", "--output", str(tmp_path / "no")]) == 2
        assert wrong in capsys.readouterr().err
