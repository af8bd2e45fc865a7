"""Merging adapters into a checkpoint: the plan, its execution, and the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lorafast import _core
from lorafast._errors import LorafastError, PlanError, VerificationError
from lorafast._io.limits import check_threads
from lorafast._io.paths import expand
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    BASE_PATTERNS,
    has_only_pickle,
    locate,
    rewrite_pickle,
)

if TYPE_CHECKING:
    from lorafast._io.scratch import Scratch

Source = str | os.PathLike[str]
Strategy = Literal["sequential", "weighted", "average"]
Compat = Literal["peft"]
ExpertLayout = Literal["auto", "straight", "transposed"]
Progress = bool | Callable[[int, int], object]

REPORT_JSON = "merge_report.json"
REPORT_MARKDOWN = "merge_report.md"
#: What reading a finished output back, or writing a report beside it, can meet.
AFTERWARDS = (LorafastError, OSError, ValueError, MemoryError)

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


class HasReport(Protocol):
    """What is written beside a finished output, and the warnings that a person is told."""

    @property
    def warnings(self) -> list[str]: ...

    def write(self, directory: Source) -> None: ...


class MergePlan:
    """What a merge will do, decided before anything is written.

    Made by `lorafast.plan`; `execute` carries it out. The files it was made from must stay as
    they are until then.

    Attributes:
        base: path of the base.
        adapters: paths of the adapters, in order.
        tensors_merged: tensors that adapters change.
        tensors_copied: tensors that are carried over byte for byte.
        tensors_cast: tensors that are only converted to the output's dtype.
        total_parameters: elements of all tensors.
        bytes_to_write: bytes of the output's shards.
        warnings: what to know before using the result, such as an adapter that was never trained.
        notes: how adapters were made to fit where it was not plain.
    """

    def __init__(self, core: _core.Plan, pickles: Scratch | None) -> None:
        self.core = core
        #: Models that are read beside the base, and must not be written over either.
        self.protected: list[Path] = []
        if pickles is not None:
            import weakref

            # Rewritten pickles are needed for as long as the plan is.
            weakref.finalize(self, pickles.remove)
        self._description: dict[str, Any] = core.describe()
        self.base: str = self._description["base"]
        self.adapters: list[str] = [entry["path"] for entry in self._description["adapters"]]
        self.tensors_merged: int = self._description["tensors_merged"]
        self.tensors_copied: int = self._description["tensors_copied"]
        self.tensors_cast: int = self._description["tensors_cast"]
        self.total_parameters: int = self._description["total_parameters"]
        self.bytes_to_write: int = self._description["bytes_to_write"]
        self.warnings: list[str] = self._description["warnings"]
        self.notes: list[str] = self._description["notes"]

    def to_dict(self) -> dict[str, Any]:
        """The whole plan as plain objects: every tensor with its action and its updates."""
        import json

        copied: dict[str, Any] = json.loads(json.dumps(self._description))
        return copied

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        import json

        return json.dumps(self._description, indent=2)

    def __repr__(self) -> str:
        adapters = len(self.adapters)
        return (
            f"<MergePlan: {adapters} adapter{'s' * (adapters != 1)} into {self.base}; "
            f"{self.tensors_merged} tensors change, {self.tensors_copied} are copied, "
            f"{self.tensors_cast} cast; {self.bytes_to_write / 1e9:.2f} GB to write>"
        )

    def execute(
        self,
        output: Source,
        *,
        device: str = "cpu",
        threads: int | None = None,
        overwrite: bool = False,
        progress: Progress = False,
        device_memory: int | str | None = None,
        verify: bool = False,
        report: bool = True,
        sync: bool = True,
    ) -> MergeReport:
        """Carries the plan out; arguments, result and exceptions as for `lorafast.merge`."""
        from lorafast._io.device_names import AMX, check_merge_device, parse_memory

        check_threads(threads)
        output = expand(output)
        memory = parse_memory(device_memory, check_merge_device(device))
        options: dict[str, Any] = {"threads": threads, "overwrite": overwrite, "sync": sync}
        with _progress_callback(progress) as callback:
            if device in ("cpu", AMX):
                instruction_set = "amx" if device == AMX else None
                summary = self.core.execute(
                    output,
                    **options,
                    instruction_set=instruction_set,
                    protected=self.protected,
                    progress=callback,
                )
                notes, fallbacks = [], {}
            else:
                from lorafast._torch.choice import carry_out

                done = carry_out(
                    self.core, output, device=device, memory=memory, **options, progress=callback
                )
                summary, device = done.summary, done.device
                notes, fallbacks = done.notes, done.fallbacks
        description = self._description
        result = MergeReport(
            base=self.base,
            adapters=list(self.adapters),
            strategy=description["strategy"],
            weights=description["weights"],
            output_path=output,
            dtype=description["dtype"],
            device=device,
            total_parameters=self.total_parameters,
            model_size_mb=summary["bytes_written"] / 2**20,
            tensors_merged=self.tensors_merged,
            tensors_copied=self.tensors_copied,
            tensors_cast=self.tensors_cast,
            bytes_written=summary["bytes_written"],
            merge_time=summary["seconds"],
            threads=summary["threads"],
            instruction_set=summary["instruction_set"],
            versions={"lorafast": _core.__version__},
            adapter_sha256=dict(zip(self.adapters, summary["adapter_sha256"], strict=False)),
            base_header_sha256=summary["base_header_sha256"],
            groups=_groups(description),
            warnings=[*self.warnings, *summary["warnings"]],
            notes=[*self.notes, *notes],
            fallbacks=fallbacks,
            side_files=summary["side_files"],
            left_out=summary["left_out"],
            accounts=[adapter["account"] for adapter in description["adapters"]],
            weight_files=sorted({tensor["shard"] for tensor in description["tensors"]}),
        )
        problem = None
        if verify:
            result, problem = self._verified(result, device, threads, progress)
        if report:
            write_afterwards(result, output)
        if problem is not None:
            raise VerificationError(
                f"{output}: what was written is not what was computed: "
                f"{problem}; check the disk and the memory of this machine"
            )
        return result

    def _verified(
        self, result: MergeReport, device: str, threads: int | None, progress: Progress
    ) -> tuple[MergeReport, str | None]:
        """The report of a finished merge with its verification, and the first problem, if any."""
        from lorafast._merge.verify import verify_plan

        try:
            checked = verify_plan(
                self,
                result.output_path,
                device=device,
                full=False,
                threads=threads,
                progress=progress,
            )
        except VerificationError:
            raise
        except AFTERWARDS as error:
            # The model is written; whether it is right is not known.
            result.warnings.append(unverified(result.output_path, error))
            return result, None
        result.warnings.extend(checked.warnings)
        result = replace(result, verification=checked.to_dict())
        return result, None if checked.ok else checked.problems[0]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, and from what.

    Attributes:
        base: path of the base.
        adapters: paths of the adapters, in the order in which they were added.
        strategy: sequential, weighted or average.
        weights: the weight of each adapter, or `None` under sequential.
        output_path: the directory that was written.
        dtype: auto, or the dtype of the output's floating-point tensors.
        device: what made the products: cpu, a CUDA device, or torch:cpu.
        total_parameters: elements of all tensors of the output.
        model_size_mb: size of the output's shards in MiB (2²⁰ bytes).
        tensors_merged: tensors that adapters changed.
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
        accounts: for each adapter `fields` and `tensors`: the `name` of every config field and of
            every tensor, its `verdict` (used, not_needed) and the `reason`.
        verification: what `lorafast.verify` found afterwards, where it was asked for.
        fallbacks: on a device, for each reason the tensors that the CPU merged.
        weight_files: the files of weights that were written.
    """

    base: str
    adapters: list[str]
    strategy: str
    weights: list[float] | None
    output_path: str
    dtype: str
    device: str
    total_parameters: int
    model_size_mb: float
    tensors_merged: int
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
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    side_files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    accounts: list[dict[str, Any]] = field(default_factory=list)
    verification: dict[str, Any] | None = None
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    weight_files: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain objects."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        import json

        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """A page for a person: result, inputs, scales, warnings."""
        from lorafast._report.merge import page

        return page(self)

    def write(self, directory: Source) -> None:
        """Writes `merge_report.json` and `merge_report.md` into a directory.

        Raises:
            OSError: they cannot be written.
        """
        from lorafast._io.atomic import write

        folder = Path(expand(directory))
        write(folder / REPORT_JSON, self.to_json() + "\n")
        write(folder / REPORT_MARKDOWN, self.to_markdown())


