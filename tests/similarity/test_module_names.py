"""One update under the names of other ways of loading its model is one, in all that compares."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import AdapterError, LorafastError
from support.analysis import Array, Factors, random_factors, write_factors
from support.files import tensor, write_safetensors
from support.handmade import adapter_config
from support.reference import PREFIX

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16, 3),
    "model.layers.0.mlp.up_proj": (40, 16, 3),
    "model.layers.1.self_attn.q_proj": (24, 16, 3),
}
#: Two spellings of each name, as ways of loading one model have them.
SPELLINGS: dict[str, tuple[str, str]] = {
    "bare backbone": ("model.", ""),
    "text tower": ("model.", "model.language_model."),
    "older text tower": ("model.language_model.", "language_model.model."),
    "GPT-2": ("transformer.h.", "h."),
    "BERT": ("bert.encoder.layer.", "encoder.layer."),
    "a prefix that no list has": ("thinker.model.layers.", "model.layers."),
    "compiled": ("_orig_mod.model.", "model."),
    "FSDP": ("model._fsdp_wrapped_module.", "model."),
}


def renamed(factors: Factors, change: Callable[[str], str]) -> Factors:
    return {change(name): pair for name, pair in factors.items()}


def checks(one: Path, other: Path, unrelated: Path) -> None:
    """All that compares takes the first two for one update, and the third for another."""
    comparison = lorafast.compare([one, other, unrelated], names=["x", "y", "z"])
    assert comparison.cosine[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert abs(comparison.cosine[0, 2]) < 0.5
    assert not any(comparison.only_in.values())
    for module in comparison.modules.values():
        assert all(module.present)
        assert module.cosine[0, 1] == pytest.approx(1.0, abs=1e-12)
        assert module.subspace[0, 1] == pytest.approx(1.0, abs=1e-9)
        assert module.sign_agreement[0, 1] == 1.0
    assert "duplicate" in {finding.kind for finding in comparison.findings}

    similar = lorafast.similarity([one, other, unrelated], per_module=True)
    assert similar.matrix[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert abs(similar.matrix[0, 2]) < 0.5
    assert (similar.coverage == 1.0).all()
    assert similar.per_module is not None
    for matrix in similar.per_module.values():
        assert matrix[0, 1] == pytest.approx(1.0, abs=1e-12)

    (group,) = lorafast.duplicates([one, other, unrelated])
    assert group.tier in {"same_tensors", "same_update"}
    assert sorted(group.members) == sorted([one, other])

    found = lorafast.lineage(other, [one, unrelated])
    assert found.residual < 1e-6
    assert found.coefficients[one] == pytest.approx(1.0)

    run = lorafast.trajectory([one, other], by="given")
    assert run.steps[1].change == pytest.approx(0.0, abs=1e-7)
    assert run.steps[1].subspace_previous == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_prefixes_and_wrappers(tmp_path: Path, spelling: str) -> None:
    first, second = SPELLINGS[spelling]
    own = {f"{first}{n}.{leaf}": (24, 16, 3) for n in range(2) for leaf in ("query", "value")}
    factors, others = random_factors(own, 1), random_factors(own, 2)

    def change(name: str) -> str:
        return second + name.removeprefix(first)

    checks(
        write_factors(tmp_path / "one", factors),
        write_factors(tmp_path / "other", renamed(factors, change)),
        write_factors(tmp_path / "unrelated", others),
    )


#: Names of the same modules in two releases of transformers.
RELEASES: dict[str, Mapping[str, str]] = {
    "ViT": {
        "encoder.layer.0.attention.attention.query": "layers.0.attention.q_proj",
        "encoder.layer.0.attention.output.dense": "layers.0.attention.o_proj",
        "encoder.layer.0.output.dense": "layers.0.mlp.fc2",
    },
    "Mixtral": {
        "model.layers.0.block_sparse_moe.gate": "model.layers.0.mlp.gate",
        "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1": "model.layers.0.mlp.experts.0.gate_proj",
    },
    "GPT-NeoX": {
        "gpt_neox.layers.0.attention.dense": "layers.0.attention.dense",
        "embed_out": "lm_head",
    },
    "a vision tower": {
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1": (
            "vision_tower.encoder.layers.0.mlp.fc1"
        ),
        "language_model.lm_head": "lm_head",
    },
}


@pytest.mark.parametrize("release", RELEASES)
def test_releases(tmp_path: Path, release: str) -> None:
    names = RELEASES[release]
    shapes = {name: (20 + 2 * n, 16, 3) for n, name in enumerate(names)}
    factors, others = random_factors(shapes, 1), random_factors(shapes, 2)
    checks(
        write_factors(tmp_path / "one", factors),
        write_factors(tmp_path / "other", renamed(factors, names.__getitem__)),
        write_factors(tmp_path / "unrelated", others),
    )


WIDTH, INNER, EXPERTS, RANK = 12, 10, 3, 2
BLOCK = "model.layers.0."


def single_experts(seed: int, spelling: str = "w1 w3 w2") -> dict[str, tuple[Array, Array]]:
    """(B, A) of each of the three matrices of each expert."""
    shapes = {}
    gate, up, down = spelling.split()
    path = "block_sparse_moe" if gate == "w1" else "mlp"
    for expert in range(EXPERTS):
        for name in (gate, up, down):
            rows, columns = (WIDTH, INNER) if name == down else (INNER, WIDTH)
            shapes[f"{BLOCK}{path}.experts.{expert}.{name}"] = (rows, columns, RANK)
    return random_factors(shapes, seed)


def write_stacked(path: Path, single: Factors, peft: str) -> Path:
    """The same updates as PEFT's `target_parameters` keep them: gate and up below one another."""
    pairs: dict[str, list[tuple[Array, Array]]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(EXPERTS):
        names = [f"{BLOCK}block_sparse_moe.experts.{expert}.{name}" for name in ("w1", "w3", "w2")]
        gate, up, down = (single[name] for name in names)
        zero = np.zeros_like(gate[0])
        b = np.block([[gate[0], zero], [zero, up[0]]])
        pairs["gate_up_proj"].append((b, np.concatenate([gate[1], up[1]])))
        pad = np.zeros((WIDTH, RANK)), np.zeros((RANK, INNER))
        b = np.concatenate([down[0], pad[0]], axis=1)
        pairs["down_proj"].append((b, np.concatenate([down[1], pad[1]])))
    tensors = {}
    for parameter, wrapper in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        own = pairs[parameter]
        if peft < "0.19":
            # As (in, out), in which PEFT took the experts of every model.
            own = [(a.T, b.T) for b, a in own]
        a = np.concatenate([a for _, a in own])
        # The expert is the fastest index of B's columns.
        b = np.stack([b for b, _ in own], axis=2).reshape(len(own[0][0]), -1)
        key = f"{PREFIX}{BLOCK}mlp.experts{wrapper}"
        tensors |= {f"{key}.lora_A.weight": tensor(a, "F64")}
        tensors |= {f"{key}.lora_B.weight": tensor(b, "F64")}
    path.mkdir()
    config = adapter_config(
        r=2 * RANK,
        lora_alpha=2 * RANK,
        peft_version=peft,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


@pytest.mark.parametrize("peft", ["0.18.0", "0.20.0"])
def test_experts_one_by_one_and_stacked(tmp_path: Path, peft: str) -> None:
    one, other = single_experts(1), single_experts(2)
    single = write_factors(tmp_path / "single", one)
    stacked = write_stacked(tmp_path / "stacked", one, peft)
    for order in ([single, stacked], [stacked, single]):
        comparison = lorafast.compare(order)
        assert comparison.cosine[0, 1] == pytest.approx(1.0, abs=1e-12)
        assert len(comparison.modules) == 3 * EXPERTS
        assert not any(comparison.only_in.values())
        assert lorafast.similarity(order).matrix[0, 1] == pytest.approx(1.0, abs=1e-12)
        (group,) = lorafast.duplicates(order)
        assert group.tier == "same_update"
    assert lorafast.lineage(stacked, [single]).residual < 1e-7
    # Another update: the cosine is that of the dense ones.
    another = write_stacked(tmp_path / "another", other, peft)

    def product(x: Factors, y: Factors) -> float:
        return sum(float(np.sum((x[n][0] @ x[n][1]) * (y[n][0] @ y[n][1]))) for n in x)

    products = [[product(x, y) for y in (one, other)] for x in (one, other)]
    expected = products[0][1] / math.sqrt(products[0][0] * products[1][1])
    matrix = lorafast.similarity([single, another, stacked]).matrix
    assert matrix[0, 1] == pytest.approx(expected, abs=1e-12)
    assert matrix[1, 2] == pytest.approx(expected, abs=1e-12)
    run = lorafast.trajectory([single, another], by="given")
    square = products[0][0] + products[1][1] - 2 * products[0][1]
    assert run.steps[1].change == pytest.approx(math.sqrt(square / products[1][1]), rel=1e-9)


def test_kohyas_names_and_pefts(tmp_path: Path) -> None:
    shapes = {f"down_blocks.{n}.attn1.to_q": (24, 16, 3) for n in range(2)}
    factors = random_factors(shapes, 1)
    peft = write_factors(tmp_path / "peft", factors)
    tensors = {}
    for name, (b, a) in factors.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": tensor(a, "F64")}
        tensors |= {f"{key}.lora_up.weight": tensor(b, "F64")}
    (tmp_path / "kohya").mkdir()
    kohya = tmp_path / "kohya" / "style.safetensors"
    write_safetensors(kohya, tensors)
    for order in ([peft, kohya], [kohya, peft]):
        assert lorafast.compare(order).cosine[0, 1] == pytest.approx(1.0, abs=1e-12)
        assert len(lorafast.duplicates(order)) == 1


def not_comparable(one: Path, other: Path, words: str) -> None:
    """All that compares says that it cannot, and why, and gives no number."""
    comparison = lorafast.compare([one, other])
    assert math.isnan(comparison.cosine[0, 1])
    assert words in " ".join(finding.reason for finding in comparison.findings)
    assert not any(module.pairs for module in comparison.modules.values())
    assert '"cosine": [[1.0, 0.0' not in comparison.to_json()

    similar = lorafast.similarity([one, other], ignore_base=True)
    assert np.isnan(similar.matrix[0, 1])
    assert words in " ".join(similar.notes)
    assert similar.nearest(one) == []
    assert len(similar.clusters(threshold=-1.0)) == 2
    similar.plot()

    found = lorafast.duplicates([one, other])
    assert not found.groups
    assert words in " ".join(found.notes)
    with pytest.raises(AdapterError, match="no candidate can be compared") as caught:
        lorafast.lineage(one, [other])
    assert words in str(caught.value)
    with pytest.raises(LorafastError) as caught_too:
        lorafast.trajectory([one, other])
    assert words in str(caught_too.value)


def pair(folder: Path, *shapes: Mapping[str, tuple[int, int, int]], **settings: Any) -> list[Path]:
    return [
        write_factors(folder / f"a{n}", random_factors(own, n), **settings)
        for n, own in enumerate(shapes)
    ]


def test_other_architectures_are_not_comparable(tmp_path: Path) -> None:
    one, other = pair(
        tmp_path,
        {"model.layers.0.self_attn.q_proj": (16, 16, 2)},
        {"transformer.h.0.attn.c_attn": (16, 16, 2)},
    )
    not_comparable(one, other, "no module of the one is known to be one of the other")


def test_two_ways_are_not_comparable(tmp_path: Path) -> None:
    one, other = pair(
        tmp_path,
        {"encoder.layers.0.q": (16, 16, 2), "decoder.layers.0.q": (16, 16, 2)},
        {"layers.0.q": (16, 16, 2)},
    )
    not_comparable(one, other, "in several ways")


@pytest.mark.parametrize(
    "towers",
    [
        ("text_model.encoder.layers.0.self_attn", "vision_model.encoder.layers.0.self_attn"),
        ("language_model.model.layers.0.self_attn", "vision_tower.layers.0.self_attn"),
        ("model.encoder.layers.0.self_attn", "model.decoder.layers.0.self_attn"),
    ],
)
def test_towers_of_one_model_are_not_taken_for_one(tmp_path: Path, towers: tuple[str, str]) -> None:
    one, other = pair(tmp_path, *({f"{tower}.q_proj": (16, 16, 2)} for tower in towers))
    not_comparable(one, other, "no module of the one is known to be one of the other")


def test_other_names_of_unknown_kind_are_not_comparable(tmp_path: Path) -> None:
    """One base and one shape: they may be the same modules under names that no rule knows."""
    one, other = pair(
        tmp_path,
        {"model.layers.0.attention.wq": (16, 16, 2)},
        {"model.layers.0.self_attn.q_proj": (16, 16, 2)},
        base_model_name_or_path="hub/llama",
    )
    not_comparable(one, other, "no module of the one is known to be one of the other")


@pytest.mark.parametrize(
    "other",
    ["layers.0.self_attn.v_proj", "model.layers.5.self_attn.q_proj", "model.layers.0.mlp.up_proj"],
)
def test_disjoint_modules_of_one_base_are_orthogonal(tmp_path: Path, other: str) -> None:
    rows = 16 if "mlp" not in other else 40
    one, two = pair(
        tmp_path,
        {"model.layers.0.self_attn.q_proj": (16, 16, 2)},
        {other: (rows, 16, 2)},
        base_model_name_or_path="hub/llama",
    )
    assert lorafast.compare([one, two]).cosine[0, 1] == 0.0
    assert lorafast.similarity([one, two]).matrix[0, 1] == 0.0
    assert lorafast.lineage(one, [two]).residual == pytest.approx(1.0)


def test_a_fleet_of_two_models_is_told_apart(tmp_path: Path) -> None:
    names = ["model.layers.0.q_proj", "layers.0.q_proj", "transformer.h.0.c_attn", "h.0.c_attn"]
    paths = pair(tmp_path, *({name: (16, 16, 2)} for name in names))
    found = lorafast.similarity(paths)
    known = np.isfinite(found.matrix)
    assert known.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, True],
        [False, False, True, True],
    ]
    assert list(found.groups.values()) == [[0, 1], [2, 3]]
    assert any("cannot be compared with" in note for note in found.notes)


