"""What a few bytes of a stranger's file can ask for, and how soon it can be interrupted."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from lorafast._io.config_bounds import is_modest, with_few_positions
from support.files import tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base

# Far beyond what anything here takes; without its bound each would take minutes or all memory.
SOON = 20.0
# 2^16 ways to take the letters apart, before the end shows that none fits.
SLOW_NAME, SLOW_KEY = "a" * 16 + "cb", "((?=a)a+)+b"


def factors(modules: list[str], rank: int = 1) -> dict[str, Any]:
    return adapter_tensors(dict.fromkeys(modules, (2, 2)), rank=rank)


def ranks(adapter: Path) -> dict[str, int]:
    modules = lorafast.inspect(adapter)["adapter"]["modules"]
    return {module["name"]: module["rank"] for module in modules}


def refused(adapter: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(lorafast.AdapterError) as caught:
        lorafast.inspect(adapter)
    assert time.monotonic() - begin < SOON
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Patterns


PATTERNS = [
    "q_proj",
    "layers.0.mlp.up_proj",
    r"layers\.1\..*",
    "^model.layers.0.self_attn.q_proj",
    r"(self_attn|mlp)\.\w+",
    r".*\.(?!0)\d\.self_attn\.q_proj",
    "nothing",
    r"layers\.\d\.(?P<part>mlp)\.up_(?:proj|x)$",
]


@pytest.mark.parametrize("first", range(len(PATTERNS)))
def test_patterns_are_read_as_python_reads_them(tmp_path: Path, first: int) -> None:
    keys = PATTERNS[first:] + PATTERNS[:first]
    pattern = {key: value for value, key in enumerate(keys, start=1)}
    expected = {}
    for module in MODULES:
        found = (key for key in keys if re.match(rf"^(.*\.)?({key})$", module))
        expected[module] = pattern[next(found)]
    tensors = {
        name: value
        for module, shape in MODULES.items()
        for name, value in adapter_tensors({module: shape}, rank=expected[module]).items()
    }
    adapter = make_adapter(tmp_path / "adapter", tensors, rank_pattern=pattern)
    assert ranks(adapter) == expected


def test_a_pattern_beyond_its_steps_is_an_error_that_names_it(tmp_path: Path) -> None:
    modules = [f"m.{'a' * 60}cb.{n}cb" for n in range(3)] + ["m." + "a" * 60 + "cb"]
    for field in ("rank_pattern", "alpha_pattern"):
        adapter = make_adapter(
            tmp_path / field, factors(modules), r=1, **{field: {"nothing": 1, SLOW_KEY: 1}}
        )
        message = refused(adapter)
        assert "take more than" in message
        assert f'"{SLOW_KEY}" of {field}' in message
        assert "adapter_config.json" in message


def test_thousands_of_patterns_over_thousands_of_modules(tmp_path: Path) -> None:
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(5_000)]
    pattern = dict.fromkeys(reversed(modules), 1)
    adapter = make_adapter(tmp_path / "adapter", factors(modules), r=7, rank_pattern=pattern)
    begin = time.monotonic()
    assert set(ranks(adapter).values()) == {1}
    # 46 s one by one.
    assert time.monotonic() - begin < SOON


@pytest.mark.parametrize("key", ["(a{1000}){1000}", r"(?=x)\w{100000}", "(" * 50_000])
def test_a_pattern_too_large_to_compile(tmp_path: Path, key: str) -> None:
    message = refused(make_adapter(tmp_path / "adapter", rank_pattern={key: 1}))
    assert "rank_pattern" in message
    assert len(message) < 1_000


# Counts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 10**18}, ["r ", "1048576"]),
        ({"rank_pattern": {"q_proj": 1 << 21}}, ["rank_pattern", "1048576"]),
        ({"layer_replication": [[0, 10**12]]}, ["layer_replication", "16384"]),
        ({"layer_replication": [[0, 2]] * 10**5}, ["layer_replication", "200000"]),
        ({"use_bdlora": {"nblocks": 10**15}}, ["nblocks", "65536"]),
        ({"use_bdlora": {"target_modules_bd_a": ["x"] * 300}}, ["target_modules_bd_a", "256"]),
        ({"trainable_token_indices": [2**64 - 1]}, ["trainable_token_indices", "4294967295"]),
        ({"enable_lora": [True] * 5_000}, ["enable_lora", "1024"]),
        ({"target_parameters": [f"p{n}" for n in range(10**4)]}, ["target_parameters", "64"]),
        ({"rank_pattern": {f"p{n}": 1 for n in range(100_001)}}, ["rank_pattern", "100000"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_count_beyond_what_there_is(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    message = refused(make_adapter(tmp_path / "adapter", factors(["m.q_proj"], 4), **settings))
    for word in words:
        assert word in message
    assert len(message) < 2_000


def test_layers_repeated_within_the_bounds_still_work(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    ranges = [[0, 2], [0, 1]]
    modules = {"model.layers.2.self_attn.q_proj": (24, 20)}
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules), layer_replication=ranges)
    assert lorafast.plan(base, adapter).tensors_merged == 1


@pytest.mark.parametrize("threads", [0, -1, 1025, 65_536, 10**30])
def test_threads_outside_their_domain(tmp_path: Path, threads: int) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    calls = [
        lambda: lorafast.merge(base, adapter, tmp_path / "out", threads=threads),
        lambda: lorafast.analyze(adapter, threads=threads),
        lambda: lorafast.compare([adapter, adapter], threads=threads),
        lambda: lorafast.scan(tmp_path, threads=threads),
        lambda: lorafast.similarity(tmp_path, threads=threads),
        lambda: lorafast.verify(base, base, adapter, threads=threads),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"threads is {threads}; it is 1 to 1024"):
            call()
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_too_many_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    assert main(["analyze", str(adapter), "--threads", "65536"]) == 1
    assert "error: threads is 65536; it is 1 to 1024" in capsys.readouterr().err


# What transformers is asked to build


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**7},
        {"n_layer": 10**7},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"vision_config": {"depths": [2, 10**7]}},
        {"num_hidden_layers": 1000, "num_local_experts": 1000},
        {"layer_types": ["full_attention"] * 10**4},
        {"hidden_size": 10**12},
        {"num_labels": 10**8},
    ],
    ids=lambda config: next(iter(config)),
)
def test_transformers_builds_no_model_of_more_modules_than_any_has(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    assert not is_modest(config)
    base = make_base(tmp_path / "base", config={"model_type": "qwen3_moe", **config})
    adapter = make_adapter(tmp_path / "adapter", factors(["model.layers.0.stranger"], 4))
    begin = time.monotonic()
    with pytest.raises(lorafast.PlanError, match="stranger"):
        lorafast.plan(base, adapter)
    assert time.monotonic() - begin < SOON


def test_the_configs_of_the_largest_models_are_modest() -> None:
    large = {
        "num_hidden_layers": 128,
        "n_routed_experts": 512,
        "num_attention_heads": 128,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "max_position_embeddings": 10_485_760,
        "gradient_clipping": 1e10,
        "layer_types": ["full_attention"] * 128,
        "quantization_config": {"modules_to_not_convert": ["lm_head"] * 5_000},
    }
    assert is_modest({"text_config": large, "vision_config": large})
    few = with_few_positions({"text_config": large})
    assert few["text_config"] == large | {"max_position_embeddings": 4096}
    assert with_few_positions(few) is few


# Names


def test_a_name_of_a_megabyte_makes_a_short_message(tmp_path: Path) -> None:
    name = "x" * 1_000_000
    base = make_base(tmp_path / "base")
    # Without it nobody asks transformers for the names of a model of that type.
    (base / "config.json").unlink()
    adapter = make_adapter(tmp_path / "stranger", factors([f"model.{name}"], 4))
    with pytest.raises(lorafast.PlanError, match="characters") as caught:
        lorafast.plan(base, adapter)
    assert len(str(caught.value)) < 2_000
    assert all(len(problem) < 2_000 for problem in caught.value.problems)
    single = {f"model.{name}.lora_A.weight": tensor(np.ones((4, 2)), "F32")}
    assert len(refused(make_adapter(tmp_path / "single", single))) < 2_000
    config = make_adapter(tmp_path / "config", rank_pattern={f"({name}": 1})
    assert len(refused(config)) < 2_000


# Interruption


PLAN = """
    import sys, lorafast

    call, base, *adapters = sys.argv[1:]
    print("working", flush=True)
    try:
        if call == "plan":
            lorafast.plan(base, adapters)
        else:
            lorafast.compare(adapters)
    except KeyboardInterrupt:
        sys.exit(77)
    print("finished")
"""


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("call", ["plan", "compare"])
def test_reading_strangers_files_can_be_interrupted(tmp_path: Path, call: str) -> None:
    base = make_base(tmp_path / "base")
    # Each takes a second, within its steps.
    modules = [f"m{n}.{SLOW_NAME}" for n in range(100)]
    adapter = make_adapter(tmp_path / "slow", factors(modules), r=1, rank_pattern={SLOW_KEY: 1})
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PLAN), call, str(base), *[str(adapter)] * 200],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 77, errors
    assert "finished" not in printed, "too fast to be interrupted: give more adapters"
    assert time.monotonic() - begin < 2.0
