"""Parts of an algorithm that are no update: one sentence says which, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.algorithms import KEY, based, generator
from support.files import tensor, write_safetensors

BROKEN: dict[str, tuple[dict[str, tuple[int, ...] | float], str]] = {
    "loha without a factor": (
        {"hada_w1_a": (24, 3), "hada_w1_b": (3, 20), "hada_w2_a": (24, 3)},
        "not its other factors",
    ),
    "loha of two sizes": (
        {"hada_w1_a": (24, 3), "hada_w1_b": (3, 20), "hada_w2_a": (23, 3), "hada_w2_b": (3, 20)},
        "no factors of a LoHa",
    ),
    "loha with one core": (
        {
            "hada_w1_a": (3, 24),
            "hada_w1_b": (3, 20),
            "hada_t1": (3, 3, 1, 1),
            "hada_w2_a": (24, 3),
            "hada_w2_b": (3, 20),
        },
        "no factors of a LoHa",
    ),
    "lokr without w2": ({"lokr_w1": (4, 4)}, "not its lokr_w2"),
    "lokr with half a w2": ({"lokr_w1": (4, 4), "lokr_w2_a": (6, 2)}, "whole or two factors"),
    "lokr with w1 twice": (
        {"lokr_w1": (4, 4), "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2": (6, 5)},
        "whole or two factors",
    ),
    "lokr that does not fit": ({"lokr_w1": (6, 4), "lokr_w2": (5, 4)}, r"shape \[30, 16\]"),
    # The number of elements alone would fit: 480.
    "lokr of the right size": ({"lokr_w1": (4, 6), "lokr_w2": (4, 5)}, r"shape \[16, 30\]"),
    "alpha of zero": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5), "alpha": 0.0},
        f"{KEY}.alpha is 0",
    ),
    "alpha of infinity": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 5), "alpha": np.inf},
        "finite number",
    ),
    "two algorithms": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "lokr_w1": (4, 4)},
        "a part of a LoRA, and .* a part of a LoKr",
    ),
    "a magnitude of another size": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "dora_scale": (7, 1)},
        "neither the outputs",
    ),
    "a magnitude beside a difference": ({"diff": (24, 20), "dora_scale": (24, 1)}, "no magnitudes"),
    "a core that does not fit": (
        {"lora_down.weight": (4, 20), "lora_mid.weight": (3, 3, 1, 1), "lora_up.weight": (24, 4)},
        "no factors with a core",
    ),
    "blocks that are not square": ({"oft_blocks": (6, 4, 3)}, "no set of square blocks"),
    "butterflies that do not come out": ({"oft_blocks": (4, 6, 4, 4)}, "no set of square blocks"),
    "half an ia3": ({"on_input": 1.0}, "not its weight"),
    "a t-lora": ({"q_layer.weight": (4, 20), "p_layer.weight": (24, 4)}, "T-LoRA"),
    "a fork's flag": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "bora_scale_r": (24,)},
        "bora_scale_r.*cannot be read",
    ),
    "a tensor of another program's": (
        {"lora_down.weight": (4, 20), "lora_up.weight": (24, 4), "lora_third": (24,)},
        "no part of an update that is known",
    ),
    # Four bytes a row in the file, and 10^12 of them in the product.
    "a lokr beyond any weight": (
        {"lokr_w1": (100_000, 1), "lokr_w2_a": (100_000, 1), "lokr_w2_b": (1, 1)},
        "expand to more than",
    ),
    "blocks of another size": ({"oft_blocks": (5, 4, 4)}, "the base's is"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    parts, sentence = BROKEN[name]
    base, _ = based(tmp_path / "base", (24, 20), "F32")
    random = generator(name)
    tensors = {
        f"{KEY}.{part}": tensor(
            np.array(value) if isinstance(value, float) else random.normal(size=value), "F16"
        )
        for part, value in parts.items()
    }
    file = write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(lorafast.LorafastError, match=sentence) as raised:
        lorafast.merge(base, file, tmp_path / "out")
    assert str(file) in str(raised.value)
    assert not (tmp_path / "out").exists()
