"""`lorafast.subtract` gives the base back: to within the rounding that it states, or exactly."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lorafast._cli.main import main
from numpy.typing import NDArray
from support.compare import FLOAT32_SUM, assert_merged_like_float64, assert_rest_untouched
from support.files import Tensor, read_checkpoint, snapshot, tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX, merge_float64

# The largest relative error of one rounding to nearest, and half of the smallest step.
HALF_ULP = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
SMALLEST = {"F64": 0.0, "F32": 0.0, "BF16": 0.0, "F16": 2.0**-25}
REPORTS = {"subtract_report.json", "subtract_report.md"}
MANIFEST = "lorafast_manifest.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def two_roundings(
    merged: Tensor, restored: Tensor, terms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What the rounding of a merge and that of a subtraction can differ by from the base."""
    bound = sum(
        HALF_ULP[value.dtype] * np.abs(value.float64()) + SMALLEST[value.dtype]
        for value in (merged, restored)
    )
    sums = 2.0**-50 if merged.dtype == "F64" else FLOAT32_SUM
    return np.asarray(bound + 2 * sums * terms)


def assert_base_again(
    base: Path, adapters: list[Path], merged: Path, output: Path, report: Any, **how: Any
) -> None:
    """Every weight lies within the bound, and the report's own bound holds as well."""
    before, between, after = (read_checkpoint(path) for path in (base, merged, output))
    terms = merge_float64(before, adapters, **how)
    assert_rest_untouched(after, before, terms)
    furthest = squares = 0.0
    for name, term in terms.items():
        error = np.abs(after[name].float64() - before[name].float64())
        allowed = two_roundings(between[name], after[name], term.magnitude)
        assert (error <= allowed).all(), f"{name}: {np.max(error / allowed)} of what is allowed"
        furthest = max(furthest, float(error.max()))
        squares += float(np.square(error).sum())
    assert not report.exact
    assert furthest <= report.bound["largest"]
    assert squares <= report.bound["norm"] ** 2


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
def test_the_base_to_within_rounding(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shards=2)
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged")
    report = lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "out", verify=True)
    assert_base_again(base, [adapter], tmp_path / "merged", tmp_path / "out", report)
    assert report.verification is not None
    assert report.verification["ok"]
    # What is stated is no blanket: a bound that is ten times what it has to be says nothing.
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out")
    names = [f"{module}.weight" for module in MODULES]
    error = [np.square(after[n].float64() - before[n].float64()).sum() for n in names]
    assert report.bound is not None
    if dtype in {"BF16", "F16"}:
        assert report.bound["norm"] <= 6 * np.sqrt(np.sum(error))
        assert report.bound["share"] > 1e-4
    else:
        # The sums' own bound, which holds in whatever order the merge added up.
        assert 0 < report.bound["share"] < {"F32": 1e-5, "F64": 1e-14}[dtype]
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | REPORTS | {MANIFEST}
    written = json.loads((tmp_path / "out" / "subtract_report.json").read_text())
    assert written == report.portable().to_dict()
    page = (tmp_path / "out" / "subtract_report.md").read_text()
    assert "to within rounding" in page
    assert report.adapter_sha256[str(adapter)] in page


def test_it_is_the_rounded_difference(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="BF16")
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged")
    lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "out", report=False)
    terms = merge_float64(read_checkpoint(tmp_path / "merged"), [adapter], "weighted", [-1.0])
    assert_merged_like_float64(read_checkpoint(tmp_path / "out"), terms)
    assert not REPORTS & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "sequential"},
        {"strategy": "weighted", "weights": [0.75, -1.5]},
        {"strategy": "average"},
    ],
    ids=lambda how: how["strategy"],
)
@pytest.mark.parametrize("exact", [False, True])
def test_several_adapters(tmp_path: Path, how: dict[str, Any], exact: bool) -> None:
    base = make_base(tmp_path / "base", dtype="BF16")
    adapters = [
        make_adapter(tmp_path / "one"),
        make_adapter(tmp_path / "two", adapter_tensors(seed=7), lora_alpha=3),
    ]
    merged, out = tmp_path / "merged", tmp_path / "out"
    lorafast.merge(base, adapters, merged, **how)
    report = lorafast.subtract(merged, adapters, out, original=base if exact else None, **how)
    if exact:
        assert read_checkpoint(out) == read_checkpoint(base)
    else:
        assert_base_again(base, adapters, merged, out, report, **how)
    expected = {"average": [0.5, 0.5]}.get(how["strategy"], how.get("weights"))
    assert report.weights == expected


def test_one_of_two_adapters(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    stays = make_adapter(tmp_path / "stays")
    goes = make_adapter(tmp_path / "goes", adapter_tensors(seed=7), lora_alpha=3)
    lorafast.merge(base, [stays, goes], tmp_path / "both")
    lorafast.merge(base, stays, tmp_path / "one")
    report = lorafast.subtract(tmp_path / "both", goes, tmp_path / "out")
    assert report.bound is not None
    one, out = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "out")
    for name, value in one.items():
        error = np.abs(out[name].float64() - value.float64()).max()
        assert error <= 2 * report.bound["largest"]
    with pytest.raises(lorafast.VerificationError, match="all the adapters"):
        lorafast.subtract(tmp_path / "both", goes, tmp_path / "exact", original=base)


