"""Interrupted, killed and forked merges."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint

# Long past any sound end; a test that meets it has hung.
LIMIT = 60
# The arithmetic makes the merge slow, not the disk: 16 weights of 8 MiB times 64 adapters of rank
# 64 are 550 GFLOP for one thread.
WEIGHTS, SIZE, RANK, TIMES = 16, 2048, 64, 64

COMMAND = "import sys; from lorafast._cli.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and adapters that take seconds to merge with one thread."""
    folder = tmp_path_factory.mktemp("slow")
    random = np.random.default_rng(0)
    modules = {f"model.layers.{n}.mlp.up_proj": (SIZE, SIZE) for n in range(WEIGHTS)}
    base = folder / "base"
    base.mkdir()
    # Bytes of bfloat16 between 2^-7 and 2^-6.
    bits = random.integers(0x3C00, 0x3C80, (SIZE, SIZE), dtype=np.uint16)
    data = bits.astype("<u2").tobytes()
    tensors = {f"{m}.weight": Tensor("BF16", (SIZE, SIZE), data) for m in modules}
    write_checkpoint(base, tensors, shards=4)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    one = adapter_tensors({"m": (SIZE, SIZE)}, rank=RANK, scale=1e-3)
    factors = {
        name.replace("base_model.model.m.", f"base_model.model.{module}."): value
        for module in modules
        for name, value in one.items()
    }
    adapter = make_adapter(folder / "adapter", factors, r=RANK, lora_alpha=RANK)
    return base, [adapter] * TIMES


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "out"


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"still running {LIMIT} s after the signal")


MERGE = """
    import sys, lorafast

    base, output, *adapters = sys.argv[1:]

    def progress(*_):
        print("working", flush=True)

    try:
        lorafast.merge(base, adapters, output, threads=1, progress=progress)
    except KeyboardInterrupt:
        sys.exit(77)
    print("finished")
"""


def assert_no_model(output: Path) -> None:
    """Nothing that transformers, or a person, would take for a model."""
    if not output.exists():
        return
    names = {path.name for path in output.rglob("*") if path.is_file()}
    assert "model.safetensors" not in names
    assert not [name for name in names if name.endswith(".index.json")]
    # A loader's way in is the config; without an index or a single file it has nothing to load.
    with pytest.raises((lorafast.LorafastError, FileNotFoundError)):
        lorafast.plan(output, make_adapter(output.parent / "probe"))
    shutil.rmtree(output.parent / "probe")


def wait_for_work(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "working\n", (line, process.communicate())


def test_an_interrupt_in_python(slow: tuple[Path, list[Path]], output: Path) -> None:
    base, adapters = slow
    process = start(MERGE, base, output, *adapters)
    wait_for_work(process)
    process.send_signal(signal.SIGINT)
    printed, errors = finish(process)
    assert process.returncode == 77, errors
    assert "finished" not in printed, "too fast to be interrupted: make the merge slower"
    assert_no_model(output)
    # An orderly end takes its temporary files along.
    assert not output.exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_an_interrupt_keeps_the_model_that_was_there(
    slow: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = slow
    small = make_base(tmp_path / "base")
    output = tmp_path / "out"
    lorafast.merge(small, make_adapter(tmp_path / "adapter"), output)
    earlier = read_checkpoint(output)
    code = MERGE.replace("threads=1", "threads=1, overwrite=True")
    process = start(code, base, output, *adapters)
    wait_for_work(process)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process)
    assert process.returncode == 77, errors
    assert read_checkpoint(output) == earlier
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_an_error_of_the_progress_callable_ends_the_merge(
    slow: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = slow

    def progress(done: int, total: int) -> None:
        assert done < total
        raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError, match="enough"):
        lorafast.merge(base, adapters, tmp_path / "out", threads=1, progress=progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("lorafast._cli") is None, reason="there is no command yet"
)
def test_an_interrupt_of_the_command(slow: tuple[Path, list[Path]], output: Path) -> None:
    base, adapters = slow
    arguments = ["merge", "--base", base, "--adapters", *adapters, "--output", output]
    process = start(COMMAND, *arguments, "--threads", "1", "--quiet")
    wait_until_something_is_written(process, output)
    process.send_signal(signal.SIGINT)
    printed, errors = finish(process)
    assert process.returncode == 130, (printed, errors)
    assert "Traceback" not in errors
    assert_no_model(output)


def wait_until_something_is_written(process: subprocess.Popen[str], output: Path) -> None:
    import time

    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if output.exists() or (output.parent.exists() and any(output.parent.iterdir())):
            return
        if process.poll() is not None:
            pytest.fail(f"ended before anything was written: {process.communicate()}")
        time.sleep(0.01)
    process.kill()
    pytest.fail("nothing was written")


def test_a_killed_merge_leaves_no_model_and_is_made_good(
    slow: tuple[Path, list[Path]], output: Path
) -> None:
    base, adapters = slow
    process = start(MERGE, base, output, *adapters)
    wait_for_work(process)
    process.kill()
    printed, _ = finish(process)
    assert process.returncode == -signal.SIGKILL
    assert "finished" not in printed
    assert_no_model(output)

    # What the killed one left is no model and no reason to ask for `overwrite`.
    lorafast.merge(base, adapters[0], output)
    lorafast.merge(base, adapters[0], output.with_name("clean"))
    assert read_checkpoint(output) == read_checkpoint(output.with_name("clean"))
    left = {path.name for path in output.iterdir()}
    assert left == {path.name for path in output.with_name("clean").iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_merges_after_its_parent(tmp_path: Path) -> None:
    """Threads do not survive a fork: a pool of the parent's would wait for ever in the child."""
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    code = """
        import os, sys, lorafast

        base, adapter, folder = sys.argv[1:]
        lorafast.merge(base, adapter, f"{folder}/parent", threads=2)
        child = os.fork()
        if child == 0:
            lorafast.merge(base, adapter, f"{folder}/child", threads=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        lorafast.merge(base, adapter, f"{folder}/again", threads=2)
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(base), str(adapter), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the child hangs")
    assert process.returncode == 0, errors
    expected = read_checkpoint(tmp_path / "parent")
    assert read_checkpoint(tmp_path / "child") == expected
    assert read_checkpoint(tmp_path / "again") == expected


def test_merges_in_several_threads_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    base, adapter = make_base(tmp_path / "base", shards=2), make_adapter(tmp_path / "adapter")
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(lorafast.merge, base, adapter, tmp_path / f"out-{n}", threads=2)
            for n in range(8)
        ]
        for job in jobs:
            job.result(timeout=LIMIT)
    expected = read_checkpoint(tmp_path / "out-0")
    assert all(read_checkpoint(tmp_path / f"out-{n}") == expected for n in range(8))
