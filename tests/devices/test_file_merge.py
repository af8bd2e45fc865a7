"""Merging files through torch: what goes wrong, what falls back, and what bounds hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from lorafast._cli.main import main
from lorafast._io import device_names
from lorafast._torch import choice, file_merge
from lorafast._torch import device as device_module
from support.files import Tensor, read_checkpoint, snapshot, tensor
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint
from support.quantised import SCHEMES
from support.refusal import make_previous

MODULES = {"model.layers.0.q_proj": (500, 300), "model.layers.0.up_proj": (70, 40)}
CUDA = torch.cuda.is_available()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", modules=MODULES, dtype="BF16", shards=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", adapter_tensors(MODULES, scale=0.1))


def assert_near(ours: dict[str, Tensor], cpu: dict[str, Tensor]) -> None:
    assert ours.keys() == cpu.keys()
    for name, value in cpu.items():
        if value.dtype == "BF16" or (value.dtype.startswith("F") and "_" not in value.dtype):
            error = np.abs(ours[name].float64() - value.float64())
            assert (error <= 2.0**-7 * np.abs(value.float64()) + 1e-7).all(), name
        else:
            assert ours[name] == value, name


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> lorafast.MergeReport:
    lorafast.merge(base, adapter, output.with_name("cpu"), overwrite=True)
    report = lorafast.merge(base, adapter, output, device="torch:cpu", **options)
    assert_near(read_checkpoint(output), read_checkpoint(output.with_name("cpu")))
    return report


# Memory


class Halved:
    """A device on which only so many rows can be computed at a time."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError | None = None
    ) -> None:
        self.seen: list[int] = []
        apply = file_merge.Program.apply

        def limited(program: Any, tile: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.seen.append(len(tile))
            if len(tile) > most:
                raise error or torch.OutOfMemoryError("no room")
            return apply(program, tile, *rest)

        monkeypatch.setattr(file_merge.Program, "apply", limited)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_the_tile(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
) -> None:
    halved = Halved(monkeypatch, 130, error)
    report = merged(base, adapter, tmp_path / "out")
    assert report.fallbacks == {}
    assert halved.seen[:3] == [500, 250, 125]
    assert sum(rows for rows in halved.seen if rows <= 130) == 500 + 70


def test_an_error_of_the_device_is_not_taken_for_want_of_memory(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Halved(monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_never_fits_is_merged_on_the_cpu(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Halved(monkeypatch, 0)
    report = merged(base, adapter, tmp_path / "out")
    ((reason, names),) = report.fallbacks.items()
    assert "memory" in reason
    assert sorted(names) == [f"{module}.weight" for module in MODULES]
    assert "Merged on the CPU" in report.to_markdown()
    assert json.loads(report.to_json())["fallbacks"] == report.fallbacks


def test_the_bound_on_device_memory_makes_tiles_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"model.layers.0.q_proj": (3000, 1000)}
    base = make_base(tmp_path / "base", modules=modules, dtype="BF16")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules, scale=0.1))
    tiles = []
    apply = file_merge.Program.apply

    def noted(program: Any, tile: torch.Tensor, *rest: Any) -> torch.Tensor:
        # Every tile on its way, each in and out, and the work on one.
        moving = file_merge.TILES * 2 * tile.numel() * 2
        tiles.append(program.bytes + moving + tile.numel() * program.work_size)
        return apply(program, tile, *rest)

    monkeypatch.setattr(file_merge.Program, "apply", noted)
    report = merged(base, adapter, tmp_path / "out", device_memory="2MiB")
    assert report.fallbacks == {}
    assert len(tiles) > 5
    assert max(tiles) <= 2 << 20
    tiles.clear()
    lorafast.merge(base, adapter, tmp_path / "more", device="torch:cpu")
    assert len(tiles) == -(-3000 // (file_merge.TILE_BYTES["cpu"] // 2000))


def test_factors_beyond_the_bound_fall_back(tmp_path: Path) -> None:
    modules = {"model.layers.0.q_proj": (3000, 1000)}
    base = make_base(tmp_path / "base", modules=modules, dtype="F32")
    tensors = adapter_tensors(modules, rank=80, scale=0.1)
    adapter = make_adapter(tmp_path / "adapter", tensors, r=80, lora_alpha=80)
    report = merged(base, adapter, tmp_path / "out", device_memory=1 << 20)
    ((_, names),) = report.fallbacks.items()
    assert names == ["model.layers.0.q_proj.weight"]


# What stays with the CPU


def test_quantised_weights_stay_with_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = SCHEMES[0]
    random = np.random.default_rng(3)
    weight = random.normal(scale=0.05, size=(300, 260))
    base = make_base(
        tmp_path / "base",
        modules={"model.layers.0.up_proj": (70, 40)},
        dtype="BF16",
        config={"quantization_config": dict(scheme.config)},
        others=scheme.quantise("model.layers.0.q_proj.weight", weight),
    )
    modules = {"model.layers.0.q_proj": (300, 260), "model.layers.0.up_proj": (70, 40)}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules, scale=0.1))
    report = merged(base, adapter, tmp_path / "out")
    ((reason, names),) = report.fallbacks.items()
    assert "quantised" in reason
    assert names == ["model.layers.0.q_proj.weight"]
    arguments = ["--base", str(base), "--adapters", str(adapter), "--output", str(tmp_path / "o")]
    assert main(["merge", *arguments, "--device", "torch:cpu"]) == 0
    assert "1 tensor merged on the CPU: quantised" in " ".join(capsys.readouterr().out.split())


