"""Names that training tools and state dicts put into keys, which the model does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.refusal import refuses

WEIGHTS = "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"


def everything(path: Path, **settings: object) -> Path:
    """An adapter with factors, magnitudes, a module that was saved whole, biases and tokens."""
    random = np.random.default_rng(3)
    tensors = adapter_tensors() | {
        f"{PREFIX}model.layers.0.mlp.up_proj.base_layer.bias": tensor(random.normal(size=50)),
        f"{PREFIX}model.norm.weight": tensor(random.normal(size=20)),
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": tensor(
            random.normal(size=(2, 20))
        ),
    }
    for module, (rows, _) in MODULES.items():
        magnitude = tensor(1 + random.random(rows))
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
    settings = {
        "use_dora": True,
        "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed_tokens": [1, 4]},
        "alpha_pattern": {"layers.1.mlp.up_proj": 3, "layers.0.self_attn.q_proj": 24},
    } | settings
    return make_adapter(path, tensors, **settings)


def full_base(path: Path) -> Path:
    random = np.random.default_rng(4)
    others = {
        "model.layers.0.mlp.up_proj.bias": tensor(random.normal(size=50)),
        "model.embed_tokens.weight": tensor(random.normal(size=(9, 20))),
    }
    return make_base(path, others=others)


def renamed(source: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """The adapter with its keys renamed, all different."""
    tensors = read_safetensors(source / WEIGHTS)
    keys = {rename(key): value for key, value in tensors.items()}
    assert len(keys) == len(tensors)
    assert set(keys) != set(tensors)
    target.mkdir()
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    write_safetensors(target / WEIGHTS, keys)
    return target


def around(part: str, tool: str) -> Callable[[str], str]:
    """Puts a tool's name behind every part of that name in the path."""
    return lambda key: key.replace(f".{part}.", f".{part}.{tool}.")


def before_factor(tool: str) -> Callable[[str], str]:
    """Puts a tool's name at the end of the path of every module with factors."""
    return lambda key: key.replace(".lora_", f".{tool}.lora_")


def of_layer(tool: str) -> Callable[[str], str]:
    return lambda key: key.replace("layers.0.", f"layers.0.{tool}.").replace(
        "layers.1.", f"layers.1.{tool}."
    )


def mixed(key: str) -> str:
    key = of_layer("_fsdp_wrapped_module._checkpoint_wrapped_module")(key)
    key = key.replace("up_proj.", "up_proj._orig_mod.module.")
    return f"module.{key}".replace(PREFIX, f"_orig_mod.{PREFIX}module.module.")


def in_factor(key: str) -> str:
    """FSDP wraps the linear layers within PEFT's, too."""
    return key.replace(".lora_A.weight", ".lora_A._fsdp_wrapped_module.weight")


def between_peft(key: str) -> str:
    return key.replace("base_model.model.", "module.base_model._orig_mod.model._orig_mod.")