def merge(
    base: Source,
    adapters: Source | Sequence[Source],
    output: Source,
    *,
    strategy: Strategy = "sequential",
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = False,
    device_memory: int | str | None = None,
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    expert_layout: ExpertLayout = "auto",
    verify: bool = False,
    report: bool = True,
    sync: bool = True,
) -> MergeReport:
    """Merges one or many LoRA adapters into a checkpoint and writes the result.

    For every weight W that an adapter updates, the output holds W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ, computed in
    float32 (float64 for float64 weights) and rounded once to the output's dtype, where s is α/r
    (Hu et al. 2021, arXiv:2106.09685, §4.1) or α/√r for rsLoRA (Kalajdzievski 2023,
    arXiv:2312.03732). All other tensors and files are carried over. The output becomes a model
    only at the end; whatever fails leaves it as it was.

    Args:
        base: a directory with `model.safetensors` or with shards and their index, a single
            `.safetensors` file, or a hub id.
        adapters: one or several adapters in PEFT's format: directories or hub ids.
        output: the directory to write. Absent or empty, unless `overwrite`.
        strategy: "sequential" adds every adapter at its full scale, "weighted" multiplies each by
            its weight, "average" by 1/N.
        weights: for "weighted", one finite number an adapter, negative ones too; all 1 if missing.
        dtype: "auto" keeps each tensor's; "float16", "bfloat16", "float32" (or "fp16", "bf16",
            "fp32") convert every floating-point tensor of 16 bits and more, and write quantised
            weights out, without their scales and without the config's entry on quantisation;
            under "auto" what changes of them is quantised again with the same scheme.
        device: where products are made. "cpu": by the core. "cpu:amx": by the core, for 16-bit
            weights in tiles of bf16 where the processor has AMX; float32 factors are split in two
            for it, and most products are off by up to 2⁻¹⁵ of their size before the one rounding,
            so some weights differ in the last place. Never timed: no such processor was at hand.
            "cuda" or "cuda:N": by torch on that
            device; results are within a unit in the last place of the CPU's, not the same bytes.
            "auto": on CUDA if a device is there and sending the weights costs less time than the
            products save, else on the CPU; the report's notes say which and why. "torch:cpu": by
            torch on the CPU, to compare backends. Quantised weights are always merged on the CPU.
        device_memory: the most of the device's memory to use: bytes, or a text such as "2GiB";
            most of what is free if missing. cuBLAS's workspace is part of it (torch's default is
            32 MiB on Hopper and newer and 8 MiB before; see CUBLAS_WORKSPACE_CONFIG), CUDA's own
            context is not. What does not fit is merged on the CPU.
        threads: worker threads; one per core if missing. The result does not depend on it.
        overwrite: replace a model in `output`: what its manifest or index lists, and files that
            only models have. Whatever else lies there stays, weights with a warning; an adapter
            there is an error. The older model is deleted when the new one is in its place, and is
            back in its place where that fails.
        progress: `True` draws a bar on a terminal; a callable is called with the bytes done and
            the bytes in all.
        allow: a field, or fields, of an adapter's config that are unknown and known not to change
            the result.
        compat: "peft" gives what PEFT's `merge_and_unload` gives where that is not what was
            trained: an update of one of two tied layers changes both, replicated layers gather
            every replica's updates, and several DoRA adapters are merged one into the other. The
            default is what the adapters were trained to be.
        expert_layout: how factors of experts that are stored as one tensor lie on it, where
            neither shapes nor PEFT's version tell: "straight" (as B·A) or "transposed".
        verify: read the result back and prove it, as `lorafast.verify` does.
        report: write `merge_report.json` and `merge_report.md` beside the model.
        sync: return when the output has reached the disk. `False` leaves the time to the system,
            as `cp` does; a loss of power soon after can then take the model with it.

    Returns:
        What was done, with the digests of what it was done from.

    Raises:
        FileNotFoundError: base or adapter is not there.
        ValueError: an argument is outside its domain.
        CheckpointError: the base is broken.
        AdapterError: an adapter is broken, or (UnsupportedAdapterError) cannot be merged.
        PlanError: base and adapters do not fit together.
        OutputError: the output may not or cannot be written.
        NumericError: a finite weight would become NaN or infinite.
        DeviceError: the device (or AMX) is not there, or this torch cannot use it.
        MissingDependencyError: torch is needed for the device and is not installed.
        VerificationError: with `verify`, the output reads back as something else.
    """
    from lorafast._io.device_names import check_merge_device, parse_memory

    parse_memory(device_memory, check_merge_device(device))
    check_threads(threads)
    prepared = plan(
        base,
        adapters,
        strategy=strategy,
        weights=weights,
        dtype=dtype,
        allow=allow,
        compat=compat,
        expert_layout=expert_layout,
    )
    return prepared.execute(
        output,
        device=device,
        device_memory=device_memory,
        threads=threads,
        overwrite=overwrite,
        sync=sync,
        progress=progress,
        verify=verify,
        report=report,
    )