def test_the_cache_of_products_knows_which_modules_are_the_same(tmp_path: Path) -> None:
    """What an adapter's modules are depends on the others."""
    names = ["encoder.layers.0.q", "layers.0.q"]
    one, other = pair(tmp_path, *({name: (16, 16, 2)} for name in names))
    cache = tmp_path / "cache"
    for _ in range(2):
        found = lorafast.similarity([one, other], cache=cache)
        expected = lorafast.similarity([one, other]).matrix
        assert np.array_equal(found.matrix, expected)
        assert found.matrix[0, 1] != 0.0


def test_heads_stand_beside_the_model_that_has_a_prefix(tmp_path: Path) -> None:
    """A LoRA on a head, and a head that is saved whole, have no prefix in either."""
    names = {"bert.encoder.layer.0.query": "encoder.layer.0.query", "lm_head": "lm_head"}
    factors = random_factors(dict.fromkeys(names, (16, 16, 2)), 1)
    others = random_factors(dict.fromkeys(names, (16, 16, 2)), 2)
    head = {f"{PREFIX}classifier.weight": tensor(np.ones((2, 16)), "F64")}
    made = [
        write_factors(tmp_path / name, own, others=head, modules_to_save=["classifier"])
        for name, own in (
            ("one", factors),
            ("other", renamed(factors, names.__getitem__)),
            ("unrelated", others),
        )
    ]
    checks(made[0], made[1], made[2])