FLOATS = st.sampled_from(["F32", "BF16", "F16"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_merge_can_be_undone(data: st.DataObject) -> None:
    sizes = st.integers(1, 40)
    shapes = data.draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3), label="shapes")
    modules = {f"model.layers.{i}.self_attn.q_proj": shape for i, shape in enumerate(shapes)}
    count = data.draw(st.integers(1, 3), label="adapters")
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count), label="weights")
    how = {"strategy": "weighted", "weights": weights}
    dtype = data.draw(FLOATS, label="dtype")
    scale = data.draw(st.sampled_from([1e-3, 0.05, 2.0]), label="scale")
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder, "base"), modules=modules, dtype=dtype, scale=scale)
        adapters = []
        for number in range(count):
            rank = data.draw(st.integers(1, 12), label="rank")
            factors = adapter_tensors(
                modules, rank=rank, seed=number, dtype=data.draw(FLOATS, label="factors")
            )
            adapters.append(make_adapter(Path(folder, f"a{number}"), factors, r=rank))
        merged, out = Path(folder, "merged"), Path(folder, "out")
        lorafast.merge(base, adapters, merged, **how)
        report = lorafast.subtract(merged, adapters, out, **how)
        assert_base_again(base, adapters, merged, out, report, **how)
        lorafast.subtract(merged, adapters, Path(folder, "exact"), original=base, **how)
        assert read_checkpoint(Path(folder, "exact")) == read_checkpoint(base)


def test_with_the_base_at_hand_every_file_is_the_bases(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="F16", shards=3)
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged", dtype="bfloat16")
    report = lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "out", original=base)
    files = snapshot(tmp_path / "out")
    ours = REPORTS | {MANIFEST}
    assert {name: files[name] for name in files if name not in ours} == snapshot(base)
    assert (report.exact, report.bound) == (True, None)
    assert report.proof is not None
    assert report.proof["ok"]
    assert "byte for byte" in report.exactness()
    lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "wide", original=base, dtype="fp32")
    wide = read_checkpoint(tmp_path / "wide")
    for name, value in read_checkpoint(base).items():
        assert wide[name].dtype == "F32"
        assert (wide[name].float64() == value.float64()).all()


@pytest.mark.parametrize("action", ["copy", "merge"])
def test_a_wrong_merge_is_not_hidden(tmp_path: Path, action: str) -> None:
    """With the base at hand a copy would look right whatever was merged."""
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged")
    entries = lorafast.plan(base, adapter).to_dict()["tensors"]
    name = next(entry["name"] for entry in entries if entry["action"] == action)
    file = tmp_path / "merged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + start + 3] ^= 0x20
    file.write_bytes(data)
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.VerificationError, match=name) as caught:
        lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "out", original=base)
    assert "leave the original out" in str(caught.value)
    assert snapshot(tmp_path) == before


def trained_rows(tensors: dict[str, Tensor]) -> None:
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    tensors[key] = tensor(np.ones((2, 20)))


def magnitudes(tensors: dict[str, Tensor]) -> None:
    for module, (rows, _) in MODULES.items():
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(np.linspace(0.5, 1, rows))


def saved_norm(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}model.norm.weight"] = tensor(np.linspace(0.5, 1, 20))


NO_SUM = {
    "DoRA": ({"use_dora": True}, magnitudes, "DoRA"),
    "modules_to_save": ({"modules_to_save": ["norm"]}, saved_norm, "model.norm.weight"),
    "saved biases": ({"bias": "all"}, saved_norm, "model.norm.weight"),
    "trained tokens": (
        {"trainable_token_indices": {"embed_tokens": [1, 4]}},
        trained_rows,
        "trainable_tokens_delta",
    ),
}


@pytest.mark.parametrize("kind", NO_SUM)
def test_what_is_no_sum_needs_the_base(tmp_path: Path, kind: str) -> None:
    config, add, word = NO_SUM[kind]
    embedding = {"model.embed_tokens.weight": tensor(np.zeros((9, 20)))}
    base = make_base(tmp_path / "base", others=embedding)
    tensors = adapter_tensors()
    add(tensors)
    adapter = make_adapter(tmp_path / "adapter", tensors, **config)
    merged = tmp_path / "merged"
    lorafast.merge(base, adapter, merged)
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.PlanError) as caught:
        lorafast.subtract(merged, adapter, tmp_path / "out")
    assert word in str(caught.value)
    assert "original=" in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert snapshot(tmp_path) == before
    report = lorafast.subtract(merged, adapter, tmp_path / "out", original=base)
    assert report.exact
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(base)


