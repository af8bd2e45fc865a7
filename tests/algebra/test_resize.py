"""Resizing adapters: ranks by every rule, budgets over all modules, and what is not cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from safetensors.numpy import load_file
from support.algebra import MODULE, distance, random_modules, updates_of, write_lora
from support.handmade import make_adapter, make_base

H = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)
#: Its singular values are 64, 32, 16, 4.
KNOWN = {MODULE: (H @ np.diag([16, 8, 4, 1]).astype(np.float32), H.T.copy())}
SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 32),
    "model.layers.0.self_attn.k_proj": (8, 32),
    "model.layers.0.mlp.down_proj": (32, 40),
}


@pytest.mark.parametrize(
    ("rule", "rank", "kohya"),
    [
        ("energy:0.75", 1, 1),
        ("energy:0.9", 2, 2),
        ("energy:0.99", 3, 3),
        ("energy:0.999", 4, 4),
        ("sv_fro:0.85", 1, 2),
        ("sv_fro:0.9999", 4, 4),
        ("sv_cumulative:0.5", 1, 2),
        ("sv_cumulative:0.9", 3, 4),
        ("sv_ratio:3", 2, 3),
        ("sv_ratio:5", 3, 4),
        ("sv_ratio:20", 4, 4),
        (3, 3, 3),
    ],
)
def test_ranks_are_those_of_the_rules(
    tmp_path: Path, rule: int | str, rank: int, kohya: int
) -> None:
    adapter = write_lora(tmp_path / "a", KNOWN, alpha=4)
    report = lorafast.resize(adapter, tmp_path / "out", rank=rule)
    assert report.ranks == {MODULE: rank}
    [module] = report.modules.values()
    assert module.singular_values == pytest.approx([64, 32, 16, 4], rel=1e-13)
    kept = [4096, 1024, 256, 16]
    assert module.kept == pytest.approx(sum(kept[:rank]) / sum(kept), rel=1e-12)
    found = distance(updates_of(tmp_path / "out"), updates_of(adapter))
    assert found == pytest.approx(report.error, abs=1e-7)
    old = lorafast.resize(adapter, tmp_path / "old", rank=rule, compat="kohya")
    assert old.ranks == {MODULE: kohya}


@pytest.mark.parametrize("alpha", [4, 3, 0.7])
def test_the_true_rank_changes_nothing(tmp_path: Path, alpha: float) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 4), alpha=alpha)
    report = lorafast.resize(adapter, tmp_path / "out", rank=4)
    assert report.error == 0
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, alpha)


def test_more_than_there_is_adds_zeros(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 4), alpha=3)
    report = lorafast.resize(adapter, tmp_path / "out", rank=9)
    assert set(report.ranks.values()) == {9}
    assert report.error == 0
    for name, update in updates_of(adapter).items():
        assert np.allclose(updates_of(tmp_path / "out")[name], update, rtol=1e-14)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(not tensor[4:].any() for name, tensor in tensors.items() if "lora_A" in name)


def test_ranks_that_differ_leave_one_scale_for_every_reader(tmp_path: Path) -> None:
    modules = random_modules(1, SHAPES, 8, decay=0.5)
    adapter = write_lora(tmp_path / "a", modules, alpha=3)
    report = lorafast.resize(adapter, tmp_path / "out", rank="energy:0.97")
    assert len(set(report.ranks.values())) > 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    found = distance(updates_of(tmp_path / "out"), updates_of(adapter))
    assert found == pytest.approx(report.error, rel=1e-5)


@pytest.mark.parametrize("measure", ["ranks", "parameters", "bytes"])
@pytest.mark.parametrize("relative", [False, True])
def test_budgets_are_the_best_choice_of_ranks(tmp_path: Path, measure: str, relative: bool) -> None:
    base, names = None, SHAPES
    if relative:
        base = make_base(tmp_path / "base")
        adapter = make_adapter(tmp_path / "a", r=3)
        names = {name: update.shape for name, update in updates_of(adapter).items()}
    else:
        adapter = write_lora(tmp_path / "a", random_modules(4, SHAPES, 4, decay=0.6), alpha=3)
    updates = updates_of(adapter)
    values = {name: np.linalg.svd(update, compute_uv=False) for name, update in updates.items()}
    norms = dict.fromkeys(names, 1.0)
    if base is not None:
        weights = {}
        for file in base.glob("*.safetensors"):
            weights |= load_file(file)
        for name in names:
            [weight] = [w for key, w in weights.items() if key.endswith(f"{name}.weight")]
            norms[name] = float(np.linalg.norm(weight.astype(np.float64)))
    size = {"ranks": 0, "parameters": 1, "bytes": 4}[measure]
    costs = {name: (size * sum(shape) or 1) for name, shape in names.items()}
    most = 3 if relative else 4
    all_of_it = sum(costs[name] * most for name in names)
    for share in (0.3, 0.55, 0.8):
        budget = int(all_of_it * share)
        best = 0.0
        for ranks in itertools.product(range(most + 1), repeat=len(names)):
            chosen = dict(zip(names, ranks, strict=True))
            if sum(costs[name] * rank for name, rank in chosen.items()) <= budget:
                worth = sum(
                    np.sum((values[name][:rank] / norms[name]) ** 2)
                    for name, rank in chosen.items()
                )
                best = max(best, worth)
        report = lorafast.resize(
            adapter,
            tmp_path / "out",
            rank=f"budget:{measure}={budget}",
            relative_to="base" if relative else "absolute",
            base=base,
            overwrite=True,
        )
        assert report.budget is not None
        assert report.budget.spent <= budget
        worth = sum(
            np.sum((values[name][: module.rank] / norms[name]) ** 2)
            for name, module in report.modules.items()
        )
        assert worth + report.budget.gap >= best * (1 - 1e-9)
        assert report.budget.gap > 0 or worth == pytest.approx(best, rel=1e-9)


def test_no_module_gets_more_than_a_server_takes(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 8), alpha=3)
    report = lorafast.resize(adapter, tmp_path / "out", rank="energy:1", max_rank=5)
    assert set(report.ranks.values()) == {5}


def test_auto_drops_what_rounding_explains(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    modules = {}
    for name, (b, a) in random_modules(1, SHAPES, 4).items():
        # Rank 4, written with 7 columns and rounded to 16 bits.
        mix = random.standard_normal((4, 7))
        wide = (b @ mix).astype(np.float16), (np.linalg.pinv(mix) @ a).astype(np.float16)
        modules[name] = wide
    adapter = write_lora(tmp_path / "a", modules, alpha=7)
    report = lorafast.resize(adapter, tmp_path / "out", rank="auto", dtype="float32")
    assert set(report.ranks.values()) == {4}
    assert report.error < 2e-3
    exactly = lorafast.resize(adapter, tmp_path / "exactly", rank="error:0", dtype="float64")
    assert set(exactly.ranks.values()) == {7}


def test_magnitudes_and_biases_stay(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", r=4)
    report = lorafast.resize(adapter, tmp_path / "out", rank=2)
    merged = lorafast.merge(base, tmp_path / "out", tmp_path / "merged")
    assert merged.tensors_merged == len(report.modules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"rank": "12.5"}, "rank is"),
        ({"rank": "knee"}, "rank is"),
        ({"rank": 4, "max_rank": 0}, "max_rank"),
        ({"rank": 4, "relative_to": "base"}, "only a budget"),
        ({"rank": "budget:ranks=4", "relative_to": "base"}, "needs the base"),
        ({"rank": 4, "relative_to": "norm"}, "relative_to"),
        ({"rank": 4, "threads": 0}, "threads"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 4), alpha=4)
    with pytest.raises(ValueError, match=message):
        lorafast.resize(adapter, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    modules = random_modules(1, SHAPES, 4)
    modules["model.layers.0.self_attn.k_proj"][0][3, 1] = np.nan
    adapter = write_lora(tmp_path / "a", modules, alpha=4)
    with pytest.raises(ValueError, match=r"k_proj has values that are not finite"):
        lorafast.resize(adapter, tmp_path / "out", rank=2)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_the_command_shows_ranks_errors_and_the_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_lora(tmp_path / "a", random_modules(1, SHAPES, 6, decay=0.6), alpha=4)
    page, picture = tmp_path / "page.md", tmp_path / "scree.png"
    flags = ["-o", str(tmp_path / "out"), "--markdown", str(page), "--plot", str(picture)]
    assert main(["resize", str(adapter), "--rank", "energy:0.9", *flags]) == 0
    assert "of ‖ΔW‖ over all modules" in capsys.readouterr().out
    assert "| `model.layers.0.self_attn.q_proj` | 24 × 32 | 6 |" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
