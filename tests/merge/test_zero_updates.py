"""Updates of nothing: s·B·A is zero, whatever makes it so, and every command says it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
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


R = 4
#: The experts of a parameter.
EXPERTS = 3


def halves(a: Any, b: Any) -> tuple[Any, Any]:
    """The second half of the rank takes away what the first adds."""
    return np.concatenate([a[:2], a[:2]]), np.concatenate([b[:, :2], -b[:, :2]], axis=1)


def groups(a: Any, b: Any) -> tuple[Any, Any]:
    """The same in each of two groups, whose B lie below one another."""
    halved = halves(a[:R], b)
    return np.concatenate([halved[0], halved[0]]), halved[1]


def rows_of_blocks(a: Any, b: Any) -> tuple[Any, Any]:
    """The same within each of the two blocks of A, which has two rows in each."""
    return np.repeat(a[::2], 2, axis=0), np.stack([b[:, 0], -b[:, 0], b[:, 1], -b[:, 1]], axis=1)


def columns_of_blocks(a: Any, b: Any) -> tuple[Any, Any]:
    """The same within each of the two blocks of B, which has two columns in each."""
    return np.repeat(a[::2], 2, axis=0), np.stack([b[:, 0], -b[:, 0]], axis=1)


def each_expert(a: Any, b: Any) -> tuple[Any, Any]:
    """The same in each expert: rows of A together, columns of B apart."""
    by_expert = a.reshape(EXPERTS, R, -1)
    by_rank = b.reshape(-1, R, EXPERTS)
    a = np.concatenate([by_expert[:, :2], by_expert[:, :2]], axis=1)
    b = np.concatenate([by_rank[:, :2], -by_rank[:, :2]], axis=1)
    return a.reshape(EXPERTS * R, -1), b.reshape(-1, R * EXPERTS)


#: Of each kind of delta: its module, the shapes of its A and B and of the base's weight, what makes
#: its factors cancel, and the settings of the adapter.
DELTAS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any], Any, dict[str, Any]]]
DELTAS = {
    "linear": ("l.q", (R, 12), (20, R), {"l.q.weight": (20, 12)}, halves, {}),
    "convolution": (
        "l.conv",
        (R, 6, 3, 3),
        (20, R, 1, 1),
        {"l.conv.weight": (20, 6, 3, 3)},
        halves,
        {},
    ),
    "embedding": ("embed", (R, 30), (12, R), {"embed.weight": (30, 12)}, halves, {}),
    "two parts of a fused layer": (
        "l.qkv",
        (2 * R, 12),
        (20, R, 1),
        {"l.qkv.weight": (30, 12)},
        groups,
        {"enable_lora": [True, False, True], "merge_weights": False},
    ),
    "the second part of a fused layer": (
        "l.qkv",
        (R, 12),
        (20, R, 1),
        {"l.qkv.weight": (60, 12)},
        halves,
        {"enable_lora": [False, True, False], "merge_weights": False},
    ),
    "block-diagonal A": (
        "l.q",
        (R, 6),
        (20, R),
        {"l.q.weight": (20, 12)},
        rows_of_blocks,
        {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": [], "nblocks": 2}},
    ),
    "block-diagonal B": (
        "l.q",
        (R, 12),
        (20, R // 2),
        {"l.q.weight": (20, 12)},
        columns_of_blocks,
        {"use_bdlora": {"target_modules_bd_a": [], "target_modules_bd_b": ["q"], "nblocks": 2}},
    ),
    "experts": (
        "l.mlp.experts",
        (EXPERTS * R, 12),
        (20, EXPERTS * R),
        {"l.mlp.experts.down_proj": (EXPERTS, 20, 12)},
        each_expert,
        {"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.20.0"},
    ),
    "a parameter": (
        "l.router",
        (R, 12),
        (20, R),
        {"l.router.table": (20, 12)},
        halves,
        {"target_parameters": ["router.table"]},
    ),
}


def make_delta(folder: Path, kind: str, dtype: str, *, cancels: bool) -> tuple[Path, Path]:
    module, shape_a, shape_b, weights, cancelling, settings = DELTAS[kind]
    random = np.random.default_rng(4)
    a, b = random.normal(size=shape_a), random.normal(size=shape_b)
    # In the type of the file, so that what cancels does so in it as well.
    a, b = tensor(a, dtype).float64(), tensor(b, dtype).float64()
    if cancels:
        a, b = cancelling(a, b)
    key = f"{PREFIX}{module}.lora_"
    sides = ("embedding_A", "embedding_B") if module == "embed" else ("A.weight", "B.weight")
    tensors = {
        f"{key}{side}": tensor(value, dtype) for side, value in zip(sides, (a, b), strict=True)
    }
    others = {name: tensor(random.normal(size=shape)) for name, shape in weights.items()}
    base = make_base(folder / "base", modules={}, others=others)
    return base, make_adapter(folder / "adapter", tensors, **settings)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("kind", DELTAS)
def test_every_delta_that_cancels(tmp_path: Path, kind: str, dtype: str) -> None:
    base, adapter = make_delta(tmp_path, kind, dtype, cancels=True)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    (warning,) = [each for each in report.warnings if "changes nothing" in each]
    assert "the product of the factors is zero, though neither is, in 1 of 1 module" in warning
    assert warning in lorafast.verify(base, adapter, tmp_path / "out").warnings
    analysis = lorafast.analyze(adapter)
    assert "untrained" in {finding.kind for finding in analysis.findings}
    assert not any(module.frobenius_norm for module in analysis.modules.values())


@pytest.mark.parametrize("kind", DELTAS)
def test_every_delta_that_does_not_cancel(tmp_path: Path, kind: str) -> None:
    base, adapter = make_delta(tmp_path, kind, "F32", cancels=False)
    assert not [each for each in lorafast.plan(base, adapter).warnings if "nothing" in each]
    kinds = {finding.kind for finding in lorafast.analyze(adapter).findings}
    assert not kinds & {"untrained", "zero_update"}


def test_one_expert_is_enough(tmp_path: Path) -> None:
    """The last of them alone, and the last row of its B alone, change something."""
    base, adapter = make_delta(tmp_path, "experts", "F32", cancels=True)
    path = adapter / "adapter_model.safetensors"
    tensors = read_safetensors(path)
    key = f"{PREFIX}l.mlp.experts.lora_B.weight"
    b = tensors[key].float64()
    b[-1, EXPERTS - 1] += 1.0
    write_safetensors(path, tensors | {key: tensor(b)}, {"format": "pt"})
    assert not [each for each in lorafast.plan(base, adapter).warnings if "nothing" in each]
    norms = [module.frobenius_norm for module in lorafast.analyze(adapter).modules.values()]
    assert [norm > 0 for norm in norms] == [False, False, True]
    modules = list(lorafast.analyze(adapter).modules.values())
    cancelled = "the product of the factors is zero, though neither is"
    assert [module.zero_cause for module in modules] == [cancelled, cancelled, None]
    kinds = lorafast.scan(adapter).findings.table["kind"].tolist()
    assert "zero_update" in kinds
    assert "untrained" not in kinds


def test_the_cause_is_that_of_each_expert(tmp_path: Path) -> None:
    _, adapter = make_delta(tmp_path, "experts", "F32", cancels=False)
    path = adapter / "adapter_model.safetensors"
    tensors = read_safetensors(path)
    keys = [f"{PREFIX}l.mlp.experts.lora_{side}.weight" for side in "AB"]
    a, b = (tensors[key].float64() for key in keys)
    # A's rows of the first expert, B's columns of the second.
    a[:R] = 0.0
    b[:, 1::EXPERTS] = 0.0
    write_safetensors(path, dict(zip(keys, map(tensor, (a, b)), strict=True)), {"format": "pt"})
    causes = [module.zero_cause for module in lorafast.analyze(adapter).modules.values()]
    assert causes == [
        "the first factor (A) is all zero",
        "the second factor (B) is all zero",
        None,
    ]


#: The kinds of finding that say that a merge changes nothing.
NOTHING = {"untrained", "zero_scale", "zero_update"}


def beside(tensors: Tensors, what: str) -> dict[str, Any]:
    """Adds what an adapter may have beside its products; returns the settings that go with it."""
    for module, (rows, _) in MODULES.items():
        key = f"{PREFIX}{module}.lora_"
        if what == "magnitude":
            tensors[f"{key}magnitude_vector"] = tensor(np.full(rows, 2.0))
        elif what in {"bias", "bias of zero"}:
            tensors[f"{key}B.bias"] = tensor(np.full(rows, float(what == "bias")))
        elif what == "kasa":
            tensors[f"{key}diag"] = tensor(np.ones(R))
    return {
        "magnitude": {"use_dora": True},
        "bias": {"lora_bias": True},
        "bias of zero": {"lora_bias": True},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "kasa": {"kasa_config": {}},
    }.get(what, {})


def words_of(cause: str) -> str:
    words = CAUSES[cause][2].removesuffix(" in").removesuffix(",")
    return "the second factor (B) is all zero" if "(B)" in words else words


def said_by_all(base: Path, adapter: Path, output: Path) -> dict[str, set[str]]:
    """What each command says of updates of nothing: the words of each cause."""

    def causes(texts: Any) -> set[str]:
        joined = " ".join(texts).lower()
        return {words for words in map(words_of, CAUSES) if words.lower() in joined}

    def of_findings(found: list[Any]) -> set[str]:
        scale = {"the scale is 0"} if any(each.kind == "zero_scale" for each in found) else set()
        return scale | causes(each.reason for each in found if each.kind in NOTHING)

    merged = lorafast.merge(base, adapter, output)
    checked = lorafast.verify(base, adapter, output)
    assert checked.ok
    said = {
        "merge": causes(text for text in merged.warnings if "nothing" in text),
        "verify": causes(text for text in checked.warnings if "nothing" in text),
        "analyze": of_findings(list(lorafast.analyze(adapter).findings)),
    }
    for metrics in ("full", "spectra"):
        fleet = lorafast.scan(adapter, metrics=metrics)
        said[f"scan {metrics}"] = of_findings([each.finding for each in fleet.findings])
    return said


@pytest.mark.parametrize(
    "what", ["only", "magnitude", "bias", "bias of zero", "pissa", "olora", "kasa"]
)
@pytest.mark.parametrize("cause", CAUSES)
def test_all_agree_on_what_changes_nothing(tmp_path: Path, cause: str, what: str) -> None:
    """Of a product of zero beside whatever else an adapter does; what is written is the truth."""
    change, settings, _ = CAUSES[cause]
    tensors = adapter_tensors(dtype="F32")
    change(tensors)
    settings = settings | beside(tensors, what)
    biases = {f"{module}.bias": tensor(np.ones(rows)) for module, (rows, _) in MODULES.items()}
    base = make_base(tmp_path / "base", others=biases)
    adapter = make_adapter(tmp_path / "adapter", tensors, **settings)
    said = said_by_all(base, adapter, tmp_path / "out")
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    # But for what rounding leaves of sums that cancel.
    is_nothing = all(
        np.allclose(before[name].float64(), after[name].float64(), rtol=0, atol=1e-6)
        for name in before
    )
    expected = words_of(cause)
    assert said == dict.fromkeys(said, {expected} if is_nothing else set())
    # A bias has the scale as well, and so has what OLoRA takes out of the base.
    is_scaled = cause == "scale" and what in {"bias", "olora"}
    nothing = what in {"only", "bias of zero"} or is_scaled
    assert is_nothing == nothing
    analysis = lorafast.analyze(adapter)
    assert {each.zero_cause for each in analysis.modules.values()} == (
        {expected} if nothing else {None}
    )


@pytest.mark.parametrize("cause", ["B", "A", "apart", "cancelled"])
@pytest.mark.parametrize("what", ["only", "magnitude", "bias"])
def test_all_agree_of_one_module(tmp_path: Path, cause: str, what: str) -> None:
    tensors = adapter_tensors(dtype="F32")
    whole = dict(tensors)
    CAUSES[cause][0](tensors)
    mixed = whole | {factor(name): tensors[factor(name)] for name in "AB"}
    settings = beside(mixed, what)
    biases = {f"{module}.bias": tensor(np.ones(rows)) for module, (rows, _) in MODULES.items()}
    base = make_base(tmp_path / "base", others=biases)
    adapter = make_adapter(tmp_path / "adapter", mixed, **settings)
    said = said_by_all(base, adapter, tmp_path / "out")
    assert said == dict.fromkeys(said, {words_of(cause)} if what == "only" else set())


def test_headers_alone_tell_of_a_scale(tmp_path: Path) -> None:
    kinds = {}
    for what in ("only", "magnitude", "bias", "pissa"):
        tensors = adapter_tensors()
        settings = beside(tensors, what)
        adapter = make_adapter(tmp_path / what, tensors, lora_alpha=0, **settings)
        found = lorafast.scan(adapter, metrics="headers").findings
        kinds[what] = {each.finding.kind for each in found} - {"feature"}
    assert kinds.pop("only") == kinds.pop("bias") == {"zero_scale"}
    assert all(found == {"unusual_scale"} for found in kinds.values()), kinds


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("what", ["only", "magnitude"])
def test_spectra_of_torch_say_the_same(tmp_path: Path, cause: str, what: str) -> None:
    pytest.importorskip("torch")
    change, settings, _ = CAUSES[cause]
    tensors = adapter_tensors(dtype="F32")
    change(tensors)
    settings = settings | beside(tensors, what)
    adapter = make_adapter(tmp_path / "adapter", tensors, **settings)
    found = [lorafast.scan(adapter, device=device).findings for device in ("cpu", "torch:cpu")]
    assert list(found[0]) == list(found[1])


@pytest.mark.parametrize("start", ["pissa", "KaSA"])
def test_a_start_that_changes_the_base_is_a_change(tmp_path: Path, start: str) -> None:
    """What the start took out of the weights is gone, whatever the product adds."""
    tensors = adapter_tensors()
    cancel(tensors)
    settings: dict[str, Any] = {"init_lora_weights": "pissa"}
    if start == "KaSA":
        settings = {"kasa_config": {}}
        tensors |= {f"{PREFIX}{module}.lora_diag": tensor(np.ones(R)) for module in MODULES}
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tensors, **settings)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert not [each for each in report.warnings if "nothing" in each]
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    assert all(before[f"{module}.weight"] != after[f"{module}.weight"] for module in MODULES)


def test_a_magnitude_beside_a_product_of_zero_is_a_change(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    cancel(tensors)
    for module, (rows, _) in MODULES.items():
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(np.full(rows, 2.0))
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tensors, use_dora=True)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert not [each for each in report.warnings if "nothing" in each]
    assert report.tensors_merged == len(MODULES)
