"""What is made of a base's whole weight: PEFT's OFT, GLoRA in Tucker's form, weights in pieces, and
verification by formulas of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from numpy.typing import NDArray
from support import image_formats as toys
from support.files import read_checkpoint, tensor, write_safetensors
from support.handmade import make_base

Array = NDArray[np.float64]

MODULE = "down_blocks.0.layer"
KEY = "lora_unet_down_blocks_0_layer"


def generator(*seed: object) -> np.random.Generator:
    return np.random.default_rng([ord(char) for char in repr(seed)])


def base_of(path: Path, weights: Mapping[str, Array], dtype: str = "F32", **config: Any) -> Path:
    others = {name: tensor(values, dtype) for name, values in weights.items()}
    settings = config or {"model_type": "x"}
    return make_base(path, modules={}, dtype=dtype, others=others, config=settings)


def write(path: Path, tensors: Mapping[str, Array]) -> Path:
    return write_safetensors(path, {name: tensor(value) for name, value in tensors.items()})


def peft_model(torch: Any) -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(20, 12)
            self.first = torch.nn.Linear(12, 16)
            self.square = torch.nn.Linear(16, 16)
            self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)
            self.point = torch.nn.Conv2d(8, 4, 1)

    torch.manual_seed(7)
    return Net()


TARGETS = ["embedding", "first", "square", "conv", "point"]
OFT: dict[str, dict[str, Any]] = {
    **{f"{n} terms": {"oft_block_size": 4, "num_cayley_neumann_terms": n} for n in range(1, 8)},
    "exact": {"oft_block_size": 4, "use_cayley_neumann": False},
    "number of blocks": {"r": 2, "oft_block_size": 0},
    "shared": {"oft_block_size": 4, "block_share": True},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.4},
    "constrained, shared, exact": {
        "oft_block_size": 4,
        "coft": True,
        "eps": 0.4,
        "block_share": True,
        "use_cayley_neumann": False,
    },
}


@pytest.mark.parametrize("name", OFT)
def test_an_oft_merge_is_what_peft_makes(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    net = peft_model(torch)
    start = {key: value.detach().double().numpy() for key, value in net.state_dict().items()}
    base = base_of(tmp_path / "base", start)
    wrapped = peft.get_peft_model(net, peft.OFTConfig(target_modules=TARGETS, **OFT[name]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    lorafast.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for key, value in expected.items():
        assert np.abs(merged[key].float64() - value.double().numpy()).max() < 3e-6, key
        changes = key.endswith("weight") and name != "1 terms"
        assert changes != np.array_equal(merged[key].float64(), start[key]), key
    assert lorafast.verify(base, tmp_path / "adapter", tmp_path / "out").ok
    about = lorafast.inspect(tmp_path / "adapter")["adapter"]
    assert {one["use"] for one in about["coverage"]["tensors"]} == {"used"}
    assert about["type"] == "OFT"


def oft_directory(path: Path, tensors: Mapping[str, Array], **settings: Any) -> Path:
    import json

    path.mkdir()
    fields = {"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.21.0", "r": 0}
    (path / "adapter_config.json").write_text(json.dumps(fields | settings))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write(path / "adapter_model.safetensors", named)
    return path


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((5, 6), {"peft_version": "0.17.0"}, "before 0.18"),
        ((5, 7), {}, "skew-symmetric blocks"),
        ((2, 6), {"block_share": True}, "skew-symmetric blocks"),
        ((4, 6), {}, "shape"),
        ((1, 15), {"block_share": True}, "blocks of 6, which the 20 inputs"),
        ((5, 6), {"num_cayley_neumann_terms": 0.5}, "num_cayley_neumann_terms to 0.5"),
    ],
)
def test_blocks_that_do_not_fit_are_named(
    shape: tuple[int, ...], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", {f"{MODULE}.weight": np.ones((24, 20))})
    adapter = oft_directory(
        tmp_path / "adapter", {f"{MODULE}.oft_R.weight": np.full(shape, 0.1)}, **settings
    )
    with pytest.raises(lorafast.LorafastError, match=words):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_oft_without_its_config_is_refused_by_name(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {f"{MODULE}.weight": np.ones((24, 20))})
    file = write(tmp_path / "x.safetensors", {f"{KEY}.oft_R.weight": np.full((5, 6), 0.1)})
    with pytest.raises(lorafast.LorafastError, match="OFT"):
        lorafast.merge(base, file, tmp_path / "out")


def test_glora_with_a_core_is_its_formula(tmp_path: Path) -> None:
    random = generator("core")
    weight = random.normal(size=(24, 20, 3, 3))
    parts = {
        "a1.weight": random.normal(size=(20, 4, 1, 1)),
        "a2.weight": random.normal(size=(4, 20, 1, 1)),
        "b1.weight": random.normal(size=(24, 4, 1, 1)),
        "bm.weight": random.normal(size=(4, 4, 3, 3)),
        "b2.weight": random.normal(size=(4, 20, 1, 1)),
        "alpha": np.array(2.0),
    }
    base = base_of(tmp_path / "base", {f"{MODULE}.weight": weight})
    file = write(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in parts.items()}
    )
    lorafast.merge(base, file, tmp_path / "out", verify=True)
    a1, a2, b1, b2 = (parts[f"{name}.weight"][:, :, 0, 0] for name in ("a1", "a2", "b1", "b2"))
    of_weight = np.einsum("oikl,ir,rj->ojkl", weight, a1, a2)
    added = np.einsum("or,rqkl,qi->oikl", b1, parts["bm.weight"], b2)
    merged = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"].float64()
    assert np.abs(merged - weight - 0.5 * (of_weight + added)).max() < 1e-4
    wrong = parts | {"bm.weight": np.ones((4, 3, 3, 3))}
    file = write(
        tmp_path / "y.safetensors", {f"{KEY}.{part}": value for part, value in wrong.items()}
    )
    with pytest.raises(lorafast.LorafastError, match=r"no factors of a GLoRA"):
        lorafast.merge(base, file, tmp_path / "other")


# Pieces.

#: A fused parameter of a Flux block in its author's naming, and the parts that diffusers has of it.
FUSED = "double_blocks.0.img_attn.qkv"
PARTS = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]


def flux(root: Path) -> tuple[Path, Path, toys.Tensors, int]:
    """A toy of Flux as its author and as diffusers saves it, diffusers' tensors, and its width."""
    weights = toys.flux()
    author = toys.save(root / "flux.safetensors", toys.in_the_authors_names("flux1", weights))
    diffusers = toys.pipeline(root / "diffusers", transformer=weights)
    return author, diffusers, weights, len(weights[f"{PARTS[0]}.weight"])


