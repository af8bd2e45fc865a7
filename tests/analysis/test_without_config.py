"""Weights whose config is not there: ranks and spectra show, and what needs the scale is blank."""

from __future__ import annotations

import math
from pathlib import Path

import lorafast
import pytest
from lorafast._cli.main import main
from support.files import write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base

#: What does not depend on the scale.
SCALE_FREE = ("stable_rank", "effective_rank", "k90", "k99", "numerical_rank")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").unlink()
    return adapter


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "style.safetensors"])
def test_info_shows_weights_without_their_config(name: str, tmp_path: Path) -> None:
    (tmp_path / "lone").mkdir()
    file = write_safetensors(tmp_path / "lone" / name, adapter_tensors(rank=4))
    for given in (file, file.parent):
        listing = lorafast.inspect(given)
        assert isinstance(listing, lorafast.AdapterListing)
        assert (listing.r, listing.alpha, listing.base) == (4, None, None)
        assert [module.name for module in listing.modules] == list(MODULES)
        assert {(module.rank, module.alpha, module.scaling) for module in listing.modules} == {
            (4, None, None)
        }
        assert any("has no adapter_config.json" in feature for feature in listing.features)


def test_analyze_leaves_blank_what_needs_the_scale(bare: Path, tmp_path: Path) -> None:
    whole = lorafast.analyze(make_adapter(tmp_path / "whole", lora_alpha=6))
    found = lorafast.analyze(bare)
    for path, module in found.modules.items():
        known = whole.modules[path]
        for metric in SCALE_FREE:
            assert getattr(module, metric) == pytest.approx(getattr(known, metric))
        assert all(map(math.isnan, (module.frobenius_norm, module.spectral_norm, module.scaling)))
        assert all(map(math.isnan, module.singular_values))
    kinds = {finding.kind for finding in found.findings}
    assert not kinds & {"non_finite", "unusual_scale", "untrained", "zero_update", "dead_module"}
    assert any("--alpha, --scale" in finding.reason for finding in found.findings)


def test_an_alpha_or_a_scale_gives_the_figures_of_the_config(bare: Path, tmp_path: Path) -> None:
    whole = lorafast.analyze(make_adapter(tmp_path / "whole", lora_alpha=6))
    for options in ({"alpha": 6.0}, {"scale": 1.5}):
        found = lorafast.analyze(bare / "adapter_model.safetensors", **options)
        for path, module in found.modules.items():
            assert module.singular_values == whole.modules[path].singular_values
            assert (module.alpha, module.scaling) == (6.0, 1.5)


def test_what_is_given_needlessly_or_wrongly_is_refused(bare: Path, tmp_path: Path) -> None:
    whole = make_adapter(tmp_path / "whole")
    with pytest.raises(ValueError, match="tells its scale itself"):
        lorafast.analyze(whole, alpha=4)
    with pytest.raises(ValueError, match="give one of them"):
        lorafast.analyze(bare, alpha=4, scale=1)
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        lorafast.analyze(bare, alpha=math.nan)


def test_what_needs_the_scale_and_cannot_be_blank_refuses(bare: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    other = make_adapter(tmp_path / "other")
    for read in (
        lambda: lorafast.plan(base, bare),
        lambda: lorafast.plan(base, bare / "adapter_model.safetensors"),
        lambda: lorafast.compare([other, bare]),
    ):
        with pytest.raises(lorafast.AdapterError, match=r"holds no adapter_config\.json; it is a"):
            read()
    (error,) = lorafast.scan(bare).errors
    assert error.reason.startswith("holds no adapter_config.json; it is a LoRA in PEFT's names")


def test_the_commands_show_it(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bare / "adapter_model.safetensors")]) == 0
    assert "nan" not in capsys.readouterr().out
    assert main(["analyze", str(bare)]) == 0
    shown = capsys.readouterr().out
    assert "not known" in shown
    assert "nan" not in shown
    assert main(["analyze", str(bare), "--scale", "2"]) == 0
    assert "not known" not in capsys.readouterr().out
