"""Combinations beside PEFT's `add_weighted_adapter`: the same where it is right, and its mistakes.

Where PEFT is mistaken both results are asserted, so that a PEFT that was mended is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.algebra import distance, updates_of, write_toy
from support.dense_methods import toy, uniform
from support.reference import read_updates

pytest.importorskip("peft")


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, list[Path]]:
    """A PEFT model with two adapters, and the adapters as they are saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    common = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **common), adapter_name="one")
    peft.add_adapter("two", LoraConfig(r=3, lora_alpha=5, **common))
    peft.save_pretrained(tmp_path / "saved", selected_adapters=["one", "two"])
    return peft, [tmp_path / "saved" / "one", tmp_path / "saved" / "two"]


def add_to(model: Any, folder: Path, name: str, **settings: Any) -> Path:
    """A further adapter of the model, with random factors, as it is saved."""
    from peft import LoraConfig

    targets = ["q_proj", "down_proj"]
    config = LoraConfig(**settings, target_modules=targets, init_lora_weights=False)
    model.add_adapter(name, config)
    model.save_pretrained(folder, selected_adapters=[name])
    return folder / name


def peft_updates(model: Any, adapter: str) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            update = module.get_delta_weight(adapter).detach().double().numpy()
            found[name.removeprefix("base_model.model.")] = update
    return found


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3]])
def test_a_recompressed_sum_is_that_of_its_svd(
    trained: tuple[Any, list[Path]], tmp_path: Path, rank: int, weights: list[float]
) -> None:
    model, adapters = trained
    model.add_weighted_adapter(["one", "two"], weights, "sum", "svd", svd_rank=rank)
    lorafast.combine(adapters, tmp_path / "out", weights=weights, rank=rank)
    assert distance(updates_of(tmp_path / "out"), peft_updates(model, "sum")) < 5e-6