def plan(
    base: Source,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy = "sequential",
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    allow: str | Sequence[str] = (),
    compat: Compat | None = None,
    expert_layout: ExpertLayout = "auto",
) -> MergePlan:
    """Decides what a merge will do, and raises whatever can be known before writing.

    Arguments and exceptions are those of `lorafast.merge`.
    """
    return _plan(
        base,
        adapters,
        strategy=strategy,
        weights=weights,
        dtype=dtype,
        allow=allow,
        compat=compat,
        subtract=False,
        expert_layout=expert_layout,
    )


def _plan(
    base: Source,
    adapters: Source | Sequence[Source],
    *,
    strategy: Strategy,
    weights: Sequence[float] | None,
    dtype: str,
    allow: str | Sequence[str],
    compat: Compat | None,
    subtract: bool,
    expert_layout: ExpertLayout = "auto",
) -> MergePlan:
    """`plan`; with `subtract`, `base` is a merged model, out of which the adapters are taken."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    base_path = locate(base, BASE_PATTERNS)
    paths = [locate(adapter, ADAPTER_PATTERNS) for adapter in adapters]
    pickles: Scratch | None = None
    if any(has_only_pickle(path) for path in paths):
        from lorafast._io.scratch import Scratch

        pickles = Scratch()
    try:
        sources: list[tuple[Path, Path | None]] = []
        for position, path in enumerate(paths):
            rewritten = None
            if pickles is not None and has_only_pickle(path):
                rewritten = rewrite_pickle(path, pickles.path / str(position))
            sources.append((path, rewritten))
        make = partial(
            _core.plan_merge,
            base_path,
            sources,
            strategy=strategy,
            weights=None if weights is None else [float(weight) for weight in weights],
            dtype=DTYPES[dtype],
            allow=[allow] if isinstance(allow, str) else list(allow),
            compat=compat,
            subtract=subtract,
            expert_layout=None if expert_layout == "auto" else expert_layout,
        )
        try:
            core = make()
        except PlanError:
            from lorafast._io.transformers_renames import renaming_rules

            # The core knows the common models; transformers, which is slow to ask, knows its own.
            rules = None if _core.names_fit(base_path, sources) else renaming_rules(base_path)
            if rules is None:
                raise
            core = make(renames=rules)
    except BaseException:
        if pickles is not None:
            pickles.remove()
        raise
    return MergePlan(core, pickles)


def write_afterwards(report: HasReport, output: str) -> None:
    """Writes the reports of an output that is finished; what fails is a warning of the report."""
    try:
        report.write(output)
    except AFTERWARDS as error:
        report.warnings.append(
            f"{output}: is finished, but its reports could not be written: {_in_words(error)}"
        )


def unverified(output: str, error: BaseException) -> str:
    """The warning that a finished output could not be looked at again."""
    return f"{output}: is finished, but could not be verified: {_in_words(error)}"


def unmeasured(output: str, error: BaseException) -> str:
    """The warning that what a finished output is worth could not be measured."""
    return f"{output}: is finished, but its distance could not be measured: {_in_words(error)}"


def _in_words(error: BaseException) -> str:
    from lorafast._io.strangers import reason_of

    place = getattr(error, "filename", None)
    return reason_of(error) + (f": {os.fsdecode(place)}" if place is not None else "")


def _progress_callback(progress: Progress) -> Any:
    from lorafast._io.progress import callback

    return callback(progress)


def _groups(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts the updates by adapter, rank, scale and weight."""
    counts: dict[tuple[int, int, float, float], int] = {}
    for tensor in description["tensors"]:
        for update in tensor["updates"]:
            key = (update["adapter"], update["rank"], update["scale"], update["weight"])
            counts[key] = counts.get(key, 0) + 1
    names = ("adapter", "rank", "scale", "weight")
    return [
        {**dict(zip(names, key, strict=True)), "modules": counts[key]} for key in sorted(counts)
    ]
