"""Configs, headers and arguments that ask for more work than anybody may."""

from __future__ import annotations

import json
import resource
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.files import write_safetensors
from support.handmade import MODULES, adapter_config, adapter_tensors, make_adapter, make_base
from support.trust.command import Argument, Running, lorafast, shortened
from support.trust.figures import Figures

#: Seconds in which each ends by itself, where two slow cores are shared.
LIMIT = 12
#: Seconds after which Ctrl-C has been taken.
STOPPED = 2.0
#: A header of 100 MB took 1.6 GB; all of these together need far less.
MEMORY = 1_000_000_000


@dataclass
class Case:
    name: str
    arguments: list[Argument]
    codes: tuple[int, ...] = (0, 1)


def cases(folder: Path) -> list[Case]:
    base = make_base(folder / "base", shards=2)
    adapter = make_adapter(folder / "adapter")
    found = []

    def merge(name: str, base: Path, adapter: Path, *more: Argument) -> None:
        found.append(
            Case(name, ["merge", "--base", base, "--adapters", adapter, "--dry-run", *more])
        )

    def configured(name: str, **settings: Any) -> Path:
        path = make_adapter(folder / name.replace(" ", "-"), adapter_tensors(), **settings)
        merge(name, base, path)
        return path

    backtracking = "(x+x+)+y|(a|a)*b|((.*)*)*c|(model|model.layers|.*)*.*.*.*.*.*=.*"
    configured("patterns that backtrack", rank_pattern={backtracking: 4, "(.*a){20}": 2})
    # What looks ahead or back, or repeats what it found, is tried in every way there is.
    ahead = r"(?=.)((.*)*)*[^a-z]"
    configured("patterns that look ahead", rank_pattern={ahead: 4}, alpha_pattern={ahead + "x": 2})
    configured("a pattern that repeats what it found", rank_pattern={r"(.*)(.*)(.*)(.*)\1\2\3x": 4})
    several = {rf"(?!x)(.*.*.*)*(.*)\2x{n}": 4 for n in range(300)}
    configured("300 patterns that look ahead", rank_pattern=several)
    configured("alpha patterns that backtrack", alpha_pattern={"((.*)*)*x": 2.0})
    configured("a target pattern that backtracks", target_modules=r"(.*)*(.*)*(.*)*(.*)*x$")
    configured("excluded modules that backtrack", exclude_modules=r"((.*)*)*x")
    configured("repeated counts in a pattern", rank_pattern={"(((a{1,1000}){1,1000}){1,1000})": 4})
    configured("a pattern of a megabyte", rank_pattern={"(a|" * 300_000 + ")" * 300_000: 4})
    configured("5,000 patterns", rank_pattern={f"never{n}.*x": 4 for n in range(5000)})
    configured("100,000 layer replications", layer_replication=[[0, 2]] * 100_000)
    configured("a range of 10^12 layers", layer_replication=[[0, 10**12]])
    configured("a range of 10^30 layers", layer_replication=[[0, 10**30]])
    configured("10^12 layers to transform", layers_to_transform=[10**12] * 10_000)
    configured("a rank of 10^12", r=10**12)
    configured("a deep config", config='{"a":' * 200_000 + "1" + "}" * 200_000)
    configured("a config of 10 MB", config=json.dumps(adapter_config() | {"x": "y" * 10_000_000}))
    configured("a name of a megabyte", **{"n" * 1_000_000: 1})

    long = {
        f"base_model.model.{'m' * 1_000_000}{n}.lora_A.weight": t
        for n, t in enumerate(adapter_tensors().values())
    }
    merge("tensor names of a megabyte", base, make_adapter(folder / "names", long))
    wide = {f"model.layers.{n}.mlp.up_proj": (2, 2) for n in range(5000)}
    many = make_base(folder / "many", modules=wide)
    patterns = {f"never{n}.*x": 2 for n in range(5000)}
    path = make_adapter(
        folder / "many-patterns", adapter_tensors(wide, rank=2), r=2, rank_pattern=patterns
    )
    merge("5,000 patterns of 5,000 modules", many, path)
    foreign = {m.replace("layers", "blocks"): s for m, s in MODULES.items()}
    for name, layers in (("10^7 layers in a config", 10**7), ("10^12 layers in a config", 10**12)):
        # Names that do not fit: transformers would be asked what the model's names are.
        described = make_base(
            folder / name.split()[0], config={
                "model_type": "qwen2_moe", "num_hidden_layers": layers, "num_experts": layers,
                "hidden_size": layers, "vocab_size": layers,
            },
        )  # fmt: skip
        merge(name, described, make_adapter(folder / f"to-{layers}", adapter_tensors(foreign)))
    for threads in (65536, 10**30):
        output = folder / f"made-by-{threads}"
        arguments = ["--base", base, "--adapters", adapter, "--output", output, "--quiet"]
        found.append(Case(f"{threads} threads", ["merge", *arguments, f"--threads={threads}"]))
        found.append(
            Case(f"{threads} threads that analyze", ["analyze", adapter, f"--threads={threads}"])
        )

    def header(name: str, text: bytes, length: int | None = None) -> None:
        path = folder / f"{name.replace(' ', '-')}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
        found.append(Case(name, ["inspect", path]))
        merge(f"{name} as a base", path, adapter)

    header("a header of 100 MB", b'{"a":{' + b" " * 99_000_000 + b"}}")
    header("200,000 tensors of none", json.dumps({
        f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)
    }).encode())  # fmt: skip
    header("a deep header", b'{"a":' * 1_000_000)
    header("a header of 2^63 bytes", b"{}", 2**63)
    header("a shape of a million zeros", json.dumps({
        "t": {"dtype": "F32", "shape": [0] * 1_000_000, "data_offsets": [0, 0]}
    }).encode())  # fmt: skip
    header(
        "a shape beyond all numbers",
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,0]}}',
    )
    index = folder / "indexed"
    index.mkdir()
    (index / "config.json").write_text("{}")
    (index / "model.safetensors.index.json").write_text(json.dumps({
        "weight_map": {f"t{n}": f"model-{n:06}-of-100000.safetensors" for n in range(100_000)}
    }))  # fmt: skip
    found.append(Case("an index of 100,000 shards", ["inspect", index]))
    merge("an index of 100,000 shards as a base", index, adapter)
    nested = folder / "nested"
    deep = nested
    for _ in range(200):
        deep /= "d" * 10
    deep.mkdir(parents=True)
    (nested / "loop").symlink_to(nested)
    write_safetensors(nested / "adapter_model.safetensors", adapter_tensors())
    found.append(Case("directories without an end", ["scan", nested, "--json"]))
    scanned = make_adapter(folder / "fleet" / "deep", config='{"a":' * 100_000).parent
    make_adapter(scanned / "sound")
    found.append(Case("a deep config in a fleet", ["scan", scanned, "--json"], (0,)))
    for command in ("inspect", "analyze", "similarity", "duplicates"):
        found.append(Case(f"{command} of a deep config", [command, scanned / "deep"]))
    return found


