"""Tasks on executors: how many at a time, errors, and work cut into runs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import Any

import lorafast
import pytest
from lorafast._io.executors import IN_FLIGHT, Task, check_executor, chunks, opened, run
from support.workers import pool


def double(number: int, *, plus: int = 0) -> int:
    return 2 * number + plus


def fail(error: Exception) -> None:
    raise error


def test_results_come_with_their_places_and_progress_with_sizes() -> None:
    tasks = [Task(double, (number,), {"plus": 1}, number + 1) for number in range(5)]
    found: dict[int, int] = {}
    told: list[tuple[int, int]] = []
    with ThreadPoolExecutor(2) as executor:
        run(
            executor,
            tasks,
            found.__setitem__,
            progress=lambda done, total: told.append((done, total)),
            done=10,
        )
    assert found == {number: 2 * number + 1 for number in range(5)}
    assert (told[0], told[-1]) == ((10, 25), (25, 25))
    assert len(told) == 6


@pytest.mark.parametrize(("workers", "most"), [(3, 6), (None, IN_FLIGHT)])
def test_few_tasks_are_in_flight(workers: int | None, most: int) -> None:
    """An executor of any kind, whose tasks end one by one."""
    held: list[Future[Any]] = []
    seen = 0

    class Slow(Executor):
        if workers is not None:
            _max_workers = workers

        def submit(self, function: Any, /, *given: Any, **how: Any) -> Future[Any]:
            nonlocal seen
            future: Future[Any] = Future()
            held.append(future)
            seen = max(seen, sum(not each.done() for each in held))
            return future

    def finish() -> None:
        for place in range(200):
            while len(held) <= place:
                time.sleep(0.001)
            held[place].set_result(place)

    thread = threading.Thread(target=finish)
    thread.start()
    found: dict[int, int] = {}
    run(Slow(), [Task(double, (0,), {}, 1)] * 200, found.__setitem__)
    thread.join()
    assert found == {place: place for place in range(200)}
    assert 1 <= seen <= most


def test_the_first_error_ends_all() -> None:
    done: list[int] = []
    stopped: list[bool] = []

    def work(number: int) -> int:
        if number == 1:
            raise lorafast.PlanError("does not fit")
        done.append(number)
        return number

    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(lorafast.PlanError, match="does not fit"),
    ):
        run(
            executor,
            [Task(work, (number,), {}, 1) for number in range(100)],
            lambda place, result: None,
            stop=lambda: stopped.append(True),
        )
    assert len(done) < 5
    assert stopped == [True]


@pytest.mark.parametrize("kind", [BrokenExecutor, type("KilledWorker", (Exception,), {})])
def test_a_death_is_one_error(kind: type[Exception]) -> None:
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(lorafast.WorkerError, match=r"worker died .*; do it again") as died,
    ):
        run(
            executor,
            [Task(fail, (kind("gone\nmore"),), {}, 1)],
            lambda place, result: None,
            again="do it again",
        )
    assert isinstance(died.value.__cause__, kind)
    assert isinstance(died.value, lorafast.LorafastError)


def test_a_given_executor_stays_open() -> None:
    with pool(1) as executor:
        for _ in range(2):
            with opened(executor) as same:
                assert same is executor
                assert same.submit(abs, -1).result() == 1


@pytest.mark.parametrize("name", ["Ray", "processes:", "processes:x", "processes:-1", "threads"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match='"ray", "processes" or "processes:N"'):
        check_executor(name)


def test_a_missing_ray_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(lorafast.MissingDependencyError, match=r'"lorafast\[ray\]"'), opened("ray"):
        pass


@pytest.mark.parametrize(
    ("sizes", "most", "count", "expected"),
    [
        ([], 10, 4, []),
        ([5, 5, 5, 5], 10, 1, [[0, 1], [2, 3]]),
        ([5, 5, 5, 5], 10, 4, [[0], [1], [2], [3]]),
        ([50, 1, 1, 1], 3, 1, [[0], [1, 2, 3]]),
        ([0, 0, 0], 10, 4, [[0, 1, 2]]),
    ],
    ids=str,
)
def test_work_is_cut_into_runs(
    sizes: list[int], most: int, count: int, expected: list[list[int]]
) -> None:
    assert chunks(sizes, most, count) == expected