STARTS: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "KaSA": {"kasa_config": {}},
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_that_changed_the_base_needs_the_base(tmp_path: Path, kind: str) -> None:
    tensors = adapter_tensors()
    if kind == "KaSA":
        diagonals = {f"{PREFIX}{module}.lora_diag": tensor(np.ones(4)) for module in MODULES}
        tensors |= diagonals
    adapter = make_adapter(tmp_path / "adapter", tensors, **STARTS[kind])
    merged = make_base(tmp_path / "merged")
    with pytest.raises(lorafast.PlanError, match="original=") as caught:
        lorafast.subtract(merged, adapter, tmp_path / "out")
    assert "took components out of the base" in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_merge_untied(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    embedding = {"model.embed_tokens.weight": tensor(random.normal(size=(9, 20)))}
    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "vocab_size": 9}
    base = make_base(tmp_path / "base", others=embedding, config=config)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors({"lm_head": (9, 20)}))
    merged = tmp_path / "merged"
    lorafast.merge(base, adapter, merged)
    report = lorafast.subtract(merged, adapter, tmp_path / "out")
    assert report.bound is not None
    after = read_checkpoint(tmp_path / "out")
    error = after["lm_head.weight"].float64() - after["model.embed_tokens.weight"].float64()
    assert np.abs(error).max() <= report.bound["largest"]
    lorafast.subtract(merged, adapter, tmp_path / "exact", original=base, report=False)
    (tmp_path / "exact" / MANIFEST).unlink()
    assert snapshot(tmp_path / "exact") == snapshot(base)


def test_little_change_in_wide_steps_is_a_warning(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="BF16", scale=1.0)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(scale=0.01))
    lorafast.merge(base, adapter, tmp_path / "merged")
    report = lorafast.subtract(tmp_path / "merged", adapter, tmp_path / "out")
    assert any("rounding" in warning for warning in report.warnings)
    assert "**Warning:**" in report.to_markdown()


def test_places_that_must_not_be_written(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    merged = tmp_path / "merged"
    lorafast.merge(base, adapter, merged)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    for original in (None, base):
        for output in (merged, merged / "within", adapter):
            with pytest.raises(lorafast.OutputError, match="give another directory"):
                lorafast.subtract(merged, adapter, output, original=original, overwrite=True)
        with pytest.raises(lorafast.OutputError, match="not empty"):
            lorafast.subtract(merged, adapter, occupied, original=original)
    with pytest.raises(lorafast.OutputError, match="give another directory"):
        lorafast.subtract(merged, adapter, base, original=base, overwrite=True)
    assert snapshot(tmp_path) == before
    lorafast.subtract(merged, adapter, occupied, overwrite=True)
    assert (occupied / "notes.txt").read_text() == "mine"
    assert not list(occupied.glob(".lorafast-partial*"))
    # A report tells of the directory that it lies in, and goes no further.
    lorafast.merge(occupied, adapter, tmp_path / "again", report=False)
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert not names & REPORTS


def test_bad_arguments(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    merged, out = tmp_path / "merged", tmp_path / "out"
    lorafast.merge(base, adapter, merged)
    with pytest.raises(ValueError, match="unknown dtype"):
        lorafast.subtract(merged, adapter, out, dtype="int8", original=base)
    with pytest.raises(ValueError, match="threads"):
        lorafast.subtract(merged, adapter, out, threads=0)
    with pytest.raises(ValueError, match="no adapter"):
        lorafast.subtract(merged, [], out)
    with pytest.raises(ValueError, match="weights"):
        lorafast.subtract(merged, adapter, out, strategy="weighted", weights=[1, 2])
    with pytest.raises(FileNotFoundError, match="absent"):
        lorafast.subtract(tmp_path / "absent", adapter, out)
    with pytest.raises(FileNotFoundError, match="absent"):
        lorafast.subtract(merged, adapter, out, original=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        lorafast.subtract(tmp_path / "absent", adapter, out, original=base)
    other = make_adapter(tmp_path / "other", adapter_tensors({"elsewhere.q_proj": (3, 4)}))
    with pytest.raises(lorafast.PlanError, match="elsewhere"):
        lorafast.subtract(merged, other, out)
    assert not out.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    merged = tmp_path / "merged"
    lorafast.merge(base, adapter, merged)
    words = ["subtract", "--merged", str(merged), "--adapters", str(adapter)]
    words += ["--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "to within rounding" in capsys.readouterr().out
    assert main(words) == 1
    assert "not empty" in capsys.readouterr().err
    exact = [*words, "--base", str(base), "--overwrite", "--json", "--no-report"]
    assert main(exact) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(base)
    assert main([*exact, "--strategy", "weighted", "--weights", "2"]) == 1
    assert "times the right one" in capsys.readouterr().err
    assert main(["subtract", "--merged", str(merged), "--output", "out"]) == 2
    assert "required: --adapters" in capsys.readouterr().err
