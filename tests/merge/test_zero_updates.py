"""Updates of nothing: s·B·A is zero, whatever makes it so, and every command says it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, tensor
from support.handmade import MODULES, PREFIX, adapter_tensors, make_adapter, make_base

Tensors = dict[str, Tensor]
FIRST = next(iter(MODULES))


def factor(name: str, module: str = FIRST) -> str:
    return f"{PREFIX}{module}.lora_{name}.weight"


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for module in MODULES:
            key = factor(name, module)
            tensors[key] = tensor(change(tensors[key].float64()), tensors[key].dtype)

    return apply


def zero_a_row(tensors: Tensors) -> None:
    """What B uses A does not have."""
    keep = np.array([1.0, 1.0, 0.0, 0.0])
    changed("A", lambda a: a * keep[:, None])(tensors)
    changed("B", lambda b: b * (1 - keep))(tensors)


def cancel(tensors: Tensors) -> None:
    """Two rows of A are the same, and the columns of B that belong to them are opposite."""
    changed("A", lambda a: np.concatenate([a[:2], a[:2]]))(tensors)
    changed("B", lambda b: np.concatenate([b[:, :2], -b[:, :2]], axis=1))(tensors)


#: What makes an update zero, the settings of the adapter, and what is said.
CAUSES: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str]] = {
    "B": (changed("B", np.zeros_like), {}, "the second factor (B) is all zero in"),
    "negative zeros": (changed("B", lambda b: -0.0 * abs(b)), {}, "the second factor (B) is"),
    "A": (changed("A", np.zeros_like), {}, "the first factor (A) is all zero in"),
    "scale": (lambda _: None, {"lora_alpha": 0}, "the scale is 0 in"),
    "apart": (zero_a_row, {}, "the product of the factors is zero, though neither is, in"),
    "cancelled": (cancel, {}, "the product of the factors is zero, though neither is, in"),
}


def make(folder: Path, cause: str, dtype: str = "F32") -> Path:
    change, settings, _ = CAUSES[cause]
    tensors = adapter_tensors(dtype=dtype)
    change(tensors)
    return make_adapter(folder / "adapter", tensors, **settings)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_said_by_all(tmp_path: Path, cause: str, dtype: str) -> None:
    base, adapter = make_base(tmp_path / "base"), make(tmp_path, cause, dtype)
    words = f"{CAUSES[cause][2]} {len(MODULES)} of {len(MODULES)} modules (the first: {FIRST})"
    report = lorafast.merge(base, adapter, tmp_path / "out")
    (warning,) = [each for each in report.warnings if "change nothing" in each]
    assert warning.startswith(f"{adapter}: {CAUSES[cause][2]}")
    assert words.removeprefix(CAUSES[cause][2]) in warning
    assert ("never trained" in warning) is (cause in {"B", "negative zeros"})
    outcome = lorafast.verify(base, adapter, tmp_path / "out")
    assert outcome.ok
    assert warning in outcome.warnings
    analysis = lorafast.analyze(adapter, entries=True)
    assert {finding.kind for finding in analysis.findings} & {"untrained", "zero_scale"}
    for module in analysis.modules.values():
        assert not any(module.singular_values)
        assert (module.frobenius_norm, module.stable_rank, module.k90) == (0.0, 0.0, 0)
        assert module.numerical_rank == 0
        assert module.entries is not None
        assert module.entries.max_abs == 0.0
    fleet = lorafast.scan(adapter)
    assert set(fleet.findings.table["kind"].tolist()) & {"untrained", "zero_scale"}
    assert fleet.modules["frobenius_norm"].max() == 0.0
    assert fleet.modules["effective_rank"].max() == 0.0


def test_what_cancels_has_no_direction(tmp_path: Path) -> None:
    """A number made of what rounding left would be none of the update's."""
    zero, other = make(tmp_path, "cancelled"), make_adapter(tmp_path / "other")
    assert np.isnan(lorafast.compare([zero, other]).cosine[0, 1])
    similar = lorafast.similarity([zero, other])
    assert np.isnan(similar.matrix[0, 1])
    assert similar.norms[0] == 0.0
    found = lorafast.lineage(other, [zero])
    assert list(found.dependent) == [zero]


def test_what_nearly_cancels_is_an_update(tmp_path: Path) -> None:
    tensors = adapter_tensors(dtype="F32")
    cancel(tensors)
    a = tensors[factor("A")].float64()
    a[0, 0] *= 1 + 2.0**-20
    tensors[factor("A")] = tensor(a, "F32")
    analysis = lorafast.analyze(make_adapter(tmp_path / "adapter", tensors))
    dense = tensors[factor("B")].float64() @ tensors[factor("A")].float64()
    own = analysis.modules[FIRST]
    assert own.spectral_norm == pytest.approx(own.scaling * np.linalg.norm(dense, 2), rel=1e-6)


@pytest.mark.parametrize("cause", ["B", "A", "apart", "cancelled"])
def test_some_modules(tmp_path: Path, cause: str) -> None:
    tensors = adapter_tensors()
    whole = dict(tensors)
    CAUSES[cause][0](tensors)
    mixed = whole | {factor(name): tensors[factor(name)] for name in "AB"}
    adapter = make_adapter(tmp_path / "adapter", mixed)
    plan = lorafast.plan(make_base(tmp_path / "base"), adapter)
    (warning,) = [each for each in plan.warnings if "changes nothing" in each]
    assert f"1 of {len(MODULES)} modules (the first: {FIRST})" in warning
    assert "zero_update" in {finding.kind for finding in lorafast.analyze(adapter).findings}


def test_a_weight_of_zero(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / name) for name in "ab"]
    plan = lorafast.plan(base, adapters, strategy="weighted", weights=[0.0, 1.0])
    (warning,) = plan.warnings
    assert warning == f"{adapters[0]}: its weight is 0, so that it changes nothing"


def test_what_changes_something_is_no_update_of_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    # One element of either, as far from the first ones as can be.
    sparse = adapter_tensors()
    a, b = sparse[factor("A")].float64(), sparse[factor("B")].float64()
    only_a, only_b = np.zeros_like(a), np.zeros_like(b)
    only_a[3, -1], only_b[-1, 3] = 1e-3, 1e-3
    sparse |= {factor("A"): tensor(only_a), factor("B"): tensor(only_b)}
    adapter = make_adapter(tmp_path / "sparse", sparse)
    assert not lorafast.plan(base, adapter).warnings
    assert not {f.kind for f in lorafast.analyze(adapter).findings} & {"zero_update", "untrained"}
