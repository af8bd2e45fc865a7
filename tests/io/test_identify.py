"""Files and directories that are not what they were given as: every command says what they are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, encode, tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

WEIGHTS = "adapter_model.safetensors"


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"model.layers.0.lora_a": np.zeros((4, 2))})
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("adapter/" + WEIGHTS))
    return buffer.getvalue()


def torch_file(**options: Any) -> bytes:
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, buffer, **options)
    return buffer.getvalue()


#: What may lie under the name of weights, and what of it a message says: what it is, what to do.
CONTENTS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "git lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 33571976\n",
        "is a Git LFS pointer, which stands for the file itself of 33571976 bytes",
        "git lfs pull",
    ),
    "git-annex": (
        lambda: b"/annex/objects/MD5E-s1--a.safetensors\n",
        "is a git-annex pointer",
        "git annex get",
    ),
    "login page": (
        lambda: b"<!doctype html>\n<html><head><title>Log in</title></head></html>",
        "is an HTML page (its title: “Log in”)",
        "fetch the file itself again",
    ),
    "storage error": (
        lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "is the error “AccessDenied” of a server",
        "fetch",
    ),
    "json error": (lambda: b'{"error": "Invalid credentials"}', "is JSON, no weights", "fetch"),
    "text": (lambda: b"Entry not found", "is a text, no weights (it begins with “Entry", "fetch"),
    "gguf": (lambda: b"GGUF\3\0\0\0" + bytes(40), "is a GGUF model", "safetensors files"),
    "npz": (npz, "is an NPZ archive of NumPy arrays (the first: model.layers.0.lora_a)", "save"),
    "torch": (torch_file, "is a PyTorch file", "name it adapter_model.bin"),
    "old torch": (
        lambda: torch_file(_use_new_zipfile_serialization=False),
        "is a PyTorch file in the form before 1.6",
        "name it adapter_model.bin",
    ),
    "pickle": (lambda: b"\x80\x04}\x94.", "is a Python pickle", "safetensors"),
    "gzip": (lambda: b"\x1f\x8b\x08\0\0\0\0\0\0\3", "is a gzip archive", "unpack it"),
    "tar": (tar, "is a tar archive", "unpack it"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(8), "is an HDF5 file", "safetensors"),
    "onnx": (lambda: b"\x08\x08\x12\x07pytorch", "is an ONNX model", "safetensors files"),
    "empty": (lambda: b"", "is an empty file", "fetch"),
    "zeros": (lambda: bytes(4096), "is full of zeros", "fetch"),
}


def messages(base: Path, given: Path) -> dict[str, str]:
    """What each way of reading an adapter says of one that cannot be read."""
    said: dict[str, str] = {}
    for name, read in {
        "plan": lambda: lorafast.plan(base, given),
        "inspect": lambda: lorafast.inspect(given),
        "analyze": lambda: lorafast.analyze(given),
        "verify": lambda: lorafast.verify(base, given, base),
    }.items():
        with pytest.raises(lorafast.LorafastError) as raised:
            read()
        said[name] = str(raised.value)
    (error,) = lorafast.scan(given).errors
    said["scan"] = error.reason
    return said


@pytest.mark.parametrize("what", CONTENTS)
def test_weights_that_are_none_are_named_by_everything(what: str, tmp_path: Path) -> None:
    content, says, advises = CONTENTS[what]
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / WEIGHTS).write_bytes(content())
    lone = tmp_path / "style_lora.safetensors"
    lone.write_bytes(content())
    for given in (adapter, adapter / WEIGHTS, lone):
        for said in messages(base, given).values():
            assert says in said, said
            assert advises in said.partition(says)[2], said
    with pytest.raises(lorafast.CheckpointError) as raised:
        lorafast.plan(lone, make_adapter(tmp_path / "sound"))
    assert says in str(raised.value)


@pytest.mark.parametrize("what", ["git lfs", "login page", "gguf", "npz", "empty"])
def test_a_pickle_that_is_none_is_named_without_unpickling(what: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    content, says, _ = CONTENTS[what]
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(content())
    if what == "npz":
        says = "holds"
    for given in (adapter, adapter / "adapter_model.bin"):
        for said in messages(make_base(tmp_path / f"base-{given.name}"), given).values():
            assert says in said or "cannot be read as plain tensors" in said, said


def test_files_that_torch_saves_are_read_by_their_own_path(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapter = make_adapter(tmp_path / "adapter")
    base = make_base(tmp_path / "base")
    expected = lorafast.plan(base, adapter).tensors
    tensors = {
        name: torch.from_numpy(value.float64().astype(np.float32))
        for name, value in adapter_tensors().items()
    }
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "lora.pt")
    # Beside a config, but under a name that nobody knows.
    with pytest.raises(lorafast.AdapterError, match=r"only lora\.pt, which is a PyTorch file"):
        lorafast.plan(base, adapter)
    assert lorafast.plan(base, adapter / "lora.pt").tensors == expected
    assert lorafast.inspect(adapter / "lora.pt").kind == "adapter"
    torch.save(list(tensors.values()), adapter / "lora.pt")
    with pytest.raises(lorafast.AdapterError, match=r"is a list of 8 tensors.*no pairs of factors"):
        lorafast.inspect(adapter / "lora.pt")
    torch.save({"step": 3, "model": tensors}, adapter / "lora.pt")
    with pytest.raises(lorafast.AdapterError, match="such as model"):
        lorafast.inspect(adapter / "lora.pt")


def renamed(rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name.removeprefix(PREFIX)): value for name, value in adapter_tensors().items()}


def swapped(name: str, a: str, b: str) -> str:
    return name.replace(".lora_A.weight", a).replace(".lora_B.weight", b)


#: A LoRA's keys in other formats, and what a message calls them.
FORMATS: dict[str, tuple[dict[str, Tensor], str]] = {
    "lycoris": (
        renamed(lambda n: "lora_unet_" + swapped(n, ".hada_w1_a", ".hada_w1_b")),
        "a LoHa of LyCORIS's",
    ),
    "megatron": (
        renamed(lambda n: swapped(n, ".adapter.linear_in.weight", ".adapter.linear_out.weight")),
        "a LoRA of Megatron's",
    ),
}
#: Those that are read, or never will be, and what a message says to do.
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "mlx": (
        renamed(lambda n: swapped(n, ".lora_a", ".lora_b")),
        "only its own config tells its scale",
    ),
    "t-lora": (
        renamed(lambda n: "lora_unet_" + swapped(n, ".q_layer.weight", ".p_layer.weight")),
        "save it as a plain LoRA",
    ),
    "control-lora": (
        {"lora_controlnet": tensor(np.ones(1)), "input_blocks.0.0.up": tensor(np.ones((4, 2)))},
        "load it as a ControlNet",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_to_do_with_an_adapter_is_said(name: str, tmp_path: Path) -> None:
    tensors, advice = OTHERS[name]
    base = make_base(tmp_path / "base")
    (tmp_path / "lone").mkdir()
    write_safetensors(tmp_path / "lone" / "lora.safetensors", tensors)
    for read in (partial(lorafast.plan, base), lorafast.analyze):
        with pytest.raises(lorafast.UnsupportedAdapterError, match=advice):
            read(tmp_path / "lone")


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_of_another_format_is_called_so(name: str, tmp_path: Path) -> None:
    tensors, what = FORMATS[name]
    base = make_base(tmp_path / "base")
    (tmp_path / "lone").mkdir()
    file = write_safetensors(tmp_path / "lone" / "lora.safetensors", tensors)
    for given in (file, file.parent):
        for read in (partial(lorafast.plan, base), lorafast.analyze):
            with pytest.raises(lorafast.UnsupportedAdapterError) as raised:
                read(given)
            assert what in str(raised.value)
            advice = (
                "export it under PEFT's" if name == "megatron" else "cannot be read yet; convert it"
            )
            assert advice in str(raised.value)
        (error,) = lorafast.scan(given).errors
        assert what in error.reason
        # Its tensors can be listed all the same, as an adapter's.
        listing = lorafast.inspect(given)
        assert isinstance(listing, lorafast.AdapterListing)
        assert listing.format is None
        assert what in str(listing.type)
        assert {each.name for each in listing.tensors} == set(tensors)
        assert {use.use for use in listing.tensors_use} == {"refused"}
    # A config that lies beside it makes it no adapter of PEFT's.
    beside = make_adapter(tmp_path / "peft")
    given = write_safetensors(beside / "other.safetensors", tensors)
    with pytest.raises(lorafast.UnsupportedAdapterError) as raised:
        lorafast.plan(base, given)
    assert what in str(raised.value)
    # As a base it is refused as what it is.
    with pytest.raises(lorafast.CheckpointError, match="not a base model; give it as an adapter"):
        lorafast.plan(file, make_adapter(tmp_path / "sound"))


def test_metadata_of_null_is_none(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    file.write_bytes(encode(json.dumps({"__metadata__": None, "x": entry}), bytes(4)))
    assert lorafast.inspect(file).metadata == {}


def test_a_kohya_file_beside_a_config_is_read_as_kohya_s(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    flat = renamed(lambda n: swapped(n.replace(".", "_"), "", ""))
    tensors = {}
    for key, value in flat.items():
        side = "lora_down" if key.endswith("lora_A_weight") else "lora_up"
        tensors[f"lora_unet_{key[: -len('_lora_A_weight')]}.{side}.weight"] = value
    adapter = make_adapter(tmp_path / "adapter", r=8, lora_alpha=99)
    file = write_safetensors(adapter / "style.safetensors", tensors)
    assert lorafast.plan(base, file).to_dict()["adapters"][0]["format"] == "kohya"


# --- directories ---------------------------------------------------------------------------


def refusal(given: Path) -> str:
    with pytest.raises(lorafast.AdapterError) as raised:
        lorafast.analyze(given)
    return str(raised.value)


def hub_cache(root: Path, revision: str = "abc") -> Path:
    """A cached repository with an adapter; its files are links to blobs."""
    cache = root / "models--owner--style"
    snapshot = make_adapter(cache / "snapshots" / revision)
    (cache / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        blob = cache / "blobs" / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    return cache


def test_the_hub_s_cache_is_told_with_the_snapshot_to_give(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path / "hub")
    said = refusal(cache)
    assert "is the hub's cache of owner/style; give its snapshot, the folder snapshots/abc" in said
    said = refusal(cache.parent)
    assert "is the hub's cache, with 1 model (models--owner--style)" in said
    assert "owner/style" in said
    with pytest.raises(lorafast.CheckpointError, match="snapshots/abc"):
        lorafast.inspect(cache)
    assert lorafast.inspect(cache / "snapshots" / "abc").kind == "adapter"
    assert lorafast.scan(cache).names == ["snapshots/abc"]
    (cache / "blobs" / f"blob-{WEIGHTS}").unlink()
    for said in messages_of_missing(cache / "snapshots" / "abc"):
        assert "blobs/" in said
        assert "which is not there; fetch it again" in said


def messages_of_missing(given: Path) -> list[str]:
    said = [error.reason for error in lorafast.scan(given).errors]
    for read in (lorafast.inspect, lorafast.analyze):
        with pytest.raises((lorafast.LorafastError, OSError)) as raised:
            read(given)
        said.append(str(raised.value))
    return said


def test_a_training_run_is_told_with_its_last_checkpoint(tmp_path: Path) -> None:
    for number in (20, 500, 1000):
        make_adapter(tmp_path / "run" / f"checkpoint-{number}")
    said = refusal(tmp_path / "run")
    assert "is the directory of a training run, with 3 checkpoints" in said
    assert "such as checkpoint-1000" in said
    with pytest.raises(lorafast.CheckpointError, match="training run"):
        lorafast.plan(tmp_path / "run", make_adapter(tmp_path / "a"))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["global_step5/mp_rank_00_model_states.pt", "latest"], "a checkpoint of DeepSpeed's"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "a checkpoint of DeepSpeed's"),
        (["__0_0.distcp", ".metadata"], "a checkpoint of FSDP's"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "a checkpoint of FSDP's"),
        (
            ["iter_0000005/x.pt", "latest_checkpointed_iteration.txt"],
            "a checkpoint of Megatron's or NeMo's (iter_0000005)",
        ),
        (["config.json", "model.safetensors"], "a whole model, not an adapter"),
        (["model_index.json", "unet/x.safetensors"], "a diffusers pipeline, not an adapter"),
        (["notes.txt"], "a directory without weights, with 1 entry (notes.txt)"),
        ([], "an empty directory"),
    ],
)
def test_a_directory_is_told_by_its_names(names: list[str], says: str, tmp_path: Path) -> None:
    root = tmp_path / "given"
    root.mkdir()
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    assert f"is {says}" in refusal(root)


def test_folders_of_adapters_are_listed_and_no_sibling_is_recommended(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    make_adapter(fleet / "a")
    said = refusal(fleet)
    assert "a folder in it is one; give that folder, a" in said
    make_adapter(fleet / "b")
    assert "its folders are: 2 adapters (a, b); give one of these folders" in refusal(fleet)
    # A file that has nothing to do with them is told by itself.
    model = write_safetensors(fleet / "x.safetensors", {"model.norm.weight": tensor(np.ones(3))})
    (fleet / "notes.csv").write_text("name,rank\n")
    for given in (model, fleet / "notes.csv"):
        said = refusal(given)
        assert "give that folder" not in said
        assert "its folders" not in said
        assert "have a model's names" in said or "is a text, no weights" in said
    config = fleet / "a" / "adapter_config.json"
    assert "is the config of an adapter; give the directory" in refusal(config)


# --- weights that were saved without their values -------------------------------------------


def test_tensors_that_zero_3_left_empty_are_told(tmp_path: Path) -> None:
    empty = {name: tensor(np.zeros(0)) for name in adapter_tensors()}
    adapter = make_adapter(tmp_path / "adapter", empty)
    base = make_base(tmp_path / "base")
    for said in messages(base, adapter).values():
        assert "holds no values in 8 of its 8 tensors" in said
        assert "ZeRO-3" in said
        assert "zero_to_fp32.py" in said
    names = [f"{module}.weight" for module in MODULES]
    write_safetensors(base / "model.safetensors", {n: tensor(np.zeros(0)) for n in names})
    assert "ZeRO-3" in lorafast.inspect(base).warnings[0]
    with pytest.raises(lorafast.CheckpointError, match="ZeRO-3"):
        lorafast.plan(base, make_adapter(tmp_path / "sound"))
