"""Merges of every algorithm against PEFT's merge, LyCORIS's forward pass, and others' files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.algorithms import ALGORITHMS, LAYERS, MODULE, based, close, generator, lokr, made
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
from support.handmade import make_base

# PEFT's own.


def peft_directory(path: Path, kind: str, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    path.mkdir()
    config = {"peft_type": kind, "r": 4, "alpha": 6, "target_modules": ["layer"], **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{MODULE}"
    named = {f"{prefix}.{part}": value for part, value in tensors.items() if part != "alpha"}
    write_safetensors(path / "adapter_model.safetensors", named)
    return path


@pytest.mark.parametrize(
    # Both factors of a LoKr have one rank there.
    "name",
    [name for name in ALGORITHMS if name.startswith(("loha", "lokr")) and "both in" not in name],
)
@pytest.mark.parametrize("kind", ["linear", "conv 3x3"])
def test_peft_scales_by_its_config(name: str, kind: str, tmp_path: Path) -> None:
    algorithm = ALGORITHMS[name]
    if kind not in algorithm.kinds:
        pytest.skip("no layer of this algorithm's")
    tensors, parts = made(name, kind, "F32")
    base, weight = based(tmp_path / "base", LAYERS[kind], "F32")
    method = "LOHA" if name.startswith("loha") else "LOKR"
    adapter = peft_directory(
        tmp_path / "peft", method, tensors, r=algorithm.rank, alpha_pattern={"layer": 5.0}
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    # Whether both factors are whole or not.
    scale = 5.0 / algorithm.rank
    delta = algorithm.formula(parts, weight, scale)
    if "lokr_w1" in parts and "lokr_w2" in parts:
        delta = scale * delta
    merged = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"]
    close(merged, weight + delta, weight)
    assert lorafast.verify(base, adapter, tmp_path / "out").ok
    module = lorafast.inspect(adapter)["adapter"]["modules"][0]
    assert (module["rank"], module["alpha"], module["scaling"]) == (algorithm.rank, 5.0, scale)


def test_ranks_that_the_config_does_not_have_are_refused(tmp_path: Path) -> None:
    tensors, _ = made("loha", "linear", "F32")
    base, _ = based(tmp_path / "base", LAYERS["linear"], "F32")
    adapter = peft_directory(tmp_path / "peft", "LOHA", tensors, r=5)
    with pytest.raises(lorafast.AdapterError, match="do not belong together"):
        lorafast.merge(base, adapter, tmp_path / "out")
    other = peft_directory(tmp_path / "other", "LOKR", tensors, r=3)
    with pytest.raises(lorafast.AdapterError, match="no part of a LOKR"):
        lorafast.merge(base, other, tmp_path / "out")


def model(torch: Any) -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(12, 16)
            self.square = torch.nn.Linear(16, 16)
            self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)
            self.point = torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: Any) -> Any:
            x = self.square(self.first(x)).reshape(-1, 4, 2, 2)
            return self.point(self.conv(x))

    torch.manual_seed(7)
    return Net()


def peft_configs() -> dict[str, Callable[[Any], Any]]:
    targets = ["first", "square", "conv", "point"]
    return {
        "loha": lambda peft: peft.LoHaConfig(r=4, alpha=6, target_modules=targets),
        "loha, effective": lambda peft: peft.LoHaConfig(
            r=4, alpha=6, target_modules=targets, use_effective_conv2d=True
        ),
        "lokr": lambda peft: peft.LoKrConfig(r=2, alpha=6, target_modules=targets),
        "lokr, effective": lambda peft: peft.LoKrConfig(
            r=2, alpha=6, target_modules=targets, use_effective_conv2d=True
        ),
        "lokr, both": lambda peft: peft.LoKrConfig(
            r=1, alpha=3, target_modules=targets, decompose_both=True, rank_pattern={"conv": 2}
        ),
        "lokr, whole": lambda peft: peft.LoKrConfig(r=64, alpha=16, target_modules=targets),
        "ia3": lambda peft: peft.IA3Config(
            target_modules=targets, feedforward_modules=["square", "point"]
        ),
        "ia3, pattern": lambda peft: peft.IA3Config(
            target_modules=targets, feedforward_modules=".*(square|conv)"
        ),
    }


@pytest.mark.parametrize("name", peft_configs())
def test_a_merge_is_what_peft_makes(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    net = model(torch)
    base = tmp_path / "base"
    base.mkdir()
    values = {
        key: tensor(value.detach().double().numpy()) for key, value in net.state_dict().items()
    }
    write_safetensors(base / "model.safetensors", values)
    (base / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    wrapped = peft.get_peft_model(net, peft_configs()[name](peft))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    lorafast.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for key, value in expected.items():
        difference = np.abs(merged[key].float64() - value.detach().double().numpy()).max()
        assert difference < 3e-6, (key, difference)
    assert not np.array_equal(merged["first.weight"].float64(), values["first.weight"].float64())
    assert lorafast.verify(base, tmp_path / "adapter", tmp_path / "out").ok


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon, tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "lokr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, both": {
        "algo": "lokr",
        "factor": 4,
        "decompose_both": True,
        "linear_dim": 1,
        "conv_dim": 1,
    },
    "full": {"algo": "full"},
    "dora": {"algo": "locon", "dora_wd": True},
    "dora of inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 2},
    "boft": {"algo": "boft", "linear_dim": 4, "conv_dim": 4},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
}


@pytest.mark.parametrize("name", LYCORIS)
def test_a_merge_is_what_lycoris_computes(name: str, tmp_path: Path) -> None:
    """Against the forward pass, which is what was trained; LyCORIS's merge scales LoHa twice."""
    torch = pytest.importorskip("torch")
    lycoris = pytest.importorskip("lycoris")
    settings = {"linear_dim": 2, "linear_alpha": 3.0, "conv_dim": 2, "conv_alpha": 3.0} | LYCORIS[
        name
    ]
    if name in {"diag-oft", "boft"}:
        settings |= {"linear_alpha": 0.0, "conv_alpha": 0.0}
    net = model(torch)
    base = tmp_path / "base"
    base.mkdir()
    values = {
        key: tensor(value.detach().double().numpy()) for key, value in net.state_dict().items()
    }
    write_safetensors(base / "model.safetensors", values)
    (base / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    algo = settings.pop("algo")
    network = lycoris.create_lycoris(net, 1.0, algo=algo, **settings)
    network.apply_to()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "dora_scale" in key:
                parameter.mul_(1.25)
            elif "scalar" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    stored = {
        key: tensor(np.asarray(value.detach().double().numpy()))
        for key, value in network.state_dict().items()
    }
    file = write_safetensors(tmp_path / "x.safetensors", stored)
    inputs = torch.randn(5, 12)
    with torch.no_grad():
        expected = net(inputs)
    lorafast.merge(base, file, tmp_path / "out")
    merged = {
        key: torch.tensor(value.float64()).float()
        for key, value in read_checkpoint(tmp_path / "out").items()
    }
    fresh = model(torch)
    fresh.load_state_dict(merged)
    with torch.no_grad():
        actual = fresh(inputs)
        untouched = model(torch)(inputs)
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)
    assert (actual - untouched).abs().max() > 1e-3
    assert lorafast.verify(base, file, tmp_path / "out").ok


