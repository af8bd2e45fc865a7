"""The simulated device itself: what it finds, what it lets pass, and what it does as torch does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.simulated_cuda import Simulated, simulated_cuda
from support.simulated_streams import Simulator

DEVICE = torch.device("cuda", 0)


def pinned(count: int = 4) -> torch.Tensor:
    return torch.empty(count, pin_memory=True).fill_(1.0)


def problems(scenario: Callable[[Simulator], object], **options: int) -> list[str]:
    with simulated_cuda(**options) as simulator, torch.no_grad():
        scenario(simulator)
    return simulator.checker.problems


def read_on_another(simulator: Simulator, *, ordered: bool, recorded: bool = True) -> None:
    side = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(side):
        made = torch.ones(4, device=DEVICE)
    if ordered:
        torch.cuda.current_stream().wait_stream(side)
    made.sum()
    if recorded:
        made.record_stream(torch.cuda.current_stream())


def refill(simulator: Simulator, *, waits: bool) -> None:
    source = pinned()
    uploaded = source.to(DEVICE, non_blocking=True)
    if waits:
        torch.cuda.current_stream().synchronize()
    source.fill_(2.0)
    assert uploaded.tolist() == [1.0] * 4


def look(simulator: Simulator, *, waits: bool) -> None:
    target = pinned()
    target.copy_(torch.full((4,), 3.0, device=DEVICE), non_blocking=True)
    done = torch.cuda.current_stream().record_event()
    if waits:
        done.synchronize()
        assert target.tolist() == [3.0] * 4
    else:
        assert all(math.isnan(value) for value in target.tolist())
        target.sum()


def in_a_thread(simulator: Simulator, *, joins: bool) -> None:
    target = pinned()
    thread = threading.Thread(target=lambda: target.fill_(5.0))
    thread.start()
    while thread.is_alive():
        # Seeing that it has ended orders nothing.
        time.sleep(0.001)
    if joins:
        thread.join()
    target.sum()


def in_tasks(simulator: Simulator, *, waits: bool) -> None:
    """Two tasks that run one after the other, for there is one thread."""
    target = pinned()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: target.fill_(5.0))
        if waits:
            first.result()
        pool.submit(lambda: target.fill_(6.0)).result()


def write_over(simulator: Simulator, *, ordered: bool) -> None:
    made = torch.ones(4, device=DEVICE)
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kept = made + 1
    if ordered:
        torch.cuda.current_stream().wait_event(side.record_event())
    made.zero_()
    side.synchronize()
    del kept


@pytest.mark.parametrize(
    ("scenario", "good", "bad", "says"),
    [
        (read_on_another, {"ordered": True}, {"ordered": False}, "does not wait for the write"),
        (
            read_on_another,
            {"ordered": True, "recorded": True},
            {"ordered": True, "recorded": False},
            "no record_stream tells",
        ),
        (refill, {"waits": True}, {"waits": False}, "does not wait for the read by stream"),
        (look, {"waits": True}, {"waits": False}, "does not wait for the write by stream"),
        (in_a_thread, {"joins": True}, {"joins": False}, "does not wait for the write by host"),
        (in_tasks, {"waits": True}, {"waits": False}, "does not wait for the write by host"),
        (write_over, {"ordered": True}, {"ordered": False}, "does not wait for the read"),
    ],
)
def test_what_is_not_ordered_is_found_and_what_is_passes(
    scenario: Callable[..., object], good: dict[str, bool], bad: dict[str, bool], says: str
) -> None:
    assert problems(lambda simulator: scenario(simulator, **good)) == []
    found = problems(lambda simulator: scenario(simulator, **bad))
    assert any(says in problem for problem in found), found
    assert all("test_simulated_cuda.py" in problem for problem in found)


def test_memory_that_nobody_saw_change_is_found_by_its_content() -> None:
    def change(simulator: Simulator) -> None:
        source = pinned()
        # Not through torch, nor through the core.
        array = source.numpy()
        uploaded = source.to(DEVICE, non_blocking=True)
        array[0] = 7.0
        torch.cuda.synchronize()
        del uploaded

    (problem,) = problems(change)
    assert "was changed while a copy of it" in problem


def test_a_wait_for_what_came_before_is_none_for_what_came_after() -> None:
    def early(simulator: Simulator) -> None:
        side = torch.cuda.Stream(DEVICE)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.stream(side):
            made = torch.ones(4, device=DEVICE)
        made.sum()
        side.synchronize()
        torch.cuda.synchronize()

    assert len(problems(early)) == 1


def test_what_torch_refuses_is_refused() -> None:
    with simulated_cuda(capacity=4096) as simulator:
        there = torch.ones(4, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="ordinal"):
            torch.ones(4, device="cuda:1")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(5000, dtype=torch.uint8, device=DEVICE)
        assert (there + torch.tensor(1.0)).tolist() == [2.0] * 4
        assert simulator.checker.problems == []


def test_memory_is_counted_and_the_dead_wait_for_recorded_streams() -> None:
    with simulated_cuda(workspace=1 << 20) as simulator, torch.no_grad():
        first = torch.ones(300, device=DEVICE)
        assert simulator.allocated == 1536
        view = first[:10]
        del first
        assert simulator.allocated == 1536
        side = torch.cuda.Stream(DEVICE)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            view.sum()
        view.record_stream(side)
        del view
        assert simulator.allocated == 0
        another = torch.ones(300, device=DEVICE)
        assert simulator.peak == 1536 + 1536
        torch.cuda.synchronize()
        square = another[:1].view(1, 1)
        square @ square
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.default_stream())
            square @ square
        assert simulator.allocated == 1536 + (2 << 20)
        assert isinstance(another, Simulated)


@pytest.mark.parametrize("inference", [False, True])
def test_operations_are_torchs_own(inference: bool) -> None:
    plain = torch.arange(12.0).reshape(3, 4)
    with simulated_cuda(), torch.inference_mode(inference):
        there = plain.to(DEVICE)
        assert there.is_cuda
        assert there.device == DEVICE
        version = None if inference else there._version
        there.addmm_(there[:, :3].clone(), there.clone(), alpha=2.0)
        if version is not None:
            assert there._version == version + 1
        expected = torch.addmm(plain, plain[:, :3], plain, alpha=2.0)
        assert torch.equal(there.cpu(), expected)
        assert torch.equal(there.T.contiguous().cpu(), expected.T)
        assert there.tolist() == expected.tolist()
        assert there.double().square().sum().item() == expected.double().square().sum().item()
        assert torch.tensor([1, 2], device=DEVICE).is_cuda
        taken = there[torch.tensor([0, 2], device=DEVICE)]
        assert torch.equal(taken.cpu(), expected[[0, 2]])