# Failures leave nothing behind


def test_an_overflow_names_the_tensor_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = adapter_tensors(MODULES, scale=0.1)
    name = "base_model.model.model.layers.0.up_proj.lora_A.weight"
    values = tensors[name].float64().copy()
    values[1, 7] = np.nan
    tensors[name] = tensor(values)
    adapter = make_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lorafast.NumericError) as on_cpu:
        lorafast.merge(base, adapter, tmp_path / "out")
    with pytest.raises(lorafast.NumericError) as caught:
        lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu")
    assert str(caught.value) == str(on_cpu.value)
    assert "up_proj" in str(caught.value)
    assert "column 7" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_infinities_of_the_base_are_carried_through(adapter: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(70, 40))
    weight[3, 5] = np.inf
    weight[4, 6] = np.nan
    others = {"model.layers.0.up_proj.weight": tensor(weight, "BF16")}
    first = {"model.layers.0.q_proj": MODULES["model.layers.0.q_proj"]}
    base = make_base(tmp_path / "b", modules=first, dtype="BF16", others=others)
    lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu")
    values = read_checkpoint(tmp_path / "out")["model.layers.0.up_proj.weight"].float64()
    assert np.isposinf(values[3, 5])
    assert np.isnan(values[4, 6])
    assert np.isfinite(values).sum() == 70 * 40 - 2


@pytest.mark.parametrize("where", ["apply", "progress", "rest"])
def test_whatever_stops_it_leaves_the_output_as_it_was(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    previous = tmp_path / "out"
    make_previous(previous)
    before = snapshot(previous)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    options: dict[str, Any] = {}
    if where == "apply":
        monkeypatch.setattr(file_merge.Program, "apply", fail)
    elif where == "progress":
        options["progress"] = fail
    else:
        monkeypatch.setattr(file_merge._Merge, "_check_rest", fail)
    with pytest.raises(KeyboardInterrupt):
        lorafast.merge(base, adapter, previous, device="torch:cpu", overwrite=True, **options)
    assert snapshot(previous) == before


def test_progress_reaches_the_end_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    lorafast.merge(
        base,
        adapter,
        tmp_path / "out",
        device="torch:cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] > 0
    assert all(0 <= done <= total for done, total in seen)


def test_an_empty_merge_of_rows_of_one(tmp_path: Path) -> None:
    modules = {"model.layers.0.q_proj": (1, 1)}
    base = make_base(tmp_path / "base", modules=modules, dtype="F16")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules, scale=0.1))
    merged(base, adapter, tmp_path / "out")


