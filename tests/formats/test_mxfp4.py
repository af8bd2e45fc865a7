"""gpt-oss as it is published: experts in MXFP4, transposed against the model's own layout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, narrow, read_checkpoint, snapshot, tensor
from support.handmade import PREFIX, adapter_tensors, make_adapter, write_checkpoint
from support.packed import pack_experts, unpack_experts
from support.quantised import Float64

EXPERTS, HIDDEN, INNER, RANK = 3, 64, 96, 4
# Parameter -> (outputs, inputs) of each expert's matrix.
PARAMETERS = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
LAYERS = 2
SCALE = 8 / 4
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    },
}


def experts_of(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def attention_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


def published(path: Path, shards: int = 2, seed: int = 3, **config: Any) -> Path:
    """A toy with all of gpt-oss' tensors."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}

    def plain(name: str, *shape: int, around: float = 0.0) -> None:
        tensors[name] = tensor(around + random.normal(scale=0.05, size=shape), "BF16")

    plain("model.embed_tokens.weight", 40, HIDDEN)
    plain("lm_head.weight", 40, HIDDEN)
    plain("model.norm.weight", HIDDEN, around=1)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, rows, columns in (("q", 64, 64), ("k", 32, 64), ("v", 32, 64), ("o", 64, 64)):
            plain(f"{at}.self_attn.{name}_proj.weight", rows, columns)
            plain(f"{at}.self_attn.{name}_proj.bias", rows)
        plain(f"{at}.self_attn.sinks", 4)
        plain(f"{at}.mlp.router.weight", EXPERTS, HIDDEN)
        plain(f"{at}.mlp.router.bias", EXPERTS)
        plain(f"{at}.input_layernorm.weight", HIDDEN, around=1)
        plain(f"{at}.post_attention_layernorm.weight", HIDDEN, around=1)
        for name, (outputs, inputs) in PARAMETERS.items():
            sizes = np.exp(random.normal(size=(EXPERTS, outputs, 1)))
            weight = random.normal(scale=0.05, size=(EXPERTS, outputs, inputs)) * sizes
            blocks, scales = pack_experts(weight)
            tensors[f"{experts_of(layer)}.{name}_blocks"] = blocks
            tensors[f"{experts_of(layer)}.{name}_scales"] = scales
            plain(f"{experts_of(layer)}.{name}_bias", EXPERTS, outputs)
    path.mkdir(parents=True)
    write_checkpoint(path, tensors, shards=shards)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    return path


