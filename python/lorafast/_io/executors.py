"""Tasks that other processes and machines do: any `concurrent.futures` executor, or Ray by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafast._errors import LorafastError, WorkerError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lorafast._types import Executor, Report

#: Tasks that an executor is given at a time, where it does not say how many workers it has.
IN_FLIGHT = 64
#: Seconds that tasks get to end after an error, or an interruption.
PATIENCE = 30.0
#: What those of an executor's own exceptions are called that say that a worker is gone: of
#: `concurrent.futures` and loky, of Dask, and of Ray.
DEATHS = frozenset(
    {
        "BrokenExecutor",
        "KilledWorker",
        "NodeDiedError",
        "ObjectLostError",
        "OutOfMemoryError",
        "RayActorError",
        "WorkerCrashedError",
    }
)
#: What `executor=` may be, for messages.
CHOICES = (
    "an executor of concurrent.futures (process pools, Dask's client.get_executor(), loky's), "
    '"ray", "processes" or "processes:N"'
)


class Task(NamedTuple):
    """A call that a worker makes."""

    function: Callable[..., Any]
    """A function of a module, which a worker can import."""
    arguments: tuple[Any, ...]
    """What can be pickled: names and options."""
    keywords: dict[str, Any]
    """Likewise."""
    size: int
    """How much of the whole it is."""


def check_executor(executor: Executor | str | None) -> None:
    """Checks that this is an executor, without starting anything.

    Raises:
        ValueError: it is none.
    """
    if executor is None or executor == "ray" or callable(getattr(executor, "submit", None)):
        return
    if isinstance(executor, str):
        name, _, count = executor.partition(":")
        is_count = count.isdecimal() and int(count) > 0
        if name == "processes" and (is_count or executor == name):
            return
    raise ValueError(f"executor is {executor!r}; it is {CHOICES}")


def check_executor_on(executor: Executor | str | None, device: str) -> None:
    """The same for work that has a device, which tasks have none of.

    Raises:
        ValueError: it is none, or a device is asked for as well.
    """
    check_executor(executor)
    if executor is not None and device != "cpu":
        raise ValueError(
            f"device is {device!r}, and with an executor every task computes on the CPU: leave the "
            'device out ("cpu")'
        )


def check_executor_name(text: str) -> str:
    """What the command takes of executors: their names.

    Raises:
        ValueError: there is none of that name.
    """
    with suppress(ValueError):
        check_executor(text)
        return text
    raise ValueError(f"{text!r} is no executor: there are ray, processes and processes:N")


@contextmanager
def opened(executor: Executor | str, threads: int | None = None) -> Iterator[Executor]:
    """The executor of that name, which ends with the context; one that is given is left as it is.

    Args:
        executor: an executor, or "ray", "processes" or "processes:N".
        threads: of each task.

    Raises:
        ValueError: it is none.
        MissingDependencyError: Ray is not installed.
    """
    check_executor(executor)
    if not isinstance(executor, str):
        yield executor
    elif executor == "ray":
        from lorafast._io.ray_executor import RayExecutor

        with RayExecutor(cpus=threads or 1) as ray:
            yield ray
    else:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        _, _, count = executor.partition(":")
        # A fork would take this process's threads and locks along.
        context = get_context("spawn")
        pool = ProcessPoolExecutor(
            int(count) if count else None,
            mp_context=context,
            initializer=_begin_worker,
        )
        try:
            yield pool
        except BaseException:
            # Nobody waits for what is still under way; what is finished is so as a whole.
            processes = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
        pool.shutdown(wait=True)


def _begin_worker() -> None:
    """What a process of a pool of this module's own does first."""
    import os
    import signal
    from multiprocessing import parent_process
    from threading import Thread

    # A terminal's Ctrl-C reaches all processes; the first one ends the others' tasks in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def end_with_parent() -> None:
        # Of a process that is killed, the workers would wait for tasks for ever: they hold both
        # ends of the pipe that these come through.
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=end_with_parent, daemon=True, name="end-with-parent").start()


def run(
    executor: Executor,
    tasks: Sequence[Task],
    receive: Callable[[int, Any], object],
    *,
    progress: Report | None = None,
    done: int = 0,
    stop: Callable[[], object] | None = None,
    again: str = "the same call again does the rest",
) -> None:
    """Has tasks done, and takes the results as they come.

    The first error ends it: tasks that are not begun are cancelled, and those under way waited for
    a while. Nothing is tried again here; Ray and Dask do that themselves where a worker dies.

    Args:
        executor: who does them.
        tasks: what to do.
        receive: is called here with the place of a task that is done, and its result.
        progress: is called with how much is done of all, as the tasks' sizes have it.
        done: how much of that was done before.
        stop: is called before the wait for tasks that are under way when it ends early.
        again: what to do where a worker died, to end a sentence.

    Raises:
        WorkerError: a worker died.
        LorafastError: what a task raised, with its traceback as the cause; other exceptions too.
    """
    from concurrent.futures import FIRST_COMPLETED, wait

    total = done + sum(task.size for task in tasks)
    left = iter(enumerate(tasks))
    pending: dict[Future[Any], tuple[int, Task]] = {}
    most = _in_flight(executor)
    if progress is not None:
        progress(done, total)
    try:
        while True:
            while len(pending) < most and (following := next(left, None)) is not None:
                place, task = following
                future = executor.submit(task.function, *task.arguments, **task.keywords)
                pending[future] = (place, task)
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                place, task = pending.pop(future)
                receive(place, future.result())
                done += task.size
                if progress is not None:
                    progress(done, total)
    except BaseException as error:
        if stop is not None:
            stop()
        under_way = [future for future in pending if not future.cancel()]
        with suppress(KeyboardInterrupt):
            wait(under_way, timeout=PATIENCE)
        if _is_death(error):
            raise WorkerError(
                f"a worker died ({_in_words(error)}), perhaps for lack of memory; {again}"
            ) from error
        raise


def _in_flight(executor: Executor) -> int:
    """How many tasks to give an executor at a time: enough that no worker waits."""
    workers = getattr(executor, "_max_workers", None)
    return 2 * workers if isinstance(workers, int) else IN_FLIGHT


def _is_death(error: BaseException) -> bool:
    if isinstance(error, LorafastError):
        return False
    return not DEATHS.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def chunks(sizes: Sequence[int], most: int, least_count: int = 16) -> list[list[int]]:
    """Cuts work into runs for tasks: the places of each.

    Args:
        sizes: of the pieces, in order.
        most: the size of a run, unless one piece alone is larger.
        least_count: runs are smaller where there would be fewer than about so many.
    """
    most = max(1, min(most, sum(sizes) // least_count))
    runs: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if runs and size <= room:
            runs[-1].append(place)
            room -= size
        else:
            runs.append([place])
            room = most - size
    return runs