def test_a_sum_side_by_side_is_that_of_its_cat(
    trained: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    model, adapters = trained
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum", "cat")
    report = lorafast.combine(adapters, tmp_path / "out", weights=[1.0, 0.5])
    assert set(report.ranks.values()) == {7}
    assert distance(updates_of(tmp_path / "out"), peft_updates(model, "sum")) < 5e-6


def test_what_is_written_loads_in_peft(trained: tuple[Any, list[Path]], tmp_path: Path) -> None:
    model, adapters = trained
    lorafast.combine(adapters, tmp_path / "out", weights=[1.0, -0.5], rank="energy:0.8")
    model.load_adapter(tmp_path / "out", "ours")
    wanted = updates_of(tmp_path / "out")
    assert distance(peft_updates(model, "ours"), wanted) < 1e-6
    lorafast.bake(adapters[0], tmp_path / "stable", rslora=True)
    model.load_adapter(tmp_path / "stable", "stable")
    assert distance(peft_updates(model, "stable"), updates_of(adapters[0])) < 1e-6


def test_a_sum_of_factors_is_no_sum_of_updates(tmp_path: Path) -> None:
    """What PEFT calls linear has cross terms: 53 % beside the sum of the toys."""
    paths = [write_toy(tmp_path, name) for name in "XY"]
    tensors = [load_file(path / "adapter_model.safetensors") for path in paths]
    weights, scales = (1.0, -0.5), (2.0, 1.0)
    factors = []
    for part in ("lora_A", "lora_B"):
        total = np.zeros(())
        for own, weight, scale in zip(tensors, weights, scales, strict=True):
            [factor] = [value for name, value in own.items() if part in name]
            root = np.sqrt(abs(weight) * scale)
            total = total + (np.sign(weight) * root if part == "lora_B" else root) * factor
        factors.append(total)
    linear = factors[1] @ factors[0]
    lorafast.combine(paths, tmp_path / "out", weights=weights)
    [exact] = updates_of(tmp_path / "out").values()
    off = np.linalg.norm(linear - exact) / np.linalg.norm(exact)
    assert off == pytest.approx(0.527985, abs=1e-6)


#: Methods of PEFT with weights under which its rule is that of the method.
ELEMENTS = [
    ("ties", [1.0, 1.0]),
    ("magnitude_prune", [1.0, -0.5]),
    ("dare_linear", [1.0, -0.5]),
    ("dare_ties", [1.0, 1.0]),
]


@pytest.mark.parametrize(("method", "weights"), ELEMENTS)
def test_elements_are_those_of_its_dense_methods(
    trained: tuple[Any, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    weights: list[float],
) -> None:
    """Of whole updates, with masks by lorafast's numbers in the place of torch's."""
    import torch

    model, adapters = trained
    names = list(peft_updates(model, "one"))
    drawn: list[int] = []

    def mask(chances: Any) -> Any:
        name, ordinal = names[len(drawn) // 2], len(drawn) % 2
        drawn.append(ordinal)
        numbers = uniform(11, name, ordinal, tuple(chances.shape))
        return torch.as_tensor(numbers < 0.6).to(chances.dtype)

    monkeypatch.setattr(torch, "bernoulli", mask)
    both = ["one", "two"]
    model.add_weighted_adapter(both, weights, "sum", f"{method}_svd", svd_rank=32, density=0.6)
    assert len(drawn) == (2 * len(names) if "dare" in method else 0)
    lorafast.combine(
        adapters,
        tmp_path / "out",
        method=method,
        weights=weights,
        options={"density": 0.6},
        rank=32,
        seed=11,
    )
    assert distance(updates_of(tmp_path / "out"), peft_updates(model, "sum")) < 5e-6


def test_its_ties_divides_by_a_count(tmp_path: Path) -> None:
    """And elects by unweighted sums, whatever the weights."""
    import torch
    from peft.utils import merge_utils

    updates = [torch.from_numpy(toy(name)) for name in "PQ"]
    right = {
        (0.25, 1.0): [[-14, 0, 0], [20, -15.6, -16.4], [-13, 0, 0], [16, 28, -15]],
        (1.0, -0.5): [[-14, 0, 0], [-20, -22, -10], [-13, 0, 0], [12, 28, 15]],
    }
    theirs = {
        (0.25, 1.0): [[-3.5, 0, 0], [20, -9.75, -10.25], [-8.125, 0, 0], [10, 7, -15]],
        (1.0, -0.5): [[-14, 0, 0], [-10, -7.5, -0.5], [-3.25, 0, 0], [1.75, 28, 7.5]],
    }
    paths = [write_toy(tmp_path, name) for name in "PQ"]
    for weights, expected in right.items():
        lorafast.combine(
            paths,
            tmp_path / "out",
            method="ties",
            weights=weights,
            options={"density": 0.5},
            rank=3,
            overwrite=True,
        )
        [found] = updates_of(tmp_path / "out").values()
        np.testing.assert_allclose(found, expected, atol=1e-4)
        given = torch.tensor(weights, dtype=torch.float64)
        found = merge_utils.ties(updates, given, 0.5).numpy()
        np.testing.assert_allclose(found, theirs[weights], atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_its_methods_on_factors_are_those_of_its_name(
    trained: tuple[Any, list[Path]], tmp_path: Path, method: Any
) -> None:
    """The same under `compat`; beside what the method makes of updates they are far away."""
    model, [one, _] = trained
    paths = [one, add_to(model, tmp_path / "more", "three", r=4, lora_alpha=3)]
    options: dict[str, Any] = {} if method == "linear" else {"density": 0.5}
    weights = [1.0, 0.5]
    model.add_weighted_adapter(["one", "three"], weights, "sum", method, **options)
    theirs = peft_updates(model, "sum")
    asked: dict[str, Any] = {"method": method, "weights": weights, "options": options}
    lorafast.combine(paths, tmp_path / "same", compat="peft", **asked)
    assert distance(updates_of(tmp_path / "same"), theirs) < 5e-6
    lorafast.combine(paths, tmp_path / "own", rank=32, **asked)
    assert distance(theirs, updates_of(tmp_path / "own")) > 0.5


def test_scales_of_rslora_are_counted_once(trained: tuple[Any, list[Path]], tmp_path: Path) -> None:
    """The sum's config is that of the first, in PEFT: with a rank r, its scale is √r."""
    model, [_, two] = trained
    stable = add_to(model, tmp_path / "more", "stable", r=4, lora_alpha=6, use_rslora=True)
    model.add_weighted_adapter(["stable", "two"], [1.0, 1.0], "sum", "cat")
    exact = {name: update + updates_of(two)[name] for name, update in updates_of(stable).items()}
    lorafast.combine([stable, two], tmp_path / "out")
    assert distance(updates_of(tmp_path / "out"), exact) < 1e-6
    wrong = {name: np.sqrt(7) * update for name, update in exact.items()}
    assert distance(peft_updates(model, "sum"), wrong) < 1e-6


def test_a_clamped_decomposition_is_another_update(
    trained: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    model, adapters = trained
    both = ["one", "two"]
    model.add_weighted_adapter(both, [1.0, 1.0], "sum", "svd", svd_rank=7, svd_clamp=0.9)
    lorafast.combine(adapters, tmp_path / "out", rank=7)
    exact = {
        name: sum(updates_of(path)[name] for path in adapters) for name in updates_of(adapters[0])
    }
    assert distance(updates_of(tmp_path / "out"), exact) < 1e-6
    assert distance(peft_updates(model, "sum"), exact) > 0.3


def test_weights_that_are_too_few_are_refused(
    trained: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    """PEFT leaves out the adapters that have none."""
    model, adapters = trained
    model.add_weighted_adapter(["one", "two"], [0.5], "sum", "cat")
    alone = {name: update / 2 for name, update in peft_updates(model, "one").items()}
    assert distance(peft_updates(model, "sum"), alone) < 1e-6
    with pytest.raises(ValueError, match="1 weights for 2 adapters"):
        lorafast.combine(adapters, tmp_path / "out", weights=[0.5])
    assert not (tmp_path / "out").exists()


def test_what_was_refused_can_be_asked_for_again(
    trained: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    """PEFT keeps the name of what failed, and the next call with it does nothing."""
    model, adapters = trained
    both: Any = ["one", "two"]
    with pytest.raises(TypeError):
        model.add_weighted_adapter(both, [1.0, 1.0], "sum", "ties_svd", svd_rank=4)
    left = peft_updates(model, "sum")
    model.add_weighted_adapter(both, [1.0, 1.0], "sum", "svd", svd_rank=4)
    again = peft_updates(model, "sum")
    assert all(np.array_equal(again[name], update) for name, update in left.items())
    asked: dict[str, Any] = {"method": "ties", "options": {"density": 0.5}}
    with pytest.raises(ValueError, match="give a rank"):
        lorafast.combine(adapters, tmp_path / "out", **asked)
    lorafast.combine(adapters, tmp_path / "out", rank=4, **asked)
    assert all(np.any(update) for update in updates_of(tmp_path / "out").values())


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 5)])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_sums_of_embeddings_and_convolutions(tmp_path: Path, kind: str, rank: int | None) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = {
        "embed": torch.nn.Embedding(30, 12),
        "conv": torch.nn.Conv2d(6, 20, 3),
        "point": torch.nn.Conv2d(10, 14, 1),
        "line": torch.nn.Linear(16, 18),
    }
    common: dict[str, Any] = {"target_modules": list(layers), "init_lora_weights": False}
    config = LoraConfig(r=4, lora_alpha=6, **common)
    model: Any = get_peft_model(torch.nn.ModuleDict(layers), config, adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=5, **common))
    model.save_pretrained(tmp_path / "saved", selected_adapters=["one", "two"])
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum", kind, svd_rank=rank)
    adapters = [tmp_path / "saved" / name for name in ("one", "two")]
    lorafast.combine(adapters, tmp_path / "out", weights=[1.0, 0.5], rank=rank)
    theirs = peft_updates(model, "sum")
    found = {}
    for name, update in read_updates(tmp_path / "out").items():
        delta = update.delta().T if update.embedding else update.delta()
        found[name] = delta.reshape(theirs[name].shape)
    assert found.keys() == layers.keys()
    assert distance(found, theirs) < 5e-6
