"""The report of a merge, and the warnings of what failed when the output was finished."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lorafast._errors import LorafastError
from lorafast._io.paths import expand
from lorafast._io.stores import is_url, located
from lorafast._merge.provenance import identify, unique_names
from lorafast._results import Result, shown, view

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from lorafast import _core
    from lorafast._core import Coverage, PlanDescription, Recomputed, RoundingLoss, Summary
    from lorafast._types import Source

#: What reading a finished output back, or writing a report beside it, can meet.
AFTERWARDS = (LorafastError, OSError, ValueError, MemoryError)


class OutputReport(Result):
    """What the reports that are written beside a model share."""

    __slots__ = ()

    #: Of its files, without their endings.
    _name: ClassVar[str]

    if TYPE_CHECKING:

        @property
        def warnings(self) -> list[str]: ...
        @property
        def coverage(self) -> list[Coverage]: ...

    @property
    def accounts(self) -> list[Coverage]:
        """What `coverage` was called before."""
        from lorafast._deprecation import warn_renamed

        warn_renamed("accounts", "coverage")
        return self.coverage

    def portable(self) -> Self:
        """The same without directories of this machine.

        In the place of each path of an input or of the output stands the id on the hub, or what the
        directory is called.
        """
        from lorafast._merge.provenance import unique_names, without_paths

        names = unique_names(self._paths())
        return type(self)(**{key: without_paths(part, names) for key, part in self._fields_now()})

    def _fields_now(self) -> Iterable[tuple[str, Any]]:
        """The fields' names with their values."""
        raise NotImplementedError

    def _paths(self) -> list[str]:
        """The inputs and the output."""
        raise NotImplementedError

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        import json

        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """A page for a person: result, inputs, scales, warnings."""
        text: str = view("markdown", self)(self)
        return text

    def write(self, directory: Source | _core.StoreLocation) -> None:
        """Writes the report as JSON and as Markdown into a directory.

        What goes with a model names no directories of this machine, see `portable`.

        Raises:
            OSError: they cannot be written.
        """
        files = {
            f"{self._name}.json": self.portable().to_json() + "\n",
            f"{self._name}.md": self.to_markdown(),
        }
        if isinstance(directory, str) and is_url(directory):
            directory = located(directory)
        if not isinstance(directory, str | os.PathLike):
            for name, text in files.items():
                directory.write(name, text.encode())
            return
        from lorafast._io.atomic import write

        folder = Path(expand(directory))
        for name, text in files.items():
            write(folder / name, text)


# A named tuple, as a dataclass would take longer to import and make than all else of a small merge.
class _MergeReportFields(NamedTuple):
    base: str
    adapters: list[str]
    strategy: str
    weights: list[float | dict[str, float]] | None
    output_path: str
    dtype: str
    device: str
    total_parameters: int
    model_size_mb: float
    tensors_merged: int
    tensors_replaced: int
    tensors_repeated: int
    tensors_copied: int
    tensors_cast: int
    bytes_written: int
    merge_time: float
    threads: int
    instruction_set: str
    versions: dict[str, str]
    adapter_sha256: dict[str, str]
    base_header_sha256: list[str]
    groups: list[dict[str, Any]]
    warnings: list[str]
    notes: list[str]
    side_files: list[str]
    left_out: list[str]
    coverage: list[Coverage]
    fallbacks: dict[str, list[str]]
    weight_files: list[str]
    file_origins: dict[str, str]
    sources: list[dict[str, Any]]
    rounding: RoundingLoss | None = None
    verification: dict[str, Any] | None = None
    timestamp: str | None = None
    strategy_options: dict[str, Any] | None = None
    seed: int | None = None
    recipes: dict[str, Any] | None = None
    precision: str = "default"
    recomputed: Recomputed | None = None
    shard_sha256: dict[str, str] | None = None


