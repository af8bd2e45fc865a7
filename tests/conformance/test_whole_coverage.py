"""Used + not needed + refused = all tensors, for every adapter that PEFT made for the matrix."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import pytest
from matrix import FEATURES, Entry, Feature
from support.files import read_header
from support.models import Models
from test_matrix import make_adapters
from toys import Toys

CASES = [
    pytest.param(feature, entry, id=f"{feature.name}-{entry.name}".replace(" ", "_"))
    for feature in FEATURES
    for entry in feature.entries
]


@pytest.fixture(scope="module")
def toys(models: Models) -> Toys:
    return Toys(models)


def tensors_in(adapter: Path) -> list[str]:
    header, _ = read_header(adapter / "adapter_model.safetensors")
    return [name for name in header if name != "__metadata__"]


@pytest.mark.parametrize(("feature", "entry"), CASES)
def test_every_tensor_and_field_is_covered(toys: Toys, feature: Feature, entry: Entry) -> None:
    adapters = make_adapters(toys, feature, entry, "F32")
    plan = lorafast.plan(toys.base(entry.base), adapters).to_dict()
    for adapter, planned in zip(adapters, plan["adapters"], strict=True):
        tensors, fields = planned["coverage"]["tensors"], planned["coverage"]["fields"]
        uses = [entry["use"] for entry in tensors]
        counted = sum(map(uses.count, ("used", "not_needed", "refused")))
        assert counted == len(tensors_in(adapter)) == planned["tensors"]
        assert {entry["name"] for entry in tensors} == set(tensors_in(adapter))
        assert uses.count("refused") == 0
        assert uses.count("used") > 0
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert [entry["name"] for entry in fields] == list(config)
        # A factor that changes nothing would be a merge in part.
        unused = [e for e in tensors if ".lora_A" in e["name"] and e["use"] != "used"]
        assert all("replaced by a later adapter" in entry["reason"] for entry in unused)
