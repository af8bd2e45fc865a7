"""The options of how a merge is carried out, and what is asked of those of what it makes.

The latter are `MergeOptions` in `api`, beside the signatures that name each of them.
"""

# Annotations are evaluated here, as the flags are read from them.
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from lorafast._options import THREADS, Flag, executor_flag
from lorafast._types import (
    AdapterFormat,
    Compat,
    CredentialProvider,
    ExecutorChoice,
    MergePrecision,
    Progress,
    StorageOptions,
)

if TYPE_CHECKING:
    from typing import Protocol, Self

    from lorafast._io.stores import StoreSettings

    class Combination(Protocol):
        """What a merge makes, as far as those who plan it have to know: `api.MergeOptions`."""

        @property
        def compat(self) -> Compat | None: ...

        @property
        def precision(self) -> MergePrecision: ...

        @property
        def format(self) -> AdapterFormat | None: ...

        @property
        def revision(self) -> str | None: ...

        def to_core(self) -> dict[str, Any]: ...

        def _replace(
            self, *, dtype: str = ..., precision: MergePrecision = ..., revision: str | None = ...
        ) -> Self: ...


def _device(name: str) -> str:
    from lorafast._io.device_names import check_merge_name

    return check_merge_name(name)


class StoreOptions(NamedTuple):
    """How object stores are reached, where URLs name base, adapters or output."""

    storage_options: Annotated[
        StorageOptions | None,
        Flag(
            "what a store needs to know, by object_store's keys: aws_region=eu-central-1, "
            "aws_endpoint_url=…; again for each other (default: the environment's)",
            verbs=("plan", "merge", "verify", "inspect", "clean"),
            metavar="KEY=VALUE",
            name="storage-option",
        ),
    ] = None
    credential_provider: Annotated[
        CredentialProvider | None,
        Flag(None, verbs=("plan", "merge", "verify", "inspect", "clean")),
    ] = None
    io_memory: Annotated[
        int | str | None,
        Flag(
            "what reads ahead and uploads take of memory together (default: 128MiB)",
            verbs=("plan", "merge", "verify"),
            metavar="SIZE",
        ),
    ] = None

    def settings(self) -> "StoreSettings":
        """The same as what opens URLs takes it.

        Raises:
            ValueError: an option is outside its domain.
        """
        from lorafast._io.stores import settings_of

        return settings_of(self.storage_options, self.credential_provider, self.io_memory)


class ExecutionOptions(NamedTuple):
    """How a merge is carried out, or looked at again."""

    threads: Annotated[
        int | None,
        THREADS._replace(verbs=("merge", "verify", "subtract")),
    ] = None
    device: Annotated[
        str,
        Flag(
            "where products are made: cpu, cpu:amx (16-bit weights, where the processor has AMX; "
            "some differ in the last place), cuda, cuda:N, auto (cpu or cuda, whichever is faster, "
            "and says why), or torch:cpu to compare backends (default: %(default)s)",
            verbs=("merge", "verify"),
            metavar="DEVICE",
            check=_device,
            other_help={
                "verify": "where the merge was made; cpu:amx lets pass what its products are off "
                "(default: %(default)s)"
            },
        ),
    ] = "cpu"
    device_memory: Annotated[
        int | str | None,
        Flag(
            "the most of the device's memory to use, as 2GiB (default: most of what is free)",
            verbs=("merge",),
            metavar="SIZE",
        ),
    ] = None
    overwrite: Annotated[
        bool,
        Flag("replace the output directory if it exists", verbs=("merge", "subtract"), output=True),
    ] = False
    sync: Annotated[
        bool,
        Flag(
            "do not wait until the output has reached the disk, as cp does not",
            verbs=("merge",),
            output=True,
        ),
    ] = True
    verify: Annotated[
        bool,
        Flag(
            "read the result back and prove it, as verify does",
            verbs=("merge", "subtract"),
            output=True,
            other_help={"subtract": "read the result back and prove it"},
        ),
    ] = False
    report: Annotated[
        bool,
        Flag(
            "leave merge_report.json and merge_report.md out of the output",
            verbs=("merge", "subtract"),
            output=True,
            other_help={
                "subtract": "leave subtract_report.json and subtract_report.md out of the output"
            },
        ),
    ] = True
    private: Annotated[
        bool,
        Flag(
            "make the repository of an output on the hub a private one, if it is not there",
            verbs=("merge",),
            output=True,
        ),
    ] = False
    pull_request: Annotated[
        bool,
        Flag(
            "open a pull request with an output on the hub",
            verbs=("merge",),
            output=True,
        ),
    ] = False
    executor: Annotated[
        ExecutorChoice | None,
        executor_flag("the shards are written")._replace(
            verbs=("merge", "verify"),
            other_help={"verify": executor_flag("the tensors are looked at").help or ""},
        ),
    ] = None
    progress: Annotated[Progress, Flag(None, verbs=("merge", "verify", "subtract"))] = False

    def memory(self) -> int | None:
        """The most bytes of the device's memory to use, once the options are found to be sound.

        Raises:
            ValueError: an option is outside its domain.
            DeviceError: the device is not there.
            MissingDependencyError: torch is needed for the device and is not installed.
        """
        from lorafast._io.device_names import check_merge_device, parse_memory
        from lorafast._io.executors import check_executor_on
        from lorafast._io.limits import check_threads

        check_executor_on(self.executor, self.device)
        memory = parse_memory(self.device_memory, check_merge_device(self.device))
        check_threads(self.threads)
        return memory

    def require_local(self) -> None:
        """Makes sure that nothing is asked for that only an output on the hub has.

        Raises:
            ValueError: something is.
        """
        for name in ("private", "pull_request"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is of outputs on the hub (hf://owner/name), and this is a directory"
                )

    def to_core(self) -> dict[str, Any]:
        """What crosses to the core. The rest is Python's."""
        return {"threads": self.threads, "overwrite": self.overwrite, "sync": self.sync}