@shown
class MergeReport(_MergeReportFields, OutputReport):
    """What a merge did, and from what.

    Attributes:
        base: path of the base.
        adapters: paths of the adapters, in the order in which they were added.
        strategy: sequential, weighted, average, or the method that merged element by element.
        weights: the weight of each adapter (a number, or numbers by patterns of module names), or
            `None` under sequential.
        output_path: the directory that was written.
        dtype: auto, or the dtype of the output's floating-point tensors.
        device: what made the products: cpu, a CUDA device, or torch:cpu.
        total_parameters: elements of all tensors of the output.
        model_size_mb: size of the output's shards in MiB (2²⁰ bytes).
        tensors_merged: tensors to which adapters' updates were added.
        tensors_replaced: tensors that an adapter brought whole, in the base's place or anew.
        tensors_repeated: tensors in whose place another one of the base stands, as in a repeated
            layer.
        tensors_copied: tensors carried over byte for byte.
        tensors_cast: tensors only converted to another dtype.
        bytes_written: bytes of the output's shards.
        merge_time: seconds from the first check to the finished directory.
        threads: worker threads.
        instruction_set: the instructions of the kernels; the result does not depend on it, but for
            "amx".
        versions: of lorafast.
        adapter_sha256: of each adapter's weights file, by the adapter's path.
        base_header_sha256: of the header of each of the base's shards, in order.
        groups: for each adapter and scale, how many modules were merged with it.
        warnings: what to know before using the result.
        notes: how adapters were made to fit where it was not plain.
        side_files: files carried over beside the weights.
        left_out: what lies in the base's directory and was not carried over, folders with a
            slash: other weights, hidden files, folders with models of their own, links that lead
            out of the model, and what no model needs.
        coverage: for each adapter `fields`, `tensors` and `files`: the `name` of every config
            field, of every tensor, and of every file of weights in the adapter's directory, its
            `use` (used, not_needed) and the `reason`.
        verification: what `lorafast.verify` found afterwards, where it was asked for.
        fallbacks: on a device, for each reason the tensors that the CPU merged.
        weight_files: the files of weights that were written.
        file_origins: where each of the side files comes from: "base", "adapter 0", or "merge" for
            the card.
        sources: base and adapters: `role`, `name` (the id on the hub, or what the directory is
            called), `revision` on the hub, and `header_sha256` of the base's shards or `sha256` of
            the adapter's weights file.
        rounding: where weights of fewer than 32 bits were merged, what rounding took away: `lost`,
            ‖written - exact‖ / ‖exact - base‖; `unmoved`, the share of the weights that should move
            and are the base's; `values`, how many were looked at: all that were quantised again,
            and a sample of rows of those of 16 bits, on every device. A fifth and more is a
            warning.
        timestamp: when it was finished, in local time.
        strategy_options: what the strategy was given, if anything.
        seed: what the random masks of the strategy depend on, where it has any.
        recipes: of each shard a digest of all that decided its bytes (`recipe`), what its file was
            when it was finished, and what rounding took away in it; by this a merge with
            `overwrite` knows which shards would become the same again. Of merges on the CPU with a
            report.
        precision: "exact" where every merged weight is the real number, rounded once.
        recomputed: of an exact merge, how many elements this run had to compute in more digits:
            `near_ties`, and of these `in_integers`, which no floating point decides.
        shard_sha256: of an exact merge into a directory, the SHA-256 of each shard.
    """

    __slots__ = ()
    _name = "merge_report"

    def _fields_now(self) -> Iterable[tuple[str, Any]]:
        return self._asdict().items()

    def _paths(self) -> list[str]:
        return [self.base, *self.adapters, self.output_path]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain objects, some of them under the names of NeuroTrain's report too."""
        from copy import deepcopy

        plain = {name: deepcopy(_plain(value)) for name, value in self._asdict().items()}
        others = {
            "base_model": self.base,
            "merge_strategy": self.strategy,
            "merge_dtype": self.dtype,
        }
        return plain | others


def _plain(value: Any) -> Any:
    """A container of which a part is shown, as what it is apart from that."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else value


def write_afterwards(report: OutputReport, output: str | _core.StoreLocation) -> None:
    """Writes the reports of an output that is finished; what fails is a warning of the report."""
    try:
        report.write(output)
    except AFTERWARDS as error:
        report.warnings.append(
            f"{output}: is finished, but its reports could not be written: {_in_words(error)}"
        )


def sources_of(description: PlanDescription, summary: Summary) -> list[dict[str, Any]]:
    """What was merged, by what it is called anywhere, with its revision and its digest."""
    paths = [description["base"], *(adapter["path"] for adapter in description["adapters"])]
    names = unique_names(paths)
    digests: list[str | list[str]] = [summary["base_header_sha256"], *summary["adapter_sha256"]]
    keys = ["header_sha256", *["sha256"] * len(description["adapters"])]
    roles = ["base", *(f"adapter {place}" for place in range(len(description["adapters"])))]
    return [
        {"role": role, "name": names[path], "revision": identify(path).revision, key: digest}
        for role, path, key, digest in zip(roles, paths, keys, digests, strict=True)
    ]


def groups_of(description: PlanDescription) -> list[dict[str, Any]]:
    """Counts the updates by adapter, rank, scale and the adapter's weight."""
    counts: dict[tuple[int, int, float, float], int] = {}
    weights = description["weights"]
    for tensor in description["tensors"]:
        for update in tensor["updates"]:
            # Some strategies find a coefficient for each tensor, and some weights are by modules.
            given = None if weights is None else weights[update["adapter"]]
            weight = given if isinstance(given, float) else update["weight"]
            key = (update["adapter"], update["rank"], update["scale"], weight)
            counts[key] = counts.get(key, 0) + 1
    names = ("adapter", "rank", "scale", "weight")
    return [
        {**dict(zip(names, key, strict=True)), "modules": counts[key]} for key in sorted(counts)
    ]


def unmeasured(output: str, error: BaseException) -> str:
    """The warning that what a finished output is worth could not be measured."""
    return f"{output}: is finished, but its distance could not be measured: {_in_words(error)}"


def _in_words(error: BaseException) -> str:
    from lorafast._io.strangers import reason_of

    place = getattr(error, "filename", None)
    return reason_of(error) + (f": {os.fsdecode(place)}" if place is not None else "")


# What users see, and what a pickle names.
MergeReport.__module__ = "lorafast"