NAMES = {
    "_orig_mod in the middle": of_layer("_orig_mod"),
    "_fsdp_wrapped_module in the middle": of_layer("_fsdp_wrapped_module"),
    "_checkpoint_wrapped_module in the middle": of_layer("_checkpoint_wrapped_module"),
    "module in the middle": of_layer("module"),
    "_orig_mod behind the model": around("model.model", "_orig_mod"),
    "twice": of_layer("module.module"),
    "module at the front": lambda key: f"module.{key}",
    "module before the model": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "_orig_mod at the end": before_factor("_orig_mod"),
    "module at the end": before_factor("module"),
    "between the parts of PEFT's own": between_peft,
    "within the factors": in_factor,
    "all at once": mixed,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return full_base(tmp_path / "base")


def merged(base: Path, adapter: Path, output: Path) -> tuple[dict[str, Tensor], list[str]]:
    report = lorafast.merge(base, adapter, output)
    assert lorafast.verify(base, adapter, output).ok
    return read_checkpoint(output), list(report.notes)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tools_are_seen_through(tmp_path: Path, base: Path, name: str) -> None:
    plain = everything(tmp_path / "plain")
    wrapped = renamed(plain, tmp_path / "wrapped", NAMES[name])
    expected, silent = merged(base, plain, tmp_path / "expected")
    found, notes = merged(base, wrapped, tmp_path / "found")
    assert found == expected
    assert found["model.norm.weight"] != read_checkpoint(base)["model.norm.weight"]
    assert silent == []
    assert len(notes) == 1
    assert "which training tools put around" in notes[0]
    assert lorafast.plan(base, wrapped).notes == notes


@pytest.mark.parametrize("name", NAMES)
def test_without_a_base_they_are_seen_through_as_well(tmp_path: Path, name: str) -> None:
    plain = everything(tmp_path / "plain")
    wrapped = renamed(plain, tmp_path / "wrapped", NAMES[name])
    listed, expected = lorafast.inspect(wrapped), lorafast.inspect(plain)
    assert isinstance(listed, lorafast.AdapterListing)
    assert isinstance(expected, lorafast.AdapterListing)
    assert listed.modules == expected.modules
    assert len(listed.notes) == 1
    assert expected.notes == ()
    found, right = (lorafast.analyze(path).modules for path in (wrapped, plain))
    assert list(found) == list(right) == list(MODULES)
    for module, analysis in found.items():
        assert analysis.block == right[module].block
        assert analysis.layer == right[module].layer
        assert analysis.scaling == right[module].scaling
        assert analysis.frobenius_norm == right[module].frobenius_norm
    fleet = lorafast.scan(tmp_path)
    assert not fleet.errors


def test_a_pattern_may_know_a_module_by_its_wrapped_name(tmp_path: Path, base: Path) -> None:
    pattern = {"layers.0._checkpoint_wrapped_module.self_attn.q_proj": 5}
    wrapped = make_adapter(
        tmp_path / "wrapped",
        {of_layer("_checkpoint_wrapped_module")(k): v for k, v in adapter_tensors().items()},
        alpha_pattern=pattern,
    )
    plain = make_adapter(
        tmp_path / "plain", adapter_tensors(), alpha_pattern={"layers.0.self_attn.q_proj": 5}
    )
    expected, _ = merged(base, plain, tmp_path / "expected")
    assert merged(base, wrapped, tmp_path / "found")[0] == expected


def infixed(name: str) -> Callable[[str], str]:
    """The keys as a PEFT model's state dict has them."""

    def rename(key: str) -> str:
        for kind in ("lora_A", "lora_B"):
            key = key.replace(f".{kind}.weight", f".{kind}.{name}.weight")
        if key.endswith(("lora_magnitude_vector", "trainable_tokens_delta")):
            return f"{key}.{name}.weight" if "magnitude" in key else f"{key}.{name}"
        return key.replace(".norm.weight", f".norm.modules_to_save.{name}.weight")

    return rename


@pytest.mark.parametrize("name", ["default_0", "policy", "default", "weight", "0"])
def test_the_adapter_s_name_in_its_keys(tmp_path: Path, base: Path, name: str) -> None:
    plain = everything(tmp_path / "plain")
    named = renamed(plain, tmp_path / "named", infixed(name))
    expected, _ = merged(base, plain, tmp_path / "expected")
    found, notes = merged(base, named, tmp_path / "found")
    assert found == expected
    if name == "default":
        assert notes == []
    else:
        assert len(notes) == 1
        assert f"the adapter's name, {name}," in notes[0]
    listed = lorafast.inspect(named)
    assert isinstance(listed, lorafast.AdapterListing)
    assert [module.name for module in listed.modules] == list(MODULES)
    assert len(lorafast.analyze(named).modules) == len(MODULES)


def test_the_adapter_s_name_and_tools_together(tmp_path: Path, base: Path) -> None:
    plain = everything(tmp_path / "plain")
    both = renamed(plain, tmp_path / "both", lambda key: mixed(infixed("policy")(key)))
    expected, _ = merged(base, plain, tmp_path / "expected")
    found, notes = merged(base, both, tmp_path / "found")
    assert found == expected
    assert len(notes) == 2


def two_names(key: str) -> str:
    return infixed("default" if "layers.0" in key else "policy")(key)


def saved_by_another(key: str) -> str:
    return infixed("value" if "norm" in key else "policy")(key)


def unnamed_and_policy(key: str) -> str:
    return key if "layers.0" in key else infixed("policy")(key)


@pytest.mark.parametrize(
    ("rename", "names"),
    [
        (two_names, ["default (", "policy (", "lora_A.policy.weight"]),
        (saved_by_another, ["policy (", "value (", "modules_to_save.value.weight"]),
        (unnamed_and_policy, ["policy (", "one without a name ("]),
    ],
)
def test_two_adapters_in_one_file_are_named(
    tmp_path: Path, base: Path, rename: Callable[[str], str], names: list[str]
) -> None:
    both = renamed(everything(tmp_path / "plain"), tmp_path / "both", rename)
    says = ["2 adapters", "selected_adapters", *names]
    refuses(tmp_path, lorafast.AdapterError, base, both, *says)
    for look in (lorafast.inspect, lorafast.analyze):
        with pytest.raises(lorafast.AdapterError) as error:
            look(both)
        assert all(words in str(error.value) for words in says)


@pytest.mark.parametrize("tool", ["module", "_orig_mod"])
def test_names_that_fall_together_are_named(tmp_path: Path, base: Path, tool: str) -> None:
    again = {
        key.replace(f"{PREFIX}model", f"{PREFIX}{tool}.model"): value
        for key, value in adapter_tensors(seed=9).items()
        if "layers.1.mlp" in key
    }
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | again)
    path = "model.layers.1.mlp.up_proj"
    says = [
        f"{PREFIX}{path}.lora_A.weight and {PREFIX}{tool}.{path}.lora_A.weight are the same part",
        f"module, {path}",
    ]
    refuses(tmp_path, lorafast.AdapterError, base, adapter, *says)
    for look in (lorafast.inspect, lorafast.analyze):
        with pytest.raises(lorafast.AdapterError) as error:
            look(adapter)
        assert all(words in str(error.value) for words in says)


