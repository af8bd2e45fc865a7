"""How large what a comparison writes is, and what of it comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from lorafast._io.plain import json_text
from lorafast._report.serialize import from_plain
from support.analysis import random_factors, write_factors

MODULES = 8
SHAPES = {f"model.layers.{i}.self_attn.q_proj": (24, 16, 4) for i in range(MODULES)}
MANY = 12
#: Bytes of JSON for each pair of adapters, of as many modules, …
BYTES_A_PAIR = 2_000
#: … and where the modules are compared, for each pair and module.
BYTES_A_MODULE = 2_500

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("many")
    return [
        str(write_factors(root / f"a{i:02}", random_factors(SHAPES, i), dtype="F32"))
        for i in range(MANY)
    ]


def pairs(count: int) -> float:
    return count * (count - 1) / 2


def test_the_json_of_many_is_small(many: list[str]) -> None:
    comparison = lorafast.compare(many)
    assert not comparison.modules_compared
    text = comparison.to_json()
    assert len(text) < BYTES_A_PAIR * pairs(MANY)
    plain = json.loads(text)
    assert np.array(plain["cosine"]).shape == (MANY, MANY)
    # What grows with the pairs is the matrix of cosines alone.
    fewer = lorafast.compare(many[: MANY // 2], modules=False).to_json()
    assert len(text) < 2.2 * len(fewer) + 25 * MANY**2
    for own in plain["analyses"]:
        assert set(own) == {"name", "path", "config", "summary", "findings", "weights"}
    for module in plain["modules"].values():
        assert len(module["norms"]) == len(module["ranks"]) == MANY
        assert "pairs" not in module
        assert "cosine" not in module


def test_modules_are_compared_up_to_ten_and_where_it_is_asked_for(many: list[str]) -> None:
    ten = lorafast.compare(many[:10])
    assert ten.modules_compared
    assert len(next(iter(ten.modules.values())).pairs) == pairs(10)
    assert len(ten.to_json()) < BYTES_A_MODULE * pairs(10) * MODULES
    asked = lorafast.compare(many, modules=True)
    assert asked.modules_compared
    assert len(next(iter(asked.modules.values())).pairs) == pairs(MANY)
    less = lorafast.compare(many)
    assert np.array_equal(asked.cosine, less.cosine)
    assert asked.findings == less.findings
    assert asked.only_in == less.only_in
    for path, module in less.modules.items():
        other = asked.modules[path]
        assert module.norms == other.norms
        assert (module.block, module.layer) == (other.block, other.layer)
        assert module.pairs == []
        assert np.isnan(module.cosine).all()
        assert module.cosine.shape == (MANY, MANY)
        # A view, so that thousands of modules take no memory.
        assert module.cosine.strides == (0, 0)
    assert not lorafast.compare(many[:2], modules=False).modules_compared


@pytest.mark.parametrize("count", [3, MANY])
def test_what_was_written_reads_back(many: list[str], count: int) -> None:
    comparison = lorafast.compare(many[:count])
    back = from_plain(json.loads(comparison.to_json()))
    assert isinstance(back, lorafast.Comparison)
    assert back.to_json() == comparison.to_json()
    assert back.modules_compared == (count == 3)
    assert np.array_equal(back.cosine, comparison.cosine)
    for path, module in comparison.modules.items():
        other = back.modules[path]
        assert (other.block, other.layer) == (module.block, "self_attn.q_proj")
        assert other.pairs == module.pairs
        for name in ("cosine", "subspace", "sign_agreement"):
            np.testing.assert_array_equal(getattr(other, name), getattr(module, name))
    for own, other in zip(comparison.analyses, back.analyses, strict=True):
        assert (other.summary, other.weights) == (own.summary, own.weights)
    # The pages need no more than that, nor does the picture of the distributions.
    panels = back.plot("distributions").axes
    assert panels[0].get_title("left") == "Weights of A and B"
    assert all(axes.patches or axes.images for axes in panels)
    assert back.to_markdown() == comparison.to_markdown()
    assert _without_pictures(back.to_html()) == _without_pictures(comparison.to_html())


def _without_pictures(page: str) -> str:
    return "".join(part.partition('"')[2] for part in page.split("data:image/png;base64,"))


def test_comparisons_of_earlier_releases_are_read(many: list[str]) -> None:
    comparison = lorafast.compare(many[:3])
    plain: dict[str, Any] = json.loads(comparison.to_json())
    del plain["modules_compared"]
    plain["analyses"] = [json.loads(own.to_json()) for own in comparison.analyses]
    for module in plain["modules"].values():
        del module["block"], module["layer"]
    back = from_plain(plain)
    assert isinstance(back, lorafast.Comparison)
    assert back.modules_compared
    assert back.analyses[0].modules.keys() == SHAPES.keys()
    for path, module in comparison.modules.items():
        own = back.modules[path]
        assert (own.block, own.layer) == (module.block, module.layer)


def test_the_pages_of_many_say_what_was_not_compared(many: list[str]) -> None:
    less = lorafast.compare(many)
    for page in (less.to_markdown(), less.to_html()):
        assert "The updates of single modules were not compared" in page
        assert "--modules" in page
    assert len(less.to_markdown().splitlines()) < 200
    assert "mean cosine" not in less.to_html()
    with pytest.raises(ValueError, match="modules=True"):
        less.plot("modules")
    more = lorafast.compare(many, modules=True)
    for page in (more.to_markdown(), more.to_html()):
        assert "were not compared" not in page
    assert "mean cosine" in more.to_html()
    assert more.plot("modules").axes
    for frame in (less.to_pandas, less.to_polars):
        with pytest.raises(ValueError, match=r"compare.*modules=True.*table='modules'"):
            frame()
    assert len(less.to_pandas("modules")) == len(more.to_pandas("modules"))
    assert len(more.to_pandas()) == pairs(len(more.names)) * len(more.modules)


def test_the_commands_files_are_small_and_read_again(
    many: list[str], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out"
    command = ["compare", *many, "--output", str(output), "--no-plots", "--quiet"]
    assert main(command) == 0
    file = output / "analysis" / "adapter_comparison.json"
    # NeuroTrain's figures of each tensor are in it, once.
    assert file.stat().st_size < 3 * BYTES_A_PAIR * pairs(MANY)
    written = json.loads(file.read_text())
    assert list(written["comparison_data"]) == [f"a{i:02}" for i in range(MANY)]
    assert len(list((output / "analysis").glob("*_analysis.json"))) == MANY
    page = output / "analysis" / "comparison_report.md"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(output), "--quiet"]) == 0
    assert page.read_text() == before
    capsys.readouterr()
    assert main(["compare", *many, "--json"]) == 0
    printed = capsys.readouterr().out
    assert len(printed) < BYTES_A_PAIR * pairs(MANY)
    assert main(["compare", *many, "--json", "--modules"]) == 0
    assert len(json.loads(capsys.readouterr().out)["modules"][next(iter(SHAPES))]["pairs"]) == 66
    assert main(["compare", *many]) == 0
    assert "--modules" in capsys.readouterr().out


def test_adapters_of_two_models_are_told_of_once_a_module(tmp_path: Path) -> None:
    paths = []
    for i in range(12):
        shapes = {path: (m + i % 2, n, r) for path, (m, n, r) in SHAPES.items()}
        paths.append(write_factors(tmp_path / f"b{i}", random_factors(shapes, i)))
    comparison = lorafast.compare(paths)
    unmeasured = [each for each in comparison.findings if each.kind == "unmeasured"]
    assert len(unmeasured) == MODULES
    assert np.isnan(comparison.cosine[0, 1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2.5, None, True], "[1, 2.5, null, true]"),
        ([[1, 2], [3e-20, -4]], "[\n  [1, 2],\n  [3e-20, -4]\n]"),
        ([], "[]"),
        ({"a": [float("nan")]}, '{\n  "a": [null]\n}'),
        (["[\n  1\n]", 2], '[\n  "[\\n  1\\n]",\n  2\n]'),
    ],
)
def test_lists_of_numbers_are_one_line(value: Any, text: str) -> None:
    assert json_text(value) == text
    assert json.loads(text) == json.loads(json.dumps(value).replace("NaN", "null"))