def expert_tensors(
    layers: range = range(LAYERS), seed: int = 5, scale: float = 0.2
) -> dict[str, Tensor]:
    """PEFT's factors: the last parameter on the module, the one before it within."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        for within, (outputs, inputs) in zip(("base_layer.", ""), PARAMETERS.values(), strict=True):
            # A transposed parameter's factors are made for (in, out) as (out, in).
            a = random.normal(scale=scale, size=(RANK * EXPERTS, inputs))
            b = random.normal(scale=scale, size=(outputs, RANK * EXPERTS))
            key = f"{PREFIX}{experts_of(layer)}.{within}"
            tensors[f"{key}lora_A.weight"] = tensor(a)
            tensors[f"{key}lora_B.weight"] = tensor(b)
    return tensors


def expert_adapter(path: Path, tensors: Mapping[str, Tensor] | None = None, **more: Any) -> Path:
    settings = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "peft_version": "0.21.0",
    }
    attention = adapter_tensors({attention_of(layer): (64, 64) for layer in range(LAYERS)})
    given = attention | expert_tensors() if tensors is None else tensors
    return make_adapter(path, given, **settings | more)


def change(path: Path, layer: int, name: str) -> Float64:
    """What the adapter adds to (experts, outputs, inputs)."""
    tensors = read_checkpoint(path / "adapter_model.safetensors")
    within = "base_layer." if name == "gate_up_proj" else ""
    key = f"{PREFIX}{experts_of(layer)}.{within}"
    a, b = (tensors[f"{key}lora_{side}.weight"].float64() for side in "AB")
    return SCALE * np.stack(
        [b[:, e::EXPERTS] @ a[e * RANK : (e + 1) * RANK] for e in range(EXPERTS)]
    )


def weights(tensors: Mapping[str, Tensor], layer: int, name: str) -> Float64:
    parameter = f"{experts_of(layer)}.{name}"
    return unpack_experts(tensors[f"{parameter}_blocks"], tensors[f"{parameter}_scales"])


def test_written_in_the_models_own_layout(tmp_path: Path) -> None:
    base, lora = published(tmp_path / "base"), expert_adapter(tmp_path / "adapter")
    merged = tmp_path / "merged"
    report = lorafast.merge(base, lora, merged, dtype="bfloat16", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    packed = {name for name in before if name.endswith(("_blocks", "_scales"))}
    experts = {f"{experts_of(layer)}.{name}" for layer in range(LAYERS) for name in PARAMETERS}
    assert after.keys() == (before.keys() - packed) | experts
    for layer in range(LAYERS):
        for name, (outputs, inputs) in PARAMETERS.items():
            got = after[f"{experts_of(layer)}.{name}"]
            assert (got.dtype, got.shape) == ("BF16", (EXPERTS, inputs, outputs))
            exact = (weights(before, layer, name) + change(lora, layer, name)).transpose(0, 2, 1)
            bound = 2.0**-8 * np.abs(exact) + 1e-6
            assert np.all(np.abs(got.float64() - exact) <= bound)
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert report.tensors_merged == 2 * LAYERS + LAYERS
    # Whoever wrote it, and in whichever dtype: without being told.
    outcome = lorafast.verify(base, lora, merged, full=True)
    assert outcome.ok, outcome.problems


def test_untouched_experts_are_written_out_exactly(tmp_path: Path) -> None:
    attention = adapter_tensors({attention_of(0): (64, 64)})
    base = published(tmp_path / "base")
    lora = make_adapter(tmp_path / "adapter", attention, target_modules=["q_proj"])
    merged = tmp_path / "merged"
    lorafast.merge(base, lora, merged, dtype="bfloat16", verify=True)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    for layer in range(LAYERS):
        for name in PARAMETERS:
            exact = weights(before, layer, name).transpose(0, 2, 1)
            assert after[f"{experts_of(layer)}.{name}"].data == narrow(exact, "BF16")
    # And kept as they are, where no dtype is asked for.
    lorafast.merge(base, lora, tmp_path / "kept", verify=True)
    kept = read_checkpoint(tmp_path / "kept")
    assert {name for name in before if before[name] != kept[name]} == {f"{attention_of(0)}.weight"}


def test_quantised_again_block_by_block(tmp_path: Path) -> None:
    """As triton's kernels quantise: the least power of two under which a block's largest weight is
    no more than 6, the nearest code, ties to the even one."""
    base = published(tmp_path / "base")
    tensors = adapter_tensors({attention_of(0): (64, 64)}) | expert_tensors()
    # The second expert does not change in one layer, and some outputs in none.
    for name, value in tensors.items():
        values = value.float64().copy()
        if "experts" in name and "lora_A" in name and "layers.0" in name:
            values[RANK : 2 * RANK] = 0
        elif "experts" in name and "lora_B" in name:
            values[:5] = 0
        tensors[name] = tensor(values)
    lora = expert_adapter(tmp_path / "adapter", tensors)
    merged = tmp_path / "merged"
    report = lorafast.merge(base, lora, merged)
    before, after = read_checkpoint(base), read_checkpoint(merged)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    assert (base / "config.json").read_bytes() == (merged / "config.json").read_bytes()
    lost = asked = 0.0
    for layer in range(LAYERS):
        for name in PARAMETERS:
            start, added = weights(before, layer, name), change(lora, layer, name)
            exact = (start + added).astype(np.float32).astype(np.float64)
            blocks, scales = pack_experts(exact)
            parameter = f"{experts_of(layer)}.{name}"
            got = {key: after[f"{parameter}_{key}"] for key in ("blocks", "scales")}
            runs = (EXPERTS, -1, blocks.shape[2], 16)
            theirs = np.frombuffer(got["blocks"].data, np.uint8).reshape(runs)
            mine = np.frombuffer(blocks.data, np.uint8).reshape(runs)
            touched = (added.reshape(EXPERTS, -1, blocks.shape[2], 32) != 0).any(axis=-1)
            # But for ties that the last place of a sum decides.
            assert np.mean(theirs[touched] == mine[touched]) > 0.999
            same = np.frombuffer(got["scales"].data, np.uint8) == np.frombuffer(
                scales.data, np.uint8
            )
            assert np.mean(same.reshape(touched.shape)[touched]) > 0.999
            old = np.frombuffer(before[f"{parameter}_blocks"].data, np.uint8).reshape(runs)
            assert not touched[:, :5].any()
            assert np.array_equal(theirs[~touched], old[~touched])
            if layer == 0:
                assert not touched[1].any()
            now = weights(after, layer, name)
            lost += np.square(now - start - added)[added != 0].sum()
            asked += np.square(added).sum()
    assert report.rounding is not None
    # The attention's rounding to bfloat16 is nothing beside that of four bits.
    assert report.rounding["lost"] == pytest.approx(np.sqrt(lost / asked), rel=0.05)
    assert any("rounding takes away" in warning for warning in report.warnings) == (
        report.rounding["lost"] >= 0.2
    )
    for full in (False, True):
        outcome = lorafast.verify(base, lora, merged, full=full)
        assert outcome.ok, outcome.problems
    assert not lorafast.verify(base, lora, base).ok


def test_what_does_not_change_keeps_its_bytes(tmp_path: Path) -> None:
    base = published(tmp_path / "base", shards=1)
    tensors = {
        name: tensor(np.zeros(value.shape)) if "lora_B" in name else value
        for name, value in expert_tensors().items()
    }
    lorafast.merge(base, expert_adapter(tmp_path / "adapter", tensors), tmp_path / "merged")
    file = "model.safetensors"
    assert (base / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    base, lora = published(tmp_path / "base"), expert_adapter(tmp_path / "adapter")
    for dtype in ("auto", "bfloat16", "float32"):
        outputs = []
        for threads in (1, 2, 5):
            output = tmp_path / f"{dtype}-{threads}"
            lorafast.merge(base, lora, output, dtype=dtype, threads=threads, report=False)
            outputs.append(snapshot(output))
        assert outputs[0] == outputs[1] == outputs[2]


def test_the_same_as_a_merge_into_the_written_out_base(tmp_path: Path) -> None:
    """The layout decides nothing: the numbers are those of gpt-oss in float32."""
    base, lora = published(tmp_path / "base"), expert_adapter(tmp_path / "adapter")
    nothing = {name: tensor(np.zeros(t.shape)) for name, t in expert_tensors().items()}
    none = expert_adapter(tmp_path / "none", nothing)
    lorafast.merge(base, none, tmp_path / "plain", dtype="float32")
    lorafast.merge(tmp_path / "plain", lora, tmp_path / "one", report=False)
    lorafast.merge(base, lora, tmp_path / "other", dtype="float32", report=False)
    assert read_checkpoint(tmp_path / "one") == read_checkpoint(tmp_path / "other")


def test_taken_out_again(tmp_path: Path) -> None:
    base, lora = published(tmp_path / "base"), expert_adapter(tmp_path / "adapter")
    before = read_checkpoint(base)
    for dtype in ("auto", "float32"):
        merged, again = tmp_path / dtype, tmp_path / f"{dtype} again"
        lorafast.merge(base, lora, merged, dtype=dtype)
        lorafast.subtract(merged, lora, again, original=base)
        assert read_checkpoint(again) == before
    with pytest.raises(lorafast.LorafastError, match="rounding is too coarse to subtract from"):
        lorafast.subtract(tmp_path / "auto", lora, tmp_path / "never")
    lorafast.subtract(tmp_path / "float32", lora, tmp_path / "alone")
    alone = read_checkpoint(tmp_path / "alone")
    for name in PARAMETERS:
        start = weights(before, 1, name).transpose(0, 2, 1)
        got = alone[f"{experts_of(1)}.{name}"].float64()
        np.testing.assert_allclose(got, start, atol=1e-5)


def test_verify_names_what_is_damaged(tmp_path: Path) -> None:
    base, lora = published(tmp_path / "base", shards=1), expert_adapter(tmp_path / "adapter")
    parameter = f"{experts_of(1)}.down_proj"
    for dtype, damaged in (
        ("auto", f"{parameter}_blocks"),
        ("auto", f"{parameter}_scales"),
        ("bfloat16", parameter),
    ):
        merged = tmp_path / damaged
        lorafast.merge(base, lora, merged, dtype=dtype)
        path = merged / "model.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        start, _ = json.loads(data[8 : 8 + length])[damaged]["data_offsets"]
        data[8 + length + start + 1] ^= 0x14
        path.write_bytes(data)
        outcome = lorafast.verify(base, lora, merged, full=True)
        assert not outcome.ok
        assert len(outcome.problems) == 1
        assert parameter in outcome.problems[0]


def test_what_is_shown(tmp_path: Path) -> None:
    base, lora = published(tmp_path / "base"), expert_adapter(tmp_path / "adapter")
    scheme = "MXFP4 with a scale, a power of two, for every 32 weights"
    assert f"{scheme}" in json.dumps(lorafast.inspect(base).to_dict())
    plan = lorafast.plan(base, lora)
    assert any(f"quantised again with the same scheme (4 × {scheme})" in n for n in plan.notes)
    actions = {entry["name"]: entry["action"] for entry in plan.to_dict()["tensors"]}
    assert actions[f"{experts_of(0)}.down_proj_blocks"] == "merge"
    assert actions[f"{experts_of(0)}.down_proj_scales"] == "rescale"
    wide = lorafast.plan(base, lora, dtype="bfloat16").to_dict()
    actions = {entry["name"]: entry["action"] for entry in wide["tensors"]}
    assert actions[f"{experts_of(0)}.down_proj"] == "merge"
    assert not any(name.endswith(("_blocks", "_scales")) for name in actions)


BLOCKS, SCALES = (f"{experts_of(0)}.down_proj_{part}" for part in ("blocks", "scales"))
LAYOUTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "blocks of 8 bytes": (
        {BLOCKS: Tensor("U8", (EXPERTS, HIDDEN, 6, 8), bytes(EXPERTS * HIDDEN * 48))},
        r"down_proj_blocks as U8 of shape \[3, 64, 6, 8\] instead of runs of 16 bytes",
    ),
    "flat blocks": (
        {BLOCKS: Tensor("U8", (EXPERTS, HIDDEN, 48), bytes(EXPERTS * HIDDEN * 48))},
        r"down_proj_blocks of shape \[3, 64, 48\] instead of \(experts, outputs, inputs / 32, 16\)",
    ),
    "scales of another shape": (
        {SCALES: Tensor("U8", (EXPERTS, 3, HIDDEN), bytes(EXPERTS * HIDDEN * 3))},
        r"down_proj_scales as U8 of shape \[3, 3, 64\] instead of U8 of shape \[3, 64, 3\]",
    ),
    "scales in floats": (
        {SCALES: Tensor("F32", (EXPERTS, HIDDEN, 3), bytes(EXPERTS * HIDDEN * 12))},
        r"down_proj_scales as F32 of shape \[3, 64, 3\] instead of U8",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_cannot_be_read_is_one_sentence(case: str, tmp_path: Path) -> None:
    others, message = LAYOUTS[case]
    base = published(tmp_path / "base", shards=1)
    write_checkpoint(base, read_checkpoint(base) | others)
    lora = expert_adapter(tmp_path / "adapter")
    with pytest.raises(lorafast.LorafastError, match=message) as caught:
        lorafast.plan(base, lora)
    assert "merge into the unquantised base instead" in str(caught.value)
    assert "\n" not in str(caught.value)
    # The attention can be merged all the same, but not the whole be written out.
    attention = adapter_tensors({attention_of(0): (64, 64)})
    beside = make_adapter(tmp_path / "beside", attention, target_modules=["q_proj"])
    lorafast.merge(base, beside, tmp_path / "merged", verify=True)
    with pytest.raises(lorafast.LorafastError, match="cannot be written as bfloat16"):
        lorafast.plan(base, beside, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_scale_that_is_no_number_is_named(dtype: str, tmp_path: Path) -> None:
    base, lora = published(tmp_path / "base", shards=1), expert_adapter(tmp_path / "adapter")
    tensors = read_checkpoint(base)
    scales = bytearray(tensors[SCALES].data)
    scales[200] = 255
    write_checkpoint(base, tensors | {SCALES: Tensor("U8", tensors[SCALES].shape, bytes(scales))})
    with pytest.raises(
        lorafast.LorafastError, match=r"down_proj_scales has .*block 200\)"
    ) as caught:
        lorafast.merge(base, lora, tmp_path / "merged", dtype=dtype)
    assert "the file is damaged" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_parameter_in_the_place_of_a_quantised_one(tmp_path: Path) -> None:
    base = published(tmp_path / "base")
    saved = {f"{PREFIX}{experts_of(0)}.down_proj": tensor(np.ones((EXPERTS, INNER, HIDDEN)))}
    lora = make_adapter(tmp_path / "adapter", saved, modules_to_save=["experts"])
    with pytest.raises(lorafast.LorafastError, match=r"which the base stores as MXFP4"):
        lorafast.plan(base, lora)


def test_transformers_and_peft_agree(tmp_path: Path) -> None:
    """transformers dequantises the base, PEFT adapts and merges it; ours loads as it is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = published(tmp_path / "base")
    model = transformers.GptOssForCausalLM.from_pretrained(
        base,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    )
    before = read_checkpoint(base)
    state = model.state_dict()
    for layer in range(LAYERS):
        for name in PARAMETERS:
            mine = weights(before, layer, name).transpose(0, 2, 1)
            theirs = state[f"{experts_of(layer)}.{name}"].double().numpy()
            assert np.array_equal(mine, theirs)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model.float(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    merged = tmp_path / "merged"
    lorafast.merge(base, tmp_path / "adapter", merged, dtype="float32", verify=True)
    loaded = transformers.GptOssForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    # As MXFP4 again it is read by transformers as by us.
    lorafast.merge(base, tmp_path / "adapter", tmp_path / "again", verify=True)
    again = read_checkpoint(tmp_path / "again")
    dequantised = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "again",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    ).state_dict()
    for name in PARAMETERS:
        mine = weights(again, 0, name).transpose(0, 2, 1)
        assert np.array_equal(mine, dequantised[f"{experts_of(0)}.{name}"].double().numpy())


