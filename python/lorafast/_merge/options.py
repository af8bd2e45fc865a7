"""The options of merging, planning, verifying and subtracting, in two tables.

From them follow, as from every table of `_options`, flags and help, and beyond that the
dictionaries that cross to the core.
"""

# Annotations are evaluated here, as the flags are read from them.
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from lorafast._options import THREADS, Flag, Option, options_in
from lorafast._types import Compat, ExpertLayout, Progress, Strategy

#: What merges adapters, or tells of a merge.
Verb = Literal["plan", "merge", "verify", "subtract"]

#: What `dtype` may be, and the name of each in a safetensors header.
DTYPES: dict[str, str | None] = {
    "auto": None,
    "float16": "F16",
    "fp16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float32": "F32",
    "fp32": "F32",
}


def _device(name: str) -> str:
    from lorafast._io.device_names import check_merge_name

    return check_merge_name(name)


class MergeOptions(NamedTuple):
    """What a merge is: how adapters are combined, and what the output is."""

    strategy: Annotated[
        Strategy | None,
        Flag(
            "sequential: each adapter at its full scale; weighted: each times its weight; "
            "average: each times 1/N (default: weighted where weights are given, else sequential)",
            older_name="merge-strategy",
        ),
    ] = None
    weights: Annotated[
        Sequence[float] | None,
        Flag(
            "a weight for each adapter, in their order, or behind each (style:0.7); negative ones "
            "subtract",
            metavar="W",
            short="w",
        ),
    ] = None
    dtype: Annotated[
        str,
        Flag(
            "what to write the floating-point tensors as; auto keeps the base's "
            "(default: %(default)s)",
            verbs=("plan", "merge", "subtract"),
            choices=tuple(DTYPES),
            other_help={
                "subtract": "what to write the floating-point tensors as (default: %(default)s)"
            },
            older_name="merge-dtype",
        ),
    ] = "auto"
    allow: Annotated[
        str | Sequence[str],
        Flag(
            "unknown fields of an adapter's config that are known not to change the result",
            metavar="FIELD",
        ),
    ] = ()
    compat: Annotated[
        Compat | None,
        Flag(
            "peft: the result of PEFT's own merge where that is not what was trained (tied "
            "embeddings, replicated layers)"
        ),
    ] = None
    expert_layout: Annotated[
        ExpertLayout,
        Flag(
            "how factors of experts stored as one tensor lie on it, where neither shapes nor "
            "versions tell (default: %(default)s)"
        ),
    ] = "auto"

    def to_core(self) -> dict[str, Any]:
        """What crosses to the core.

        Raises:
            ValueError: there is no such dtype.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        implied = "sequential" if self.weights is None else "weighted"
        return {
            **self._asdict(),
            "strategy": implied if self.strategy is None else self.strategy,
            "weights": None if self.weights is None else [float(each) for each in self.weights],
            "dtype": DTYPES[self.dtype],
            "allow": [self.allow] if isinstance(self.allow, str) else list(self.allow),
            "expert_layout": None if self.expert_layout == "auto" else self.expert_layout,
        }


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
    progress: Annotated[Progress, Flag(None, verbs=("merge", "verify", "subtract"))] = False

    def memory(self) -> int | None:
        """The most bytes of the device's memory to use, once the options are found to be sound.

        Raises:
            ValueError: an option is outside its domain.
            DeviceError: the device is not there.
            MissingDependencyError: torch is needed for the device and is not installed.
        """
        from lorafast._io.device_names import check_merge_device, parse_memory
        from lorafast._io.limits import check_threads

        memory = parse_memory(self.device_memory, check_merge_device(self.device))
        check_threads(self.threads)
        return memory

    def to_core(self) -> dict[str, Any]:
        """What crosses to the core. The rest is Python's."""
        return {"threads": self.threads, "overwrite": self.overwrite, "sync": self.sync}


def options_of(verb: Verb) -> Iterator[Option]:
    """The options that a verb takes, in the order of its help."""
    return options_in(MergeOptions, ExecutionOptions, verb=verb)
