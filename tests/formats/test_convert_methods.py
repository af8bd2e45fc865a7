"""LoHa, LoKr and IA3 written as PEFT's own methods: PEFT loads them, and merges the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]

#: (out, in) or (out, in, kernel).
SHAPES: dict[str, tuple[int, ...]] = {
    "first": (16, 12),
    "square": (16, 16),
    "conv": (8, 4, 3, 3),
    "point": (4, 8, 1, 1),
}


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


def weights() -> dict[str, Array]:
    random = np.random.default_rng(5)
    found: dict[str, Array] = {}
    for name, shape in SHAPES.items():
        found[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)
        found[f"{name}.bias"] = random.normal(size=shape[:1]).astype(np.float32)
    return found


def make_base(path: Path) -> Path:
    path.mkdir()
    save_file(weights(), path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "x", "torch_dtype": "float32"}')
    return path


def draw(random: np.random.Generator, *shape: int) -> Array:
    return (0.4 * random.normal(size=shape)).astype(np.float32)


def loha(random: np.random.Generator, shape: tuple[int, ...], rank: int, tucker: bool) -> Any:
    outputs, inputs, *kernel = shape
    parts = {}
    for number in (1, 2):
        if tucker and kernel and max(kernel) > 1:
            parts[f"hada_t{number}"] = draw(random, rank, rank, *kernel)
            parts[f"hada_w{number}_a"] = draw(random, rank, outputs)
            parts[f"hada_w{number}_b"] = draw(random, rank, inputs)
        else:
            parts[f"hada_w{number}_a"] = draw(random, outputs, rank)
            parts[f"hada_w{number}_b"] = draw(random, rank, inputs * int(np.prod(kernel)))
    return parts


def lokr(
    random: np.random.Generator,
    shape: tuple[int, ...],
    rank: int,
    *,
    factor: int = 4,
    first: bool = False,
    second: bool = True,
    tucker: bool = False,
) -> dict[str, Array]:
    """A LoKr whose w1 and w2 are products where `first` and `second` say so."""
    outputs, inputs, *kernel = shape
    rows, columns = outputs // factor, inputs // factor
    parts = {}
    if first:
        parts["lokr_w1_a"] = draw(random, factor, rank)
        parts["lokr_w1_b"] = draw(random, rank, factor)
    else:
        parts["lokr_w1"] = draw(random, factor, factor)
    if not second:
        parts["lokr_w2"] = draw(random, rows, columns, *kernel)
    elif tucker and kernel and max(kernel) > 1:
        parts["lokr_t2"] = draw(random, rank, rank, *kernel)
        parts["lokr_w2_a"] = draw(random, rank, rows)
        parts["lokr_w2_b"] = draw(random, rank, columns)
    else:
        parts["lokr_w2_a"] = draw(random, rows, rank)
        parts["lokr_w2_b"] = draw(random, rank, columns * int(np.prod(kernel)))
    return parts


def contracted(core: Array, a: Array, b: Array) -> Array:
    return np.einsum("ijkl,ip,jr->prkl", core, a, b)


def delta(parts: Mapping[str, Array], shape: tuple[int, ...], scale: float) -> Array:
    own = {name: value.astype(np.float64) for name, value in parts.items()}
    if "hada_w1_a" in own:
        sides = [
            contracted(own[f"hada_t{n}"], own[f"hada_w{n}_a"], own[f"hada_w{n}_b"])
            if f"hada_t{n}" in own
            else own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"]
            for n in (1, 2)
        ]
        return scale * (sides[0] * sides[1]).reshape(shape)
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        w2 = own["lokr_w2"]
    elif "lokr_t2" in own:
        w2 = contracted(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        w2 = own["lokr_w2_a"] @ own["lokr_w2_b"]
    return scale * np.kron(w1, w2.reshape(len(w2), -1)).reshape(shape)


def write(path: Path, modules: Mapping[str, Mapping[str, Array]], alpha: float | None) -> Path:
    tensors = {}
    for module, parts in modules.items():
        tensors |= {f"lycoris_{module}.{part}": value for part, value in parts.items()}
        if alpha is not None:
            tensors[f"lycoris_{module}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


def merged_by_peft(adapter: Path) -> dict[str, Array]:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    net = model(torch)
    net.load_state_dict({name: torch.tensor(value) for name, value in weights().items()})
    state = peft.PeftModel.from_pretrained(net, adapter).merge_and_unload().state_dict()
    return {name: value.detach().double().numpy() for name, value in state.items()}


def assert_merged(adapter: Path, deltas: Mapping[str, Array]) -> None:
    found = merged_by_peft(adapter)
    for name, value in weights().items():
        module, leaf = name.rsplit(".", 1)
        right = value.astype(np.float64)
        if leaf == "weight":
            right = right + deltas[module]
        error = np.abs(found[name] - right).max()
        assert error < 5e-6, (name, error)


#: For each case the parts of each module, the alpha, what the config has to say.
def cases() -> dict[str, tuple[dict[str, dict[str, Array]], float | None, dict[str, Any]]]:
    random = np.random.default_rng(9)

    def of(make: Any, **options: Any) -> dict[str, dict[str, Array]]:
        return {name: make(random, shape, **options) for name, shape in SHAPES.items()}

    ranks = {"first": 3, "square": 2, "conv": 4, "point": 1}
    mixed = {name: loha(random, shape, ranks[name], False) for name, shape in SHAPES.items()}
    two = {name: SHAPES[name] for name in ("first", "conv")}
    return {
        "loha": (of(loha, rank=3, tucker=False), 1.5, {"use_effective_conv2d": False}),
        "loha, tucker": (of(loha, rank=3, tucker=True), 6, {"use_effective_conv2d": True}),
        "loha, ranks": (mixed, 4, {}),
        "loha, no alpha": (of(loha, rank=3, tucker=False), None, {"alpha": 3}),
        "lokr": (of(lokr, rank=1), 2, {"decompose_factor": 4, "decompose_both": False}),
        "lokr, tucker": (
            {name: lokr(random, shape, 1, factor=2, tucker=True) for name, shape in two.items()},
            2,
            {"use_effective_conv2d": True, "decompose_factor": 2},
        ),
        "lokr, cut otherwise": (
            {
                name: lokr(random, shape, 1, factor=2 if name == "conv" else 4, tucker=True)
                for name, shape in two.items()
            },
            2,
            {},
        ),
        "lokr, both": (
            of(lokr, rank=1, first=True),
            3,
            {"decompose_both": True},
        ),
        "lokr, whole": (of(lokr, rank=1, second=False), 7, {}),
        "lokr, w1 alone": (of(lokr, rank=3, first=True, second=False), 6, {}),
        "lokr, wide": (of(lokr, rank=5), 10, {}),
    }


@pytest.mark.parametrize("name", cases())
def test_peft_merges_what_is_written(name: str, tmp_path: Path) -> None:
    modules, alpha, settings = cases()[name]
    base = make_base(tmp_path / "base")
    file = write(tmp_path / "x.safetensors", modules, alpha)
    report = lorafast.convert(file, tmp_path / "peft", to="peft", base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-6
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    method = name.split(",", maxsplit=1)[0].upper()
    if name == "lokr, cut otherwise":
        # No one factor cuts both as they are cut.
        assert config["peft_type"] == "LORA"
        assert "decompose_factor" in report.notes[0]
    else:
        assert config["peft_type"] == method
        assert not any("plain" in note for note in report.notes)
        assert {field: config[field] for field in settings} == settings
    deltas = {}
    for module, parts in modules.items():
        stored = next((v for k, v in parts.items() if k.endswith(("w2_b", "w1_b"))), None)
        rank = None if stored is None else len(stored)
        # Where LyCORIS has both factors whole, alpha counts for nothing.
        scale = 1.0 if rank is None or alpha is None else alpha / rank
        deltas[module] = delta(parts, SHAPES[module], scale)
    zero = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    assert_merged(tmp_path / "peft", zero | deltas)
    # And so does lorafast.
    lorafast.merge(base, tmp_path / "peft", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    for module, value in deltas.items():
        right = weights()[f"{module}.weight"] + value
        np.testing.assert_allclose(merged[f"{module}.weight"], right, atol=5e-6)
    # And back, with the factors as they are where nothing had to be multiplied.
    if method == "LOHA":
        back = lorafast.convert(
            tmp_path / "peft", tmp_path / "back.safetensors", to="kohya", base=base
        )
        assert back.max_error == 0.0
        again = load_file(tmp_path / "back.safetensors")
        for module, parts in modules.items():
            for part, value in parts.items():
                found = again[f"lora_unet_{module}.{part}"].reshape(value.shape)
                np.testing.assert_array_equal(found, value)


def settings_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


def test_one_setting_of_peft_s_is_for_every_kernel(tmp_path: Path) -> None:
    """Of convolutions with a core and without, those with one are multiplied out, exactly."""
    random = np.random.default_rng(2)
    shapes = {"a": (8, 4, 3, 3), "b": (8, 4, 3, 3)}
    modules = {name: loha(random, shape, 3, name == "a") for name, shape in shapes.items()}
    base = tmp_path / "base"
    base.mkdir()
    stored = {f"{n}.weight": draw(random, *shape) for n, shape in shapes.items()}
    save_file(stored, base / "model.safetensors")
    file = write(tmp_path / "x.safetensors", modules, 3)
    report = lorafast.convert(file, tmp_path / "peft", to="peft", base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-6
    config = settings_of(tmp_path / "peft")
    assert (config["peft_type"], config["use_effective_conv2d"]) == ("LOHA", False)
    assert {
        value.shape for value in load_file(tmp_path / "peft/adapter_model.safetensors").values()
    } == {(8, 3), (3, 36)}


def test_peft_s_own_adapters_keep_their_method(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    base = make_base(tmp_path / "base")
    targets = list(SHAPES)
    configs = {
        "LOHA": peft.LoHaConfig(r=4, alpha=6, target_modules=targets, use_effective_conv2d=True),
        "LOKR": peft.LoKrConfig(
            r=1, alpha=3, target_modules=targets, decompose_both=True, rank_pattern={"conv": 2}
        ),
        "IA3": peft.IA3Config(target_modules=targets, feedforward_modules=["square", "point"]),
    }
    for method, config in configs.items():
        net = model(torch)
        net.load_state_dict({name: torch.tensor(value) for name, value in weights().items()})
        wrapped = peft.get_peft_model(net, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.4)
        own, again = tmp_path / method, tmp_path / f"{method} again"
        wrapped.save_pretrained(own)
        report = lorafast.convert(own, again, to="peft", base=base)
        assert report.max_error == 0.0
        assert settings_of(again)["peft_type"] == method
        before, after = (load_file(each / "adapter_model.safetensors") for each in (own, again))
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
        first, second = merged_by_peft(own), merged_by_peft(again)
        for name, value in first.items():
            np.testing.assert_array_equal(second[name], value)


def test_what_one_config_cannot_say_becomes_plain(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    base = make_base(tmp_path / "base")
    modules = {
        "first": loha(random, SHAPES["first"], 2, False),
        "square": lokr(random, SHAPES["square"], 1),
    }
    expected = {
        "first": delta(modules["first"], SHAPES["first"], 0.5),
        "square": delta(modules["square"], SHAPES["square"], 1.0),
        **{name: np.zeros(SHAPES[name]) for name in ("conv", "point")},
    }
    file = write(tmp_path / "x.safetensors", modules, 1)
    report = lorafast.convert(file, tmp_path / "peft", to="peft", base=base)
    assert report.notes[-1] == (
        "one adapter of PEFT's is of one method, and this has LOKR beside LOHA; it was written as "
        "plain factors"
    )
    assert settings_of(tmp_path / "peft")["peft_type"] == "LORA"
    assert_merged(tmp_path / "peft", expected)
    # Asked for, it is no news.
    alone = write(tmp_path / "y.safetensors", {"first": modules["first"]}, 1)
    report = lorafast.convert(alone, tmp_path / "lora", to="peft", base=base, algorithm="lora")
    assert not any("plain" in note for note in report.notes)
    assert settings_of(tmp_path / "lora")["peft_type"] == "LORA"
    assert_merged(tmp_path / "lora", expected | {"square": np.zeros(SHAPES["square"])})


def test_magnitudes_make_it_dora(tmp_path: Path) -> None:
    """PEFT's LoHa has no magnitudes; its LoRA has."""
    random = np.random.default_rng(4)
    base = make_base(tmp_path / "base")
    parts = loha(random, SHAPES["first"], 2, False)
    parts["dora_scale"] = 1 + random.random((16, 1), dtype=np.float32)
    file = write(tmp_path / "x.safetensors", {"first": parts}, 1)
    lorafast.convert(file, tmp_path / "peft", to="peft", base=base)
    config = settings_of(tmp_path / "peft")
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    lorafast.merge(base, file, tmp_path / "a")
    lorafast.merge(base, tmp_path / "peft", tmp_path / "b")
    a, b = (load_file(tmp_path / each / "model.safetensors") for each in "ab")
    np.testing.assert_allclose(a["first.weight"], b["first.weight"], atol=1e-6)