def transform_parts(name: str, outputs: int, inputs: int) -> dict[str, Array]:
    random = generator(name, outputs)

    def normal(*shape: int) -> Array:
        return 0.3 * random.normal(size=shape)

    return {
        "ia3": lambda: {"weight": normal(outputs), "on_input": np.array(0.0)},
        "ia3 of inputs": lambda: {"weight": normal(inputs), "on_input": np.array(1.0)},
        "glora": lambda: {
            "a1.weight": normal(inputs, 2),
            "a2.weight": normal(2, inputs),
            "b1.weight": normal(outputs, 2),
            "b2.weight": normal(2, inputs),
        },
        "oft": lambda: {
            "oft_blocks": normal(outputs // 4, 4, 4),
            "alpha": np.array(0.01),
            "rescale": 1 + normal(outputs, 1),
        },
        "oft across": lambda: {"oft_blocks": normal(outputs // 9, 9, 9)},
        "boft": lambda: {"oft_blocks": normal(2, outputs // 6, 6, 6)},
        "dora of inputs": lambda: {
            "lora_down.weight": normal(2, inputs),
            "lora_up.weight": normal(outputs, 2),
            "dora_scale": 1 + normal(1, inputs) ** 2,
        },
    }[name]()


PIECES = ["ia3", "ia3 of inputs", "glora", "oft"]


def kohya_file(path: Path, modules: Mapping[str, Mapping[str, Array]]) -> Path:
    tensors = {
        f"lora_unet_{module.replace('.', '_')}.{part}": value
        for module, parts in modules.items()
        for part, value in parts.items()
    }
    return write(path, tensors)


def merged_parts(base: Path, adapter: Path, output: Path) -> list[Array]:
    """The weights of diffusers' parts in a merge of either base."""
    found = toys.merge(base, adapter, output)
    if f"{FUSED}.weight" in found:
        return np.split(found[f"{FUSED}.weight"].astype(np.float64), 3)
    return [found[f"transformer.{part}.weight"].astype(np.float64) for part in PARTS]


@pytest.mark.parametrize("name", PIECES)
def test_an_adapter_of_a_fused_weight_changes_the_parts_that_a_base_has(
    name: str, tmp_path: Path
) -> None:
    author, diffusers, weights, width = flux(tmp_path)
    parts = transform_parts(name, 3 * width, width)
    adapter = kohya_file(tmp_path / "x.safetensors", {FUSED: parts})
    expected = merged_parts(author, adapter, tmp_path / "of_author")
    found = merged_parts(diffusers, adapter, tmp_path / "of_diffusers")
    for part, one, other in zip(PARTS, found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(one - weights[f"{part}.weight"]).max() > 1e-3


@pytest.mark.parametrize("name", ["boft", "oft across", "dora of inputs"])
def test_what_mixes_the_parts_is_refused(name: str, tmp_path: Path) -> None:
    _, diffusers, _, width = flux(tmp_path)
    parts = transform_parts(name, 3 * width, width)
    adapter = kohya_file(tmp_path / "x.safetensors", {FUSED: parts})
    with pytest.raises(lorafast.PlanError, match="more of a weight at once"):
        lorafast.merge(diffusers, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*PIECES, "boft", "dora of inputs"])
def test_an_adapter_of_parts_changes_their_rows_of_a_fused_weight(
    name: str, tmp_path: Path
) -> None:
    author, diffusers, weights, width = flux(tmp_path)
    parts = transform_parts(name, width, width)
    adapter = kohya_file(tmp_path / "x.safetensors", {PARTS[0]: parts, PARTS[2]: parts})
    if name == "ia3 of inputs":
        # The adapter does not tell how many rows each of the parts has.
        with pytest.raises(lorafast.PlanError, match="nothing tells the sizes of the others"):
            lorafast.merge(author, adapter, tmp_path / "of_author")
        return
    found = merged_parts(author, adapter, tmp_path / "of_author")
    expected = merged_parts(diffusers, adapter, tmp_path / "of_diffusers")
    np.testing.assert_array_equal(found, expected)
    before = [weights[f"{part}.weight"] for part in PARTS]
    moved = [bool(np.abs(x - y).max() > 1e-3) for x, y in zip(found, before, strict=True)]
    assert moved == [True, False, True]


# Verification.

TRANSFORMS: dict[str, Callable[[], tuple[tuple[int, ...], dict[str, Array]]]] = {
    name: (lambda name=name: ((36, 20), transform_parts(name, 36, 20)))
    for name in [*PIECES, "oft across", "boft", "dora of inputs"]
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_verification_finds_what_is_not_the_formulas(name: str, tmp_path: Path) -> None:
    shape, parts = TRANSFORMS[name]()
    weight = generator(name, "weight").normal(size=shape)
    base = base_of(tmp_path / "base", {f"{MODULE}.weight": weight})
    file = write(
        tmp_path / "x.safetensors", {f"{KEY}.{part}": value for part, value in parts.items()}
    )
    lorafast.merge(base, file, tmp_path / "out")
    assert lorafast.verify(base, file, tmp_path / "out", full=True).ok
    merged = read_checkpoint(tmp_path / "out")[f"{MODULE}.weight"].float64()
    merged[17, 11] *= 1.001
    write(tmp_path / "out" / "model.safetensors", {f"{MODULE}.weight": merged})
    problems = lorafast.verify(base, file, tmp_path / "out").problems
    assert any("row 17, column 11" in problem for problem in problems), problems
