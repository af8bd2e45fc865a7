"""Ray as an executor of `concurrent.futures`: tasks are Ray's, and so is what happens to them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any

from lorafast._errors import missing


class RayFuture(Future[Any]):
    """A task of Ray's."""

    def __init__(self, ray: Any, task: Any) -> None:
        super().__init__()
        self._ray, self._task = ray, task

    def cancel(self) -> bool:
        """Asks Ray to cancel the task, also one that is under way; it ends with Ray's error."""
        with suppress(Exception):
            self._ray.cancel(self._task, recursive=False)
        return False


class RayExecutor(Executor):
    """The cluster that this process is connected to, else one that is there, else one of its own.

    A task runs again up to three times where its worker or its node dies, or the system refuses
    something (`OSError`), but not where it raises anything else.
    """

    def __init__(self, *, cpus: int) -> None:
        """Connects.

        Args:
            cpus: of the cluster's processors each task takes so many.

        Raises:
            MissingDependencyError: Ray is not installed.
        """
        try:
            import ray
        except ImportError as error:
            raise missing("ray", "ray", "have work done on a Ray cluster") from error
        self._ray = ray
        self._is_own = not ray.is_initialized()
        if self._is_own:
            # RAY_ADDRESS, or a cluster that runs on this machine; else one is started.
            ray.init(include_dashboard=False, log_to_driver=False)
        self._options = {"num_cpus": cpus, "max_retries": 3, "retry_exceptions": [OSError]}
        self._max_workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)

    def submit(
        self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any
    ) -> Future[Any]:
        """Makes it a task."""
        remote = self._ray.remote(**self._options)(function)
        task = remote.remote(*arguments, **keywords)
        future = RayFuture(self._ray, task)
        task.future().add_done_callback(partial(_settle, future))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the connection, if it was made here."""
        if self._is_own and self._ray.is_initialized():
            self._ray.shutdown()


def _settle(future: Future[Any], of_ray: Future[Any]) -> None:
    error = of_ray.exception()
    if error is None:
        future.set_result(of_ray.result())
        return
    # What a task raised comes wrapped, in a class that is made of both. The wrapper's text is the
    # task's traceback.
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and cause is not error:
        cause.__cause__ = error
        error = cause
    future.set_exception(error)
