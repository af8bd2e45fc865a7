"""An adapter of PEFT's older format, a pickle: `adapter_model.bin`."""

from __future__ import annotations

import gc
import pickle
import warnings
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.files import read_checkpoint
from support.handmade import make_adapter, make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def test_nothing_is_unpickled(tmp_path: Path, base: Path) -> None:
    """A .bin is read with weights_only: what it would run is not run."""
    pytest.importorskip("torch")
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    witness = tmp_path / "witness"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"lora_A.weight": Payload()}))
    with pytest.raises(lorafast.AdapterError, match=r"adapter_model\.bin"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not witness.exists()
    assert not (tmp_path / "out").exists()


def test_a_bin_holds_the_same_adapter(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "expected")
    pickle_weights(adapter)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "expected")


def pickle_weights(adapter: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def test_a_bin_leaves_no_temporary_files(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    pickle_weights(adapter)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorafast.merge(base, adapter, tmp_path / "out")
        gc.collect()
    assert not list(scratch.iterdir())
    assert not [w for w in caught if issubclass(w.category, ResourceWarning)]