def test_verification_accepts_the_device(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu", verify=True)
    assert report.verification is not None
    assert report.device == "torch:cpu"


# Arguments


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "cuda:x"}, "unknown device 'cuda:x'"),
        ({"device": "torch:cpu", "device_memory": "much"}, "'much'"),
        ({"device": "torch:cpu", "device_memory": "2 parsecs"}, "parsecs"),
        ({"device": "torch:cpu", "device_memory": 1000}, "at least 1 MiB"),
        ({"device": "cpu", "device_memory": "2GiB"}, "device is 'cpu'"),
    ],
)
def test_a_wrong_argument(
    base: Path, adapter: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=r"device") as caught:
        lorafast.merge(base, adapter, tmp_path / "out", **options)
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("512mib", 512 << 20), (1 << 20, 1 << 20)],
)
def test_amounts_of_memory(text: int | str, expected: int) -> None:
    assert device_names.parse_memory(text, "cuda") == expected


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_cuda_the_error_says_what_torch_sees(
    base: Path, adapter: Path, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(lorafast.DeviceError) as caught:
        lorafast.merge(base, adapter, tmp_path / "out", device=device)
    for part in (device, torch.__version__, "device='cpu'"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    arguments = ["--base", str(base), "--adapters", str(adapter), "--output", str(tmp_path / "o")]
    assert main(["merge", *arguments, "--device", device]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(lorafast.DeviceError, match="built without CUDA"):
        device_module.open_device("cuda")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: f"Model {at}")
    with pytest.raises(lorafast.DeviceError) as caught:
        device_module.open_device("cuda:7")
    assert "no device 'cuda:7'" in str(caught.value)
    assert "cuda:0 (Model 0), cuda:1 (Model 1)" in str(caught.value)


def test_a_torch_without_the_dtype(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(device_module.DTYPES, "BF16", "bfloat17")
    with pytest.raises(lorafast.DeviceError, match="no dtype for BF16"):
        lorafast.merge(base, adapter, tmp_path / "out", device="torch:cpu")
    assert not (tmp_path / "out").exists()


def test_without_torch(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(lorafast.MissingDependencyError, match=r"lorafast\[torch\]"):
        lorafast.merge(base, adapter, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    report = lorafast.merge(base, adapter, tmp_path / "out", device="auto")
    assert report.device == "cpu"
    assert "torch is not installed" in report.notes[-1]


def test_products_on_a_device_are_exact_and_settings_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contextlib import nullcontext

    products = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for asked in ("highest", "high"):
        torch.set_float32_matmul_precision(asked)
        before = products.fp32_precision
        try:
            with device_module.exact_products(torch.device("cuda", 0)):
                assert products.fp32_precision == "ieee"
                assert not products.allow_bf16_reduced_precision_reduction
                assert not torch.is_grad_enabled()
            assert products.fp32_precision == before
            assert products.allow_bf16_reduced_precision_reduction
            assert torch.get_float32_matmul_precision() == asked
        finally:
            torch.set_float32_matmul_precision("highest")


# The choice of auto


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_auto_without_a_device_is_the_cpu_and_says_so(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    report = lorafast.merge(base, adapter, tmp_path / "out", device="auto", device_memory="1GiB")
    assert report.device == "cpu"
    assert "the CPU, because torch" in report.notes[-1]
    cpu = lorafast.merge(base, adapter, tmp_path / "cpu")
    assert cpu.notes == []
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "cpu")


def test_auto_weighs_the_link_against_the_products(base: Path, adapter: Path) -> None:
    plan = lorafast.plan(base, adapter)
    slow, why = choice.compare(plan.core, 2, link=1e3)
    assert slow == "cpu"
    assert "sending" in why
    fast, why = choice.compare(plan.core, 2, link=1e15)
    assert fast == "cuda"
    assert "2 CPU threads" in why


def test_the_command_takes_the_device(base: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ["--base", str(base), "--adapters", str(adapter), "--output", str(tmp_path / "o")]
    device = ["--device", "torch:cpu", "--device-memory", "64MiB"]
    assert main(["merge", *arguments, *device]) == 0
    report = json.loads((tmp_path / "o" / "merge_report.json").read_text())
    assert report["device"] == "torch:cpu"


def test_a_checkpoint_without_config(tmp_path: Path, adapter: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    random = np.random.default_rng(0)
    weights = {f"{m}.weight": tensor(random.normal(size=s)) for m, s in MODULES.items()}
    write_checkpoint(folder, weights)
    merged(folder / "model.safetensors", adapter, tmp_path / "out")


def test_exact_products_within_exact_products_end_with_the_outermost() -> None:
    device, ones = torch.device("cpu"), torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
        with device_module.exact_products(device):
            with device_module.exact_products(device):
                assert (ones @ ones).dtype == torch.float32
            assert (ones @ ones).dtype == torch.float32
        assert (ones @ ones).dtype == torch.bfloat16