@pytest.mark.alone
def test_the_memory_is_that_of_an_experts_codes(tmp_path: Path) -> None:
    """However many experts there are: a thread keeps the codes of one matrix, and tiles."""
    experts, outputs, inputs = 48, 1024, 1024
    random = np.random.default_rng(1)
    shape = (experts, outputs, inputs // 32, 16)
    parameter = f"{experts_of(0)}.down_proj"
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        f"{parameter}_blocks": Tensor("U8", shape, random.bytes(int(np.prod(shape)))),
        f"{parameter}_scales": Tensor(
            "U8", shape[:3], bytes([120]) * (experts * outputs * inputs // 32)
        ),
    }
    write_checkpoint(base, tensors)
    (base / "config.json").write_text(json.dumps(CONFIG))
    rank = 2
    lora = expert_adapter(
        tmp_path / "adapter",
        {
            f"{PREFIX}{experts_of(0)}.lora_A.weight": tensor(
                random.normal(scale=0.1, size=(rank * experts, inputs)), "BF16"
            ),
            f"{PREFIX}{experts_of(0)}.lora_B.weight": tensor(
                random.normal(scale=0.1, size=(outputs, rank * experts)), "BF16"
            ),
        },
        r=rank,
        target_modules=[],
        target_parameters=["mlp.experts.down_proj"],
    )
    program = """
import resource, sys, lorafast
lorafast.plan(*sys.argv[1:3], dtype=sys.argv[4], expert_layout="transposed")
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lorafast.merge(
    *sys.argv[1:4], dtype=sys.argv[4], expert_layout="transposed", threads=2, report=False
)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""
    for dtype in ("auto", "bfloat16"):
        command = [sys.executable, "-c", program, base, lora, tmp_path / dtype, dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        # 24 MB of codes, 96 MB in bfloat16, 192 in float32.
        assert float(done.stdout) < 24, dtype
