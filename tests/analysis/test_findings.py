"""Each finding on a planted case, and none where there is nothing to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.findings import KINDS, LARGEST_ORDINARY_RANK, SEVERITIES
from support.analysis import graded_factors, random_factors, write_factors
from support.handmade import make_base

SHAPES = {f"model.layers.{block}.q": (40, 30, 8) for block in range(6)}


def ordinary() -> dict[str, Any]:
    """Six alike updates that use their rank neither too little nor to its end."""
    sigma = np.geomspace(1.0, 0.25, 8)
    return {path: graded_factors(40, 30, sigma, seed=seed) for seed, path in enumerate(SHAPES)}


def findings(path: Path, factors: Any, **settings: Any) -> list[lorafast.Finding]:
    base = settings.pop("base", None)
    return lorafast.analyze(
        write_factors(path / "adapter", factors, **settings), base=base
    ).findings


def test_an_ordinary_adapter_has_none(tmp_path: Path) -> None:
    assert findings(tmp_path, ordinary()) == []


def only(found: list[lorafast.Finding], kind: str) -> lorafast.Finding:
    assert [f.kind for f in found] == [kind], found
    return found[0]


def test_never_trained(tmp_path: Path) -> None:
    factors = {path: (np.zeros_like(b), a) for path, (b, a) in ordinary().items()}
    finding = only(findings(tmp_path, factors), "untrained")
    assert (finding.severity, finding.module, finding.value) == ("critical", None, 0.0)


def test_one_module_never_trained(tmp_path: Path) -> None:
    factors = ordinary()
    path = "model.layers.3.q"
    factors[path] = (np.zeros((40, 8)), factors[path][1])
    finding = only(findings(tmp_path, factors), "zero_update")
    assert (finding.severity, finding.module) == ("warning", path)


@pytest.mark.parametrize(
    ("alpha", "kind", "severity"),
    [
        (0.0, "zero_scale", "critical"),
        (-8.0, "unusual_scale", "warning"),
        (8 * 17.0, "unusual_scale", "warning"),
        (8 * 0.2, "unusual_scale", "warning"),
    ],
)
def test_alpha_out_of_the_ordinary(tmp_path: Path, alpha: float, kind: str, severity: str) -> None:
    finding = only(findings(tmp_path, ordinary(), alpha=alpha), kind)
    assert (finding.severity, finding.module, finding.value) == (severity, None, alpha / 8)
    assert f"{alpha:g}" in finding.reason


@pytest.mark.parametrize("alpha", [8 * 16.0, 8 * 0.25])
def test_alpha_at_the_ends_of_the_ordinary(tmp_path: Path, alpha: float) -> None:
    assert findings(tmp_path, ordinary(), alpha=alpha) == []


def test_a_rank_out_of_the_ordinary(tmp_path: Path) -> None:
    rank = LARGEST_ORDINARY_RANK + 1
    factors = random_factors({"layers.0.q": (20, 16, rank)})
    kinds = {f.kind: f for f in findings(tmp_path, factors)}
    assert kinds["unusual_rank"].value == rank
    reasons = [f.reason for f in findings(tmp_path / "2", factors) if f.kind == "unusual_rank"]
    assert len(reasons) == 2
    assert "[20, 16]" in reasons[1]


def test_a_dead_module(tmp_path: Path) -> None:
    factors = ordinary()
    path = "model.layers.2.q"
    b, a = factors[path]
    factors[path] = (b * 1e-4, a)
    finding = only(findings(tmp_path, factors), "dead_module")
    assert finding.module == path
    assert finding.value == pytest.approx(1e-4, rel=1e-6)


def test_a_spectral_outlier(tmp_path: Path) -> None:
    factors = ordinary()
    path = "model.layers.4.q"
    b, a = factors[path]
    factors[path] = (b * 11, a)
    found = findings(tmp_path, factors)
    assert [f.kind for f in found] == ["spectral_outlier", "dominant_module"]
    assert {f.module for f in found} == {path}
    assert found[0].value == pytest.approx(11, rel=1e-6)
    assert found[1].value == pytest.approx(121 / 126, rel=1e-6)


def test_unused_and_exhausted_rank(tmp_path: Path) -> None:
    factors = ordinary()
    few = np.array([1.0, 0.5, *[1e-3] * 6])
    factors["model.layers.0.q"] = graded_factors(40, 30, few)
    factors["model.layers.1.q"] = graded_factors(40, 30, np.full(8, 0.6))
    found = findings(tmp_path, factors)
    assert [(f.kind, f.module, f.value) for f in found] == [
        ("unused_rank", "model.layers.0.q", 2.0),
        ("exhausted_rank", "model.layers.1.q", 8.0),
    ]
    assert {f.severity for f in found} == {"note"}


def test_an_update_larger_than_its_weight(tmp_path: Path) -> None:
    modules = {path: shape[:2] for path, shape in SHAPES.items()}
    small = make_base(tmp_path / "small", modules=modules, scale=1e-3)
    found = findings(tmp_path / "a", ordinary(), base=small)
    assert {f.kind for f in found} == {"overwhelming_update"}
    assert len(found) == 6
    large = make_base(tmp_path / "large", modules=modules, scale=10.0)
    assert findings(tmp_path / "b", ordinary(), base=large) == []


def test_no_modules(tmp_path: Path) -> None:
    from support.files import tensor
    from support.handmade import make_adapter

    path = make_adapter(
        tmp_path / "adapter",
        {"base_model.model.lm_head.weight": tensor(np.ones((4, 4)))},
        modules_to_save=["lm_head"],
    )
    analysis = lorafast.analyze(path)
    assert analysis.findings[0].kind == "no_modules"
    assert analysis.findings[0].severity == "critical"
    assert analysis.modules == {}
    assert "## Findings" in analysis.to_markdown()


def test_the_most_severe_stand_first(tmp_path: Path) -> None:
    factors = ordinary()
    factors["model.layers.0.q"][0][0, 0] = np.nan
    factors["model.layers.1.q"] = graded_factors(40, 30, np.full(8, 0.6))
    b, a = factors["model.layers.2.q"]
    factors["model.layers.2.q"] = (b * 1e-5, a)
    found = findings(tmp_path, factors)
    assert [f.severity for f in found] == ["critical", "warning", "note"]
    text = lorafast.analyze(tmp_path / "adapter").to_markdown()
    assert text.index("**critical**") < text.index("**warning**") < text.index("**note**")


def test_every_kind_is_described() -> None:
    assert set(SEVERITIES) == {"critical", "warning", "note"}
    assert all(text for text in KINDS.values())