# Of others.


@pytest.mark.real_data
@pytest.mark.parametrize("rank", [4, 8])
def test_the_first_lokr_files_merge_into_a_model_of_their_shapes(
    rank: int, real_data: Path, tmp_path: Path
) -> None:
    found = list(real_data.glob(f"adapters/lycoris_lokr__*/*_{rank}_lokr.safetensors"))
    if not found:
        pytest.skip("the files are not here")
    (file,) = found
    listing = lorafast.inspect(file)["adapter"]
    assert (listing["type"], listing["r"]) == ("LOKR", rank)
    modules = listing["modules"]
    assert len(modules) == 350
    assert all(use["use"] == "used" for use in listing["coverage"]["tensors"])
    analysis = lorafast.analyze(file)
    assert all(np.isfinite(module.frobenius_norm) for module in analysis.modules.values())
    # A base of the modules' own names, a convolution of 3 by 3 among them.
    few = [modules[0], modules[100], next(one for one in modules if one["shape"][1] == 320 * 9)]
    weights = {}
    for module in few:
        rows, columns = module["shape"]
        shape = (rows, columns // 9, 3, 3) if columns == 320 * 9 else (rows, columns)
        weights[f"{module['name']}.weight"] = tensor(generator(module["name"]).normal(size=shape))
    kept = {
        name: value
        for name, value in read_safetensors(file).items()
        if any(name.startswith(f"{module['name']}.") for module in few)
    }
    cut = write_safetensors(tmp_path / "cut.safetensors", kept)
    base = make_base(tmp_path / "base", modules={}, others=weights, config={"model_type": "x"})
    lorafast.merge(base, cut, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for name, value in weights.items():
        key = name.removesuffix(".weight")
        parts = {
            part.removeprefix(f"{key}."): one.float64()
            for part, one in kept.items()
            if part.startswith(f"{key}.")
        }
        scale = float(parts["alpha"]) / rank
        start = value.float64()
        close(merged[name], start + lokr(parts, start, scale), start)


@pytest.mark.real_data
def test_an_ia3_adapter_of_2023_scales_its_outputs(real_data: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = list(real_data.glob("adapters/peft_repo__2023-08-07*"))
    if not found:
        pytest.skip("the adapter is not here")
    (folder,) = found
    state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    few = list(state)[:3]
    vectors = {
        key.removeprefix("base_model.model.").removesuffix(".ia3_l"): state[key] for key in few
    }
    weights = {
        f"{path}.weight": tensor(generator(path).normal(size=(len(vector), 8)))
        for path, vector in vectors.items()
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save({key: state[key] for key in few}, adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    base = make_base(tmp_path / "base", modules={}, others=weights, config={"model_type": "t5"})
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for path, vector in vectors.items():
        start = weights[f"{path}.weight"].float64()
        close(merged[f"{path}.weight"], start * vector.double().numpy().reshape(-1, 1), start)
    modules = lorafast.inspect(folder)["adapter"]["modules"]
    assert len(modules) == len(state)
