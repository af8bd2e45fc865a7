"""GGUF adapters: merged to the bytes of the PEFT adapter with equal tensors, or refused."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast import _core
from numpy.typing import NDArray
from support import gguf_files
from support.files import Tensor, read_safetensors, tensor
from support.gguf_files import (
    HEADS,
    LLAMA,
    adapter_metadata,
    arrays,
    encode,
    factors,
    gguf_adapter,
    is_embedding,
    llama_base,
    merged,
    name_of,
    of_arrays,
    peft,
    permuted,
    regrouped,
    values_last,
)
from support.handmade import make_base
from support.refusal import refuses


@pytest.mark.parametrize("how", [{}, {"version": 2}, {"alignment": 64}, {"alignment": 8}])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_gguf_adapter_merges_to_the_bytes_of_peft(
    dtype: str, how: dict[str, Any], tmp_path: Path
) -> None:
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA)
    file = gguf_adapter(tmp_path / "style.gguf", made, dtype, **how)
    reference = peft(tmp_path / "peft", made, dtype)
    expected = merged(base, reference, tmp_path / "a")
    assert merged(base, file, tmp_path / "b") == expected
    assert lorafast.verify(base, file, tmp_path / "b").ok
    both = merged(base, [file, reference], tmp_path / "c")
    assert both == merged(base, [reference, reference], tmp_path / "d")
    listing = lorafast.inspect(file).to_dict()["adapter"]
    assert _core.adapter_format(file) == "gguf"
    assert (listing["r"], listing["alpha"]) == (4, 8)


def test_a_merge_is_what_the_formulas_say(tmp_path: Path) -> None:
    """In float64, with llama.cpp's own view of the rows: W' permuted = W permuted + s·B·A."""
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA, rank=3)
    file = gguf_adapter(tmp_path / "style.gguf", made, alpha=5.0)
    merged(base, file, tmp_path / "out")
    stored = arrays(made)
    before = read_safetensors(base / "model.safetensors")
    after = read_safetensors(tmp_path / "out" / "model.safetensors")
    for module in LLAMA:
        a, b = (stored[f"{name_of(module)}.lora_{part}"].astype("f4").astype("f8") for part in "ab")
        weights = [side[f"{module}.weight"].float64() for side in (before, after)]
        if module.endswith(("q_proj", "k_proj")):
            weights = [permuted(weight, 3 if "k_proj" in module else 6) for weight in weights]
        change = a @ b.T if is_embedding(module) else b @ a
        np.testing.assert_allclose(weights[1], weights[0] + 5 / 3 * change, atol=2e-7)


def test_gguf_py_writes_what_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is in the extra test")
    made = factors(LLAMA)
    writer = gguf.GGUFWriter(tmp_path / "style.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 8.0)
    writer.add_array("general.tags", [f"tag {number}" for number in range(100)])
    for name, value in arrays(made).items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = llama_base(tmp_path / "base")
    expected = merged(base, peft(tmp_path / "peft", made), tmp_path / "a")
    assert merged(base, tmp_path / "style.gguf", tmp_path / "b") == expected


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_an_alpha_the_scale_is_one_and_said_so(alpha: float | None, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA)
    file = of_arrays(tmp_path / "x.gguf", arrays(made), adapter_metadata(alpha=alpha))
    reference = peft(tmp_path / "peft", made, lora_alpha=4)
    assert merged(base, file, tmp_path / "a") == merged(base, reference, tmp_path / "b")
    (note,) = lorafast.inspect(file).to_dict()["adapter"]["notes"]
    assert "each scale is 1" in note


def test_the_scale_is_alpha_over_each_tensor_s_own_rank(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    small, large = list(LLAMA)[:4], list(LLAMA)[4:]
    made = factors({name: LLAMA[name] for name in small}, rank=2)
    made |= factors({name: LLAMA[name] for name in large}, rank=5)
    file = gguf_adapter(tmp_path / "x.gguf", made, alpha=6.0)
    ranks = {f"^{name}$".replace(".", r"\."): 2 for name in small}
    reference = peft(tmp_path / "peft", made, r=5, lora_alpha=6, rank_pattern=ranks)
    assert merged(base, file, tmp_path / "a") == merged(base, reference, tmp_path / "b")


def test_the_rest_of_the_models_keep_their_rows(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base", model_type="qwen2")
    made = factors(LLAMA)
    metadata = adapter_metadata("qwen2")
    file = gguf_adapter(tmp_path / "x.gguf", made, heads=None, metadata=metadata)
    expected = merged(base, peft(tmp_path / "peft", made), tmp_path / "b")
    assert merged(base, file, tmp_path / "a") == expected


@pytest.mark.parametrize(
    ("architecture", "config", "groups", "module"),
    [
        ("bloom", {"n_head": 6}, 6, "transformer.h.0.self_attention.query_key_value"),
        (
            "gptneox",
            {"model_type": "gpt_neox", "num_attention_heads": 6},
            6,
            "gpt_neox.layers.0.attention.query_key_value",
        ),
        (
            "falcon",
            {"num_attention_heads": 6, "num_kv_heads": 3, "new_decoder_architecture": True},
            3,
            "transformer.h.0.self_attention.query_key_value",
        ),
        (
            "falcon",
            {"num_attention_heads": 6, "num_kv_heads": 6, "multi_query": True},
            1,
            "transformer.h.0.self_attention.query_key_value",
        ),
    ],
)
def test_fused_rows_come_back_group_by_group(
    architecture: str, config: dict[str, Any], groups: int, module: str, tmp_path: Path
) -> None:
    rows = (6 + 2 * groups) * 4
    config = {"model_type": architecture} | config
    base = make_base(tmp_path / "base", modules={module: (rows, 20)}, config=config)
    made = factors({module: (rows, 20)})
    ((a, b),) = made.values()
    stored = {
        "blk.0.attn_qkv.weight.lora_a": a,
        "blk.0.attn_qkv.weight.lora_b": regrouped(b, 6, groups),
    }
    file = of_arrays(tmp_path / "x.gguf", stored, adapter_metadata(architecture))
    expected = merged(base, peft(tmp_path / "peft", made), tmp_path / "b")
    assert merged(base, file, tmp_path / "a") == expected


def test_heads_of_values_of_linear_attention_come_back(tmp_path: Path) -> None:
    """Qwen3.5: two heads of keys of five, six of values of four."""
    at = "model.layers.0.linear_attn."
    modules = {
        f"{at}in_proj_qkv": (2 * 2 * 5 + 24, 20),
        f"{at}in_proj_z": (24, 20),
        f"{at}in_proj_a": (6, 20),
        f"{at}out_proj": (20, 24),
    }
    config = {
        "model_type": "qwen3_5_text",
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 5,
    }
    base = make_base(tmp_path / "base", modules=modules, config=config)
    made = factors(modules)
    (qkv, z, alpha, out) = made.values()
    rest = values_last(qkv[1][20:], 2, 6)
    stored = {
        "blk.0.attn_qkv.weight": (qkv[0], np.concatenate([qkv[1][:20], rest])),
        "blk.0.attn_gate.weight": (z[0], values_last(z[1], 2, 6)),
        "blk.0.ssm_alpha.weight": (alpha[0], values_last(alpha[1], 2, 6)),
        "blk.0.ssm_out.weight": (values_last(out[0].T, 2, 6).T, out[1]),
    }
    named = {
        f"{name}.lora_{part}": pair["ab".index(part)]
        for name, pair in stored.items()
        for part in "ab"
    }
    file = of_arrays(tmp_path / "x.gguf", named, adapter_metadata("qwen35"))
    expected = merged(base, peft(tmp_path / "peft", made), tmp_path / "b")
    assert merged(base, file, tmp_path / "a") == expected


@pytest.mark.parametrize(
    ("architecture", "model_type", "pattern"),
    [
        ("llama", "mixtral", "model.layers.0.block_sparse_moe.experts.{}.w{}"),
        ("qwen3moe", "qwen3_moe", "model.layers.0.mlp.experts.{}.{}_proj"),
    ],
)
def test_experts_in_one_tensor_are_as_many_modules(
    architecture: str, model_type: str, pattern: str, tmp_path: Path
) -> None:
    parts = {"gate": "1", "up": "3", "down": "2"}
    modules = {
        pattern.format(expert, number if "w{}" in pattern else part): (
            (20, 28) if part == "down" else (28, 20)
        )
        for part, number in parts.items()
        for expert in range(3)
    }
    config = HEADS | {"model_type": model_type, "num_local_experts": 3, "num_experts": 3}
    base = make_base(tmp_path / "base", modules=modules, config=config)
    made = factors(modules)
    pairs = list(made.values())
    stored = {}
    for place, part in enumerate(parts):
        own = pairs[3 * place : 3 * place + 3]
        for side, letter in enumerate("ab"):
            stack = np.stack([pair[side] for pair in own])
            stored[f"blk.0.ffn_{part}_exps.weight.lora_{letter}"] = stack
    file = of_arrays(tmp_path / "x.gguf", stored, adapter_metadata(architecture))
    reference = peft(tmp_path / "peft", made)
    expected = merged(base, reference, tmp_path / "b")
    assert merged(base, file, tmp_path / "a") == expected
    assert len(lorafast.analyze(file).modules) == 9
    assert lorafast.similarity([file, reference]).matrix[0, 1] == pytest.approx(1, abs=1e-6)
    # Of an adapter of some experts the others are zero.
    some = dict(list(made.items())[::2])
    _core.write_adapter(
        peft(tmp_path / "some", some), tmp_path / "some.gguf", format="gguf", base=base
    )
    assert merged(base, tmp_path / "some.gguf", tmp_path / "c") == merged(
        base, tmp_path / "some", tmp_path / "d"
    )


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("qwen3moe", "qwen3_moe"), ("qwen35moe", "qwen3_5_moe_text"), ("llama", "mixtral")],
)
def test_experts_meet_those_that_a_base_stacks(
    architecture: str, model_type: str, tmp_path: Path
) -> None:
    """In float64: gate and up one below the other, as transformers 5 has them in memory."""
    random = np.random.default_rng(0)
    at = "model.layers.0.mlp.experts."
    before = {
        f"{at}gate_up_proj": tensor(random.normal(size=(3, 56, 20))),
        f"{at}down_proj": tensor(random.normal(size=(3, 20, 28))),
    }
    counts = {"num_experts": 3, "num_local_experts": 3, "model_type": model_type}
    base = make_base(tmp_path / "base", modules={}, others=before, config=HEADS | counts)
    stored, change = {}, {}
    for part, (rows, columns) in {"gate": (28, 20), "up": (28, 20), "down": (20, 28)}.items():
        a, b = random.normal(size=(3, 4, columns)), random.normal(size=(3, rows, 4))
        stored |= {
            f"blk.0.ffn_{part}_exps.weight.lora_{side}": f for side, f in (("a", a), ("b", b))
        }
        change[part] = 2 * np.einsum("eor,eri->eoi", b, a)
    file = of_arrays(tmp_path / "x.gguf", stored, adapter_metadata(architecture))
    merged(base, file, tmp_path / "out")
    after = read_safetensors(tmp_path / "out" / "model.safetensors")
    for name, expected in {
        "gate_up_proj": np.concatenate([change["gate"], change["up"]], axis=1),
        "down_proj": change["down"],
    }.items():
        found = after[at + name].float64() - before[at + name].float64()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_needs_no_order_of_rows_needs_no_base(tmp_path: Path) -> None:
    made = factors(LLAMA)
    file = gguf_adapter(tmp_path / "style.gguf", made)
    reference = peft(tmp_path / "peft", made)
    one, other = lorafast.analyze(file), lorafast.analyze(reference)
    assert list(one.modules) == list(other.modules)
    for left, right in zip(one.modules.values(), other.modules.values(), strict=True):
        np.testing.assert_allclose(left.singular_values, right.singular_values, rtol=1e-10)
    # The same base has the same order, whatever it is.
    second = gguf_adapter(tmp_path / "second.gguf", factors(LLAMA, seed=4))
    peft_second = peft(tmp_path / "peft second", factors(LLAMA, seed=4))
    cosine = lorafast.similarity([file, second]).matrix[0, 1]
    assert cosine == pytest.approx(
        lorafast.similarity([reference, peft_second]).matrix[0, 1], abs=1e-6
    )
    # What is in another order has no cosine, and the reason is said.
    apart = lorafast.similarity([file, reference])
    assert np.isnan(apart.matrix[0, 1])
    assert any("llama.cpp's order for llama" in note for note in apart.notes)
    # A file that tells the heads needs nobody else to tell them.
    told = adapter_metadata() | {
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 3,
    }
    third = gguf_adapter(tmp_path / "third.gguf", made, metadata=told)
    assert lorafast.similarity([third, reference]).matrix[0, 1] == pytest.approx(1, abs=1e-6)
    assert len(lorafast.duplicates([third, reference]).groups) == 1


def test_a_scan_finds_adapters_and_no_models(tmp_path: Path) -> None:
    made = factors(LLAMA)
    (tmp_path / "a").mkdir()
    gguf_adapter(tmp_path / "a" / "style.gguf", made)
    gguf_files.write(tmp_path / "a" / "model.gguf", encode({}, {"general.type": "model"}))
    (tmp_path / "b").mkdir()
    gguf_adapter(tmp_path / "b" / "lone.GGUF", made)
    fleet = lorafast.scan(tmp_path)
    assert not fleet.errors
    assert sorted(fleet.adapters["name"]) == ["a/style.gguf", "b/lone.GGUF"]
    # A directory with nothing else is the adapter's.
    base = llama_base(tmp_path / "base")
    one = merged(base, tmp_path / "b", tmp_path / "x")
    assert one == merged(base, tmp_path / "b" / "lone.GGUF", tmp_path / "y")
    (error,) = lorafast.scan(tmp_path / "a" / "model.gguf").errors
    assert "is a GGUF model" in error.reason


def test_the_name_of_the_file_does_not_count(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    file = gguf_adapter(tmp_path / "style.bin.part", factors(LLAMA))
    other = gguf_adapter(tmp_path / "style.gguf", factors(LLAMA))
    assert merged(base, file, tmp_path / "a") == merged(base, other, tmp_path / "b")


def test_lineage_and_comparison_take_gguf_files(tmp_path: Path) -> None:
    files = [
        gguf_adapter(tmp_path / f"{seed}.gguf", factors(LLAMA, seed=seed)) for seed in range(3)
    ]
    lineage = lorafast.lineage(files[0], files[1:])
    assert all(abs(value) < 0.1 for value in lineage.coefficients.values())
    assert len(lorafast.compare(files).names) == 3


def refused(base: Path, file: Path, *says: str) -> None:
    errors = (lorafast.AdapterError, lorafast.UnsupportedAdapterError)
    refuses(file.parent, errors, base, file, *says)
    shutil.rmtree(file.parent / "previous")


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another kind": ({"adapter.type": "control"}, ["of the kind control", "adapter.type"]),
    "no kind": ({"adapter.type": None}, ["of the kind none"]),
    "unknown architecture": ({"general.architecture": "odd"}, ["architecture odd", "not known"]),
    "no architecture": ({"general.architecture": None}, ["does not say which architecture"]),
    "another architecture": (
        {"general.architecture": "qwen2"},
        ["is for llama.cpp's architecture qwen2", "of llama (model_type llama)"],
    ),
    "infinite alpha": ({"adapter.lora.alpha": float("inf")}, ["adapter.lora.alpha", "finite"]),
    "alpha that is no number": ({"adapter.lora.alpha": "8"}, ["adapter.lora.alpha", "finite"]),
    "activated": ({"adapter.alora.invocation_tokens": [3, 4]}, ["activated LoRA"]),
    "odd alignment": ({"general.alignment": 24}, ["general.alignment is 24", "power of two"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_sentence(case: str, tmp_path: Path) -> None:
    change, says = REFUSED[case]
    metadata = {
        key: value for key, value in (adapter_metadata() | change).items() if value is not None
    }
    base = llama_base(tmp_path / "base")
    refused(base, gguf_adapter(tmp_path / "x.gguf", factors(LLAMA), metadata=metadata), *says)


def test_files_that_are_no_such_adapter_are_named(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    sound = encode(
        {name: tensor(value) for name, value in arrays(factors(LLAMA)).items()}, adapter_metadata()
    )
    file = tmp_path / "x.gguf"
    model = encode({}, {"general.architecture": "llama", "general.type": "model"})
    refused(base, gguf_files.write(file, model), "is a GGUF model")
    for version, says in [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]:
        content = sound[:4] + struct.pack("<I", version) + sound[8:]
        refused(base, gguf_files.write(file, content), says)
    with pytest.raises(lorafast.CheckpointError, match="is a GGUF adapter"):
        lorafast.plan(gguf_files.write(file, sound), peft(tmp_path / "peft", factors(LLAMA)))


def test_tensors_that_do_not_belong_are_named(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    stored = arrays(factors(LLAMA))
    q = "blk.0.attn_q.weight.lora_"
    file = tmp_path / "x.gguf"

    def check(change: Mapping[str, NDArray[Any] | Tensor | None], *says: str) -> None:
        tensors = {name: tensor(value) for name, value in stored.items()}
        for name, value in change.items():
            tensors.pop(name, None)
            if isinstance(value, Tensor):
                tensors[name] = value
            elif value is not None:
                tensors[name] = tensor(value)
        refused(base, gguf_files.write(file, encode(tensors, adapter_metadata())), *says)

    check({f"{q}a": None}, "has blk.0.attn_q.weight.lora_b but not its .lora_a")
    check({f"{q}b": None}, "has blk.0.attn_q.weight.lora_a but not its .lora_b")
    check({"blk.0.attn_q.bias": np.ones(3)}, "holds blk.0.attn_q.bias", "no factor")
    check({f"{q}a": np.ones((5, 20))}, "no pair of factors of model.layers.0.self_attn.q_proj")
    check({f"{q}b": np.ones((24, 0)), f"{q}a": np.ones((0, 20))}, "no pair of factors")
    check({f"{q}b": np.ones((22, 4))}, "22 rows", "6 heads of two halves")
    check(
        {"token_embd.weight.lora_a": np.ones((4, 30))}, "no pair of factors of model.embed_tokens"
    )
    check(
        {"blk.0.odd.weight.lora_a": np.ones((4, 20)), "blk.0.odd.weight.lora_b": np.ones((9, 4))},
        "changes blk.0.odd.weight",
        "no module that is known of llama",
    )
    quantized = Tensor("Q8_0", (4, 32), bytes(4 * 34))
    check({f"{q}a": quantized}, f"holds {q}a of the type Q8_0", "quantized", "f32, f16 or bf16")


def test_norms_are_left_out_as_llama_cpp_does_and_said_so(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    made = factors(LLAMA)
    stored = arrays(made) | {"blk.0.attn_norm.weight": np.ones(20)}
    file = of_arrays(tmp_path / "x.gguf", stored, adapter_metadata())
    expected = merged(base, peft(tmp_path / "peft", made), tmp_path / "b")
    assert merged(base, file, tmp_path / "a") == expected
    (note,) = lorafast.inspect(file).to_dict()["adapter"]["notes"]
    assert "blk.0.attn_norm.weight" in note
    assert "llama.cpp ignores" in note


def test_a_base_that_does_not_tell_its_heads_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", modules=LLAMA)
    file = gguf_adapter(tmp_path / "x.gguf", factors(LLAMA))
    refused(base, file, "blk.0.attn_q.weight", "order of rows", "num_attention_heads")


def test_a_rank_of_one_may_have_lost_its_extent(tmp_path: Path) -> None:
    """ggml drops extents of 1 behind the others."""
    base = llama_base(tmp_path / "base")
    made = factors({"model.layers.1.mlp.up_proj": (50, 20)}, rank=1)
    stored = {
        name: value.reshape(-1) if name.endswith("_a") else value
        for name, value in arrays(made).items()
    }
    file = of_arrays(tmp_path / "x.gguf", stored, adapter_metadata())
    expected = merged(base, peft(tmp_path / "peft", made, r=1), tmp_path / "b")
    assert merged(base, file, tmp_path / "a") == expected


def test_damaged_files_are_errors_and_nothing_else(tmp_path: Path) -> None:
    """Every beginning of a file, each byte of its header changed, and lengths beyond measure."""
    sound = encode(
        {name: tensor(value) for name, value in arrays(factors(LLAMA)).items()},
        adapter_metadata() | {"adapter.lora.task_name": "style", "tags": [1, 2, 3]},
    )
    file = tmp_path / "x.gguf"
    header = sound.index(b"output.weight.lora_b") + 60

    def read(content: bytes) -> None:
        gguf_files.write(file, content)
        try:
            lorafast.inspect(file)
        except lorafast.LorafastError as error:
            said = str(error)
            assert "panicked" not in said
            assert said.startswith(str(file))
            assert "\n" not in said

    for end in [*range(0, header, 3), len(sound) - 1, len(sound) - 40]:
        read(sound[:end])
    random = np.random.default_rng(0)
    for at in range(0, header, 2):
        changed = bytearray(sound)
        changed[at] = random.integers(256)
        read(bytes(changed))
    for at in range(4, header, 5):
        for length in (2**64 - 1, 2**63, 2**40, 2**31):
            read(sound[:at] + struct.pack("<Q", length) + sound[at + 8 :])
    # The end of a whole file is told for what it is.
    with pytest.raises(lorafast.AdapterError, match="is truncated: its header describes"):
        lorafast.inspect(gguf_files.write(file, sound[:-400]))


def test_a_loaded_model_is_merged_into(tmp_path: Path) -> None:
    """By its own config, under its names in memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lorafast.torch import merge_into

    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        vocab_size=30,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    own = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    made = factors({name: own[f"{name}.weight"] for name in LLAMA})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merge_into(model, gguf_adapter(tmp_path / "x.gguf", made))
    one = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    merge_into(model, peft(tmp_path / "peft", made))
    for name, value in model.state_dict().items():
        assert torch.equal(one[name], value), name
    assert not torch.equal(one["lm_head.weight"], state["lm_head.weight"])