def test_saved_parameters_that_fall_together_are_named(tmp_path: Path, base: Path) -> None:
    twice = {
        f"{PREFIX}model.norm.weight": tensor(np.ones(20)),
        f"{PREFIX}model.norm._orig_mod.weight": tensor(np.zeros(20)),
    }
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | twice)
    refuses(tmp_path, lorafast.AdapterError, base, adapter, "both are the parameter")
    rows = {
        f"{PREFIX}model.{tool}embed_tokens.token_adapter.trainable_tokens_delta": tensor(
            np.ones((1, 20))
        )
        for tool in ("", "module.")
    }
    adapter = make_adapter(tmp_path / "rows", adapter_tensors() | rows, trainable_token_indices=[1])
    with pytest.raises(lorafast.AdapterError, match=r"both the trained rows of model\.embed"):
        lorafast.plan(base, adapter)


OWN = {
    "model.encoder.module.q_proj": (24, 20),
    "model.encoder.q_proj": (24, 20),
    "model.module.up_proj": (50, 20),
}


def test_a_model_s_own_module_of_that_name_is_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=OWN)
    plain = make_adapter(tmp_path / "plain", adapter_tensors(OWN))
    expected, notes = merged(base, plain, tmp_path / "expected")
    before = read_checkpoint(base)
    assert notes == []
    assert all(expected[f"{module}.weight"] != before[f"{module}.weight"] for module in OWN)
    # What tools add beside it goes, at the front and in the middle.
    for count, rename in enumerate(
        [
            lambda key: key.replace(PREFIX, f"{PREFIX}module."),
            lambda key: key.replace("encoder.", "encoder._orig_mod."),
            lambda key: key.replace("up_proj.", "up_proj.module."),
        ]
    ):
        wrapped = renamed(plain, tmp_path / f"wrapped{count}", rename)
        found, notes = merged(base, wrapped, tmp_path / f"found{count}")
        assert found == expected
        assert len(notes) == 1
    # With the base at hand, an analysis finds its weights.
    assert set(lorafast.analyze(plain, base=base).modules) == set(OWN)


def test_a_base_with_a_tool_s_names_takes_an_adapter_with_them(tmp_path: Path) -> None:
    modules = {f"_orig_mod.{module}": shape for module, shape in MODULES.items()}
    base = make_base(tmp_path / "base", modules=modules)
    bare = make_adapter(tmp_path / "bare")
    same = make_adapter(tmp_path / "same", adapter_tensors(modules))
    expected, _ = merged(base, bare, tmp_path / "expected")
    assert merged(base, same, tmp_path / "found")[0] == expected


def test_kohya_s_names_of_a_compiled_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    random = np.random.default_rng(5)

    def write(path: Path, name: Callable[[str], str]) -> Path:
        tensors = {}
        for module, (rows, columns) in MODULES.items():
            key = name(module.replace(".", "_"))
            tensors[f"{key}.lora_down.weight"] = tensor(random.normal(size=(4, columns)))
            tensors[f"{key}.lora_up.weight"] = tensor(random.normal(size=(rows, 4)))
        write_safetensors(path, tensors)
        return path

    random = np.random.default_rng(5)
    plain = write(tmp_path / "plain.safetensors", lambda name: f"lora_unet_{name}")
    expected, _ = merged(base, plain, tmp_path / "expected")
    for count, name in enumerate(
        [
            lambda name: f"lora_unet__orig_mod_{name}",
            lambda name: f"lora_unet_{name.replace('layers_0_', 'layers_0__orig_mod_')}",
        ]
    ):
        random = np.random.default_rng(5)
        compiled = write(tmp_path / f"compiled{count}.safetensors", name)
        found, notes = merged(base, compiled, tmp_path / f"found{count}")
        assert found == expected
        assert len(notes) == 1
    listed = lorafast.inspect(compiled)
    assert isinstance(listed, lorafast.AdapterListing)
    assert listed.modules == lorafast.inspect(plain).modules  # type: ignore[union-attr]  # of an adapter, as above
    both = read_safetensors(plain) | read_safetensors(compiled)
    write_safetensors(tmp_path / "both.safetensors", both)
    with pytest.raises(lorafast.AdapterError, match="which are one module"):
        lorafast.inspect(tmp_path / "both.safetensors")