def limited() -> None:
    """The child may not take this machine's memory either."""
    most = 16 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@pytest.mark.alone
def test_what_asks_for_too_much_ends_soon_and_hears_ctrl_c(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("bounds")
    slowest = (0.0, "")
    for case in cases(tmp_path):
        told.add("cases")
        running = Running(case.arguments, prepare=limited)
        outcome = running.finish(LIMIT)
        fleet = case.arguments[0] in {"scan", "similarity", "duplicates", "analyze"}
        if fleet and outcome.code == 1 and "error" not in outcome.last:
            told.expect("Traceback" not in outcome.err, f"{case.name}: {shortened(outcome.err)}")
        else:
            told.check(outcome.problems(*case.codes), case.name)
        told.expect(len(outcome.err) < 20_000, f"{case.name}: says {len(outcome.err)} characters")
        slowest = max(slowest, (outcome.seconds, case.name))
        if outcome.code is not None and outcome.seconds < 1.0:
            continue
        running = Running(case.arguments, prepare=limited)
        running.wait_until_loaded()
        time.sleep(min(outcome.seconds, 3.0) / 2)
        running.process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        stopped = running.finish(LIMIT)
        took = time.monotonic() - sent
        told.add("interrupted")
        told.expect(took < STOPPED, f"{case.name}: {took:.1f} s until Ctrl-C was taken")
        told.expect(
            stopped.code in {130, *case.codes} and "Traceback" not in stopped.err,
            f"{case.name}, Ctrl-C: {stopped.code}: {shortened(stopped.err)}",
        )
    told.counts[f"slowest {slowest[1]} in tenths of a second"] = round(10 * slowest[0])
    told.settle()


@pytest.mark.alone
def test_a_long_header_takes_no_more_memory_than_some_times_its_size(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    entries = ",".join(
        f'"{"n" * 60}{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        for n in range(400_000)
    )
    text = ("{" + entries + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    code = (
        "import lorafast, pathlib, sys\n"
        "try: lorafast.plan(sys.argv[1], sys.argv[2])\n"
        "except lorafast.LorafastError: pass\n"
        # Not ru_maxrss, which starts at what the process held that forked this one.
        "status = pathlib.Path('/proc/self/status').read_text().split()\n"
        "print(int(status[status.index('VmHWM:') + 1]) * 1024)\n"
    )
    adapter = make_adapter(tmp_path / "adapter")
    import sys

    outcome = Running(["-c", code, path, adapter], command=[sys.executable]).finish(LIMIT)
    assert outcome.code == 0, outcome.err
    assert int(outcome.out) < 100_000_000 + 8 * len(text)


@pytest.mark.parametrize("argument", ["--threads=0", "--threads=-1", "--threads=x"])
def test_a_number_of_threads_that_is_none_is_said_to_be_so(argument: str, tmp_path: Path) -> None:
    outcome = lorafast(
        "merge", "--base", tmp_path, "--adapters", tmp_path, "--output", "x", argument
    )
    assert outcome.code in {1, 2}
    assert "error:" in outcome.err
    assert "Traceback" not in outcome.err
