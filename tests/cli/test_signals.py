"""SIGTERM and SIGHUP end the command as Ctrl-C does: cleaned up, with a line and a code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._io.transformers_renames import renaming_rules
from support.files import Tensor, read_checkpoint
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint

LIMIT = 60
SIZE, WEIGHTS, RANK, TIMES = 2048, 8, 64, 64
COMMAND = "import sys; from lorafast._cli.main import main; sys.exit(main())"
IGNORING = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {COMMAND}"

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a merge that takes seconds with one thread."""
    folder = tmp_path_factory.mktemp("slow")
    modules = {f"model.layers.{n}.mlp.up_proj": (SIZE, SIZE) for n in range(WEIGHTS)}
    bits = np.random.default_rng(0).integers(0x3C00, 0x3C80, (SIZE, SIZE), dtype=np.uint16)
    data = bits.astype("<u2").tobytes()
    (folder / "base").mkdir()
    weights = {f"{module}.weight": Tensor("BF16", (SIZE, SIZE), data) for module in modules}
    write_checkpoint(folder / "base", weights, shards=2)
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    one = adapter_tensors({"m": (SIZE, SIZE)}, rank=RANK, scale=1e-3)
    factors = {
        name.replace("base_model.model.m.", f"base_model.model.{module}."): value
        for module in modules
        for name, value in one.items()
    }
    adapter = make_adapter(folder / "adapter", factors, r=RANK, lora_alpha=RANK)
    flags = ["--base", str(folder / "base"), "--adapters", *[str(adapter)] * TIMES]
    return ["merge", *flags, "--threads", "1", "--quiet"]


def start(arguments: list[str], output: Path, code: str = COMMAND) -> subprocess.Popen[str]:
    """The command, when it has begun to write."""
    command = [sys.executable, "-c", code, *arguments, "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LIMIT
    while not (output.is_dir() and any(output.rglob("*.safetensors"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGHUP, 129, "hung up\n")],
)
def test_a_signal_leaves_nothing_behind(
    slow: list[str], tmp_path: Path, number: signal.Signals, status: int, words: str
) -> None:
    process = start(slow, tmp_path / "folder" / "out")
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (status, words)
    assert not (tmp_path / "folder" / "out").exists()


def test_a_second_signal_does_not_stop_the_cleaning(slow: list[str], tmp_path: Path) -> None:
    process = start(slow, tmp_path / "out")
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (143, "terminated\n")
    assert not (tmp_path / "out").exists()


def test_the_model_that_was_there_stays(slow: list[str], tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    output = tmp_path / "out"
    lorafast.merge(base, adapter, output)
    earlier = read_checkpoint(output)
    names = sorted(path.name for path in output.iterdir())
    arguments = [*slow, "--overwrite"]
    command = [sys.executable, "-c", COMMAND, *arguments, "--output", str(output)]
    below = set(tmp_path.rglob("*"))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while set(tmp_path.rglob("*")) == below:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, errors
    assert read_checkpoint(output) == earlier
    assert sorted(path.name for path in output.iterdir()) == names


def test_a_hang_up_that_is_ignored_stays_ignored(slow: list[str], tmp_path: Path) -> None:
    process = start(slow, tmp_path / "out", IGNORING)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 143


def test_a_terminal_that_is_gone_takes_no_traceback(slow: list[str], tmp_path: Path) -> None:
    """What is printed after a hang-up fails; the exit code is still the signal's."""
    process = start(slow, tmp_path / "out")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=LIMIT) == 129
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_where_python_drops_exceptions(number: int) -> None:
    """In a destructor, as in the callbacks of weak references that an import has."""
    code = """
import os, sys, time
from lorafast._cli.signals import end_as_by_ctrl_c

end_as_by_ctrl_c()

class Dropping:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000):
            pass

try:
    Dropping()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pass
except KeyboardInterrupt as stop:
    print(getattr(stop, "lorafast_outcome", "Ctrl-C"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(int(number))],
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = {signal.SIGTERM: "('terminated', 143)", signal.SIGHUP: "('hung up', 129)"}
    assert done.stdout.strip() == expected.get(signal.Signals(number), "Ctrl-C")


def test_a_signal_is_heard_where_python_wraps_exceptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafast._cli import main as command

    def wrap(_: object) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            raise RuntimeError("Error calling __set_name__") from stop

    monkeypatch.setattr(command, "_run", wrap)
    assert command.main(["merge"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr("lorafast._io.transformers_renames.is_modest", wrap)
    pytest.importorskip("transformers")
    with pytest.raises(KeyboardInterrupt):
        renaming_rules({"model_type": "llama"})


def test_the_end_is_not_the_time_for_a_signal_once_more() -> None:
    """A timer that outlived the command would kill the interpreter as it ends."""
    code = """
import atexit, os, signal, sys, time
from lorafast._cli.main import main

class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

def late():
    Dropping()
    time.sleep(0.05)

sys.argv = ["lorafast", "recover", sys.argv[1]]
status = main()
atexit.register(late)
sys.exit(status)
"""
    command = [sys.executable, "-c", code, str(Path.cwd())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def test_a_program_that_uses_the_package_keeps_its_own_handlers(tmp_path: Path) -> None:
    from lorafast._cli.main import main

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    arguments = ["--base", str(base), "--adapters", str(adapter), "--quiet"]
    assert main(["merge", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    assert os.path.lexists(tmp_path / "out")
