"""Adapters that PEFT trained on each architecture: merged, the model computes what it learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import pytest
from architectures import CASES, MAKERS, VOCABULARY
from support import models as support
from support.files import read_checkpoint
from support.models import Models
from test_architectures import base_of, merge_exactly, terms_of
from test_matrix import assert_several_roundings
from toys import Toys, merge_with_peft, quiet, written


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


def inputs_of(kind: str) -> dict[str, Any]:
    """Something that a model of the kind takes."""
    import torch

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, VOCABULARY - 1, (2, 9), generator=generator)
    pictures = torch.randn(2, 3, 16, 16, generator=generator)
    match kind:
        case "vit":
            return {"pixel_values": pictures}
        case "llava":
            # Four patches a picture, each a token.
            tokens[:, 1:5] = VOCABULARY - 1
            return {"input_ids": tokens, "pixel_values": pictures}
        case "whisper":
            sounds = torch.randn(2, 10, 24, generator=generator)
            return {"input_features": sounds, "decoder_input_ids": tokens}
        case "t5":
            return {"input_ids": tokens, "decoder_input_ids": tokens}
        case _:
            return {"input_ids": tokens}


def train(base: Path, path: Path, settings: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Two steps of AdamW, for B is zero before the first; the outputs of what came of it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    with quiet():
        model = get_peft_model(support.load(base), LoraConfig(**settings))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=0.02)
        for _ in range(2):
            optimiser.zero_grad()
            model(**inputs).logits.square().mean().backward()
            optimiser.step()
        model.save_pretrained(path)
        with torch.no_grad():
            return model.eval()(**inputs).logits


@pytest.mark.parametrize("kind", MAKERS)
def test_trained(toys: Toys, tmp_path: Path, kind: str) -> None:
    import torch

    base, inputs = base_of(toys, kind, "F32"), inputs_of(kind)
    # Experts, where the architecture has them: what is fused in memory and apart on disk.
    name = "experts" if "experts" in CASES[kind] else next(iter(CASES[kind]))
    learned = train(base, tmp_path / "adapter", dict(CASES[kind][name]), inputs)
    report = lorafast.merge(base, tmp_path / "adapter", tmp_path / "out", verify=True)
    assert not report.warnings
    with quiet(), torch.no_grad():
        merged = support.load(tmp_path / "out")(**inputs).logits
        untrained = support.load(base)(**inputs).logits
    scale = learned.abs().max()
    assert (merged - learned).abs().max() <= 2e-5 * scale
    assert (untrained - learned).abs().max() > 1e-3 * scale

    ours, before = read_checkpoint(tmp_path / "out"), read_checkpoint(base)
    terms = terms_of(before, merge_exactly(base, tmp_path / "adapter", tmp_path / "exact"))
    theirs = written(merge_with_peft(base, [tmp_path / "adapter"]), tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert_several_roundings(ours, theirs, terms, 2)
