"""The plan of a merge, its execution, and its parts, which other processes write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from time import strftime
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafast import _core
from lorafast._errors import OutputError, PlanError, VerificationError
from lorafast._io.hub import is_hub_url, require_directory, with_revision
from lorafast._io.limits import check_threads
from lorafast._io.paths import absolute, expand, output_path
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    BASE_PATTERNS,
    as_list,
    core_source,
    find_source,
    require_readers,
)
from lorafast._io.stores import current, is_url, located, path_of_file_url, using
from lorafast._merge.options import ExecutionOptions
from lorafast._options import pick
from lorafast._results import RecordDict, RecordList, RecordTuple, Result, shown, view

if TYPE_CHECKING:
    from lorafast._core import OutputLock, PlanDescription, Summary
    from lorafast._io.sources import ModuleBase
    from lorafast._merge.options import Combination
    from lorafast._merge.planned import PlannedTensor
    from lorafast._merge.report import MergeReport
    from lorafast._merge.verify import Verification
    from lorafast._types import ExecutorChoice, Progress, Source


#: Noted on an interruption that comes when the model is in its place.
FINISHED = "the output was finished before that"


@shown
class WrittenShard(NamedTuple):
    """A shard that a part of a plan wrote.

    Attributes:
        name: its file name.
        bytes: its size.
        sha256: the digest of its content, in hexadecimal.
        rounding: what rounding took away from it, as sums: of the squares of errors and of changes,
            of the weights that should move, of those that did not, and of all that were looked at.
    """

    name: str
    bytes: int
    sha256: str
    rounding: tuple[float, float, int, int, int] = (0.0, 0.0, 0, 0, 0)


@shown
class PlanPart(NamedTuple):
    """Some shards of a merge, which any process can write that has the same inputs.

    Made by `MergePlan.parts`. It holds names and options, no weights, and can be pickled.

    Attributes:
        base: path of the base.
        adapters: paths of the adapters, in order.
        options: how they are merged.
        shards: positions of the shards in the plan.
        bytes: bytes to write.
        digest: of the whole plan; whoever writes the part plans again, and has to come to the same.
        names: what the shards are called.
    """

    base: str
    adapters: tuple[str, ...]
    options: Combination
    shards: tuple[int, ...]
    bytes: int
    digest: str
    names: tuple[str, ...] = ()

    def write(
        self,
        directory: Source,
        *,
        threads: int | None = None,
        sync: bool = True,
        progress: Progress = False,
    ) -> list[WrittenShard]:
        """Writes the shards into a directory, each under its name once it is whole.

        Args:
            directory: where to; it is made if it is not there, and is best on the output's file
                system.
            threads: worker threads; one for each core if `None`.
            sync: return when the shards have reached the disk.
            progress: as for `lorafast.merge`.

        Returns:
            What `MergePlan.assemble` needs to know of each shard.

        Raises:
            PlanError: base, adapters or lorafast are not those that the merge was planned with.
            LorafastError: as `lorafast.merge`.
        """
        from lorafast._io.progress import callback

        check_threads(threads)
        core = self.plan_again()
        with callback(progress) as tell:
            written = _core.write_shards(
                core, self.shards, expand(directory), threads=threads, sync=sync, progress=tell
            )
        return [WrittenShard(**shard) for shard in written]

    def plan_again(self) -> _core.Plan:
        """The core's plan, made here.

        Raises:
            PlanError: base, adapters or lorafast are not those that the merge was planned with.
            LorafastError: as `lorafast.merge`.
        """
        core = make_plan(self.base, self.adapters, self.options).core
        if _core.plan_digest(core) != self.digest:
            problem = (
                f"{self.base}: the base, an adapter or lorafast is not what the merge was planned "
                "with; plan it again"
            )
            raise PlanError(problem, [problem])
        return core


class MergePlan(Result):
    """What a merge will do, decided before anything is written.

    Made by `lorafast.plan`; `execute` carries it out. The files it was made from must stay as
    they are until then.

    Attributes:
        base: path of the base.
        adapters: paths of the adapters, in order.
        tensors_merged: tensors that adapters change.
        tensors_replaced: tensors that an adapter brings whole, in the base's place or anew.
        tensors_repeated: tensors in whose place another one of the base stands, as in a repeated
            layer.
        tensors_copied: tensors that are carried over byte for byte.
        tensors_cast: tensors that are only converted to the output's dtype.
        total_parameters: elements of all tensors.
        bytes_to_write: bytes of the output's shards.
        warnings: what to know before using the result, such as an adapter that was never trained.
        notes: how adapters were made to fit where it was not plain.
    """

    def __init__(
        self, core: _core.Plan, options: Combination | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.core = core
        #: How the adapters are merged; `None` of a plan that undoes a merge.
        self.options = options
        #: How the stores that URLs name are reached.
        self._stores = current()
        #: Models that are read beside the base, and must not be written over either.
        self.protected: list[Path] = []
        self._description: PlanDescription = core.describe()
        self._description["notes"][:0] = notes
        self.base: str = self._description["base"]
        self.adapters: list[str] = [entry["path"] for entry in self._description["adapters"]]
        self.tensors_merged: int = self._description["tensors_merged"]
        self.tensors_replaced: int = self._description["tensors_replaced"]
        self.tensors_repeated: int = self._description["tensors_repeated"]
        self.tensors_copied: int = self._description["tensors_copied"]
        self.tensors_cast: int = self._description["tensors_cast"]
        self.total_parameters: int = self._description["total_parameters"]
        self.bytes_to_write: int = self._description["bytes_to_write"]
        self.warnings: list[str] = self._description["warnings"]
        self.notes: list[str] = self._description["notes"]

    @cached_property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every tensor of the output, with its action and its updates."""
        from lorafast._merge.planned import planned_tensor

        return RecordTuple(map(planned_tensor, self._description["tensors"]))

    # A dictionary whose keys are known is one for mypy only where nobody may add others.
    def to_dict(self) -> PlanDescription:  # type: ignore[override]
        """The whole plan as plain objects: every tensor with its action and its updates."""
        import json

        copied: PlanDescription = json.loads(json.dumps(self._description))
        return copied

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        import json

        return json.dumps(self._description, indent=2)

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
        private: bool = False,
        pull_request: bool = False,
        executor: ExecutorChoice | None = None,
    ) -> MergeReport:
        """Carries the plan out; arguments, result and exceptions as for `lorafast.merge`."""
        return self.carry_out(output, pick(ExecutionOptions, locals()))

    def carry_out(self, output: Source, execution: ExecutionOptions) -> MergeReport:
        """`execute`, with its options as the one object that they are in."""
        from lorafast._merge.report import write_afterwards

        with using(self._stores):
            if is_hub_url(output):
                if execution.executor is not None:
                    raise ValueError(
                        f"{output}: with an executor the output is a directory that all workers "
                        "share; upload it afterwards"
                    )
                from lorafast._merge.publish import publish

                return publish(self.carried_out, str(output), execution)
            place = self._place(output)
            with self.carried_out(place, execution) as result:
                if execution.report:
                    write_afterwards(result, place)
        return result

    def _place(self, output: Source | _core.StoreLocation) -> str | _core.StoreLocation:
        """The directory, or the place in a store, that an output names."""
        if not isinstance(output, str):
            return output if not isinstance(output, os.PathLike) else expand(output)
        if is_hub_url(output):
            return require_directory(output)
        if is_url(output):
            with using(self._stores):
                return located(output)
        return expand(path_of_file_url(output))

    @contextmanager
    def carried_out(
        self, output: Source | _core.StoreLocation, execution: ExecutionOptions
    ) -> Iterator[MergeReport]:
        """The plan carried out; other merges are kept out of the output until the context ends.

        Within it reports are written, and figures taken of what was written: nobody can have put
        another model in its place.

        Raises:
            VerificationError: what was written is not what was computed; there is no model then.
        """
        from lorafast._io.device_names import AMX
        from lorafast._io.progress import callback

        memory = execution.memory()
        place = self._place(output)
        output = str(place)
        execution.require_local()
        device = execution.device
        options = execution.to_core()
        options["card"] = self._card() if execution.report else None
        # Of an exact merge the report proves what it is; a store would have to be read again.
        options["shard_digests"] = (
            execution.report and "precision" in self._description and isinstance(place, str)
        )
        # A report says what each shard was made from, and the next merge looks there.
        has_recipes = (
            execution.report
            and self.options is not None
            and device in ("cpu", AMX)
            and execution.executor is None
        )
        problem: str | None = None
        with ExitStack() as held:
            notes: list[str] = []
            fallbacks: dict[str, list[str]] = {}
            with callback(execution.progress) as tell, _told_how_to_resume(place):
                prove = _Proof(output, execution) if execution.verify else None
                if execution.executor is not None:
                    from lorafast._merge.workers import write_model

                    summary, lock = write_model(self, output, execution, options["card"], tell)
                elif device in ("cpu", AMX):
                    options["instruction_set"] = "amx" if device == AMX else None
                    if has_recipes:
                        from lorafast._merge.recipes import earlier

                        options["recipes"] = earlier(place) if execution.overwrite else {}
                    summary, lock = self._execute(place, options, tell, prove)
                else:
                    from lorafast._torch.choice import carry_out

                    done = carry_out(
                        self.core,
                        place,
                        options,
                        device=device,
                        memory=memory,
                        progress=tell,
                        prove=prove,
                    )
                    (summary, lock), device = done.finished, done.device
                    notes, fallbacks = done.notes, done.fallbacks
                warnings = held.enter_context(_held(lock))
            result = self._report_of(summary, output, device, notes, fallbacks)
            if prove is not None and execution.executor is not None:
                from lorafast._merge.verify import verify_plan

                # Workers look at files under the names that they have in the end.
                prove.found = verify_plan(self, output, execution)
                problem = None if prove.found.ok else prove.found.problems[0]
            if prove is not None and prove.found is not None:
                checked = prove.found
                result.warnings.extend(checked.warnings)
                result = result._replace(verification=RecordDict(checked.to_dict()))
            yield _with_recipes(result, summary) if has_recipes else result
        result.warnings.extend(warnings)
        if problem is not None:
            raise VerificationError(
                f"{output}: what was written is not what was computed: {problem}; check the disk "
                "and the memory of the machines"
            )

    def _execute(
        self,
        place: str | _core.StoreLocation,
        options: dict[str, Any],
        tell: Callable[[int, int], object] | None,
        prove: _Proof | None,
    ) -> tuple[Summary, OutputLock]:
        """Carries the plan out on the CPU, and proves it before it is a model."""
        if prove is None:
            return self.core.execute(place, options, protected=self.protected, progress=tell)
        running = self.core.begin(place, options, protected=self.protected)
        try:
            running.run(set(), progress=tell)
            prove(running)
            return running.finish()
        except BaseException:
            running.abort()
            raise

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the output's weights, what the inputs are among it.

        Raises:
            LorafastError: an input changed since the plan was made.
        """
        return _core.plan_digest(self.core)

    def parts(self) -> list[PlanPart]:
        """Groups of shards that have nothing to do with each other, to be written apart.

        Each can be pickled, sent to another process that has the same inputs, and written there;
        `assemble` makes the model of what all of them wrote.

        Raises:
            ValueError: the plan is not one of a merge of files.
        """
        return [self._part(group) for group in _core.plan_groups(self.core)]

    def whole(self) -> PlanPart:
        """All shards as one part.

        Raises:
            ValueError: as for `parts`.
        """
        return self._part(range(len(_core.plan_shards(self.core))))

    def _part(self, group: Sequence[int]) -> PlanPart:
        if self.options is None:
            raise ValueError("only the plan of a merge of files has parts")
        shards = _core.plan_shards(self.core)
        return PlanPart(
            base=absolute(self.base),
            adapters=tuple(map(absolute, self.adapters)),
            options=self.options,
            shards=tuple(group),
            bytes=sum(shards[shard][1] for shard in group),
            digest=self.digest,
            names=tuple(shards[shard][0] for shard in group),
        )

    def assemble(
        self,
        directory: Source,
        written: Sequence[WrittenShard],
        output: Source,
        *,
        overwrite: bool = False,
        sync: bool = True,
        progress: Progress = False,
        report: bool = True,
    ) -> MergeReport:
        """Makes a model of the shards that the plan's parts wrote.

        Args:
            directory: where they wrote them; the shards stay there.
            written: what each part's `write` returned, of all parts together.
            output: the directory to make, as for `lorafast.merge`.
            overwrite: likewise.
            sync: likewise.
            progress: likewise.
            report: likewise.

        Returns:
            The report of the merge.

        Raises:
            OutputError: a shard is not what its part wrote, or the output may not be written.
            FileNotFoundError: a shard is not there.
        """
        from lorafast._io.progress import callback
        from lorafast._merge.report import write_afterwards

        output = require_directory(output)
        with ExitStack() as held:
            with callback(progress) as tell:
                summary, lock = _core.assemble_shards(
                    self.core,
                    output_path(directory),
                    [shard._asdict() for shard in written],
                    output,
                    overwrite=overwrite,
                    sync=sync,
                    card=self._card() if report else None,
                    adopt=False,
                    progress=tell,
                )
                warnings = held.enter_context(_held(lock))
            result = self._report_of(summary, output, "cpu", [], {})
            if report:
                write_afterwards(result, output)
        result.warnings.extend(warnings)
        return result

    def _card(self) -> str | None:
        """The output's model card; none where no merge is what makes it."""
        if self.options is None:
            return None
        text: str = view("card", self)(self, self._description)
        return text

    def _report_of(
        self,
        summary: Summary,
        output: str,
        device: str,
        notes: list[str],
        fallbacks: dict[str, list[str]],
    ) -> MergeReport:
        from lorafast._merge.report import MergeReport, groups_of, sources_of

        description = self._description
        return MergeReport(
            base=self.base,
            adapters=list(self.adapters),
            strategy=description["strategy"],
            strategy_options=description.get("strategy_options"),
            seed=description.get("seed"),
            weights=description["weights"],
            output_path=output,
            dtype=description["dtype"],
            device=device,
            total_parameters=self.total_parameters,
            model_size_mb=summary["bytes_written"] / 2**20,
            tensors_merged=self.tensors_merged,
            tensors_replaced=self.tensors_replaced,
            tensors_repeated=self.tensors_repeated,
            tensors_copied=self.tensors_copied,
            tensors_cast=self.tensors_cast,
            bytes_written=summary["bytes_written"],
            merge_time=summary["seconds"],
            threads=summary["threads"],
            instruction_set=summary["instruction_set"],
            versions={"lorafast": _core.__version__},
            adapter_sha256=dict(zip(self.adapters, summary["adapter_sha256"], strict=False)),
            base_header_sha256=summary["base_header_sha256"],
            groups=groups_of(description),
            warnings=[*self.warnings, *summary["warnings"]],
            notes=[*self.notes, *notes],
            fallbacks=RecordDict(fallbacks),
            side_files=RecordList(summary["side_files"]),
            file_origins=RecordDict(summary["file_origins"]),
            sources=sources_of(self._description, summary),
            rounding=summary["rounding"],
            precision=description.get("precision", "default"),
            recomputed=summary["recomputed"],
            shard_sha256=summary["shard_sha256"],
            left_out=RecordList(summary["left_out"]),
            coverage=RecordList(adapter["coverage"] for adapter in description["adapters"]),
            timestamp=strftime("%Y-%m-%d %H:%M:%S"),
            weight_files=RecordList(sorted({tensor["shard"] for tensor in description["tensors"]})),
        )


def _with_recipes(result: MergeReport, summary: Summary) -> MergeReport:
    """The report with what each shard was made from, and how many stayed as they were."""
    if summary["kept"]:
        all_of_them = max(len(summary["recipes"]), len(result.weight_files))
        count = len(summary["kept"])
        result.notes.append(
            f"{count} of {all_of_them} shards would become the same again, and stay as they are"
        )
    recipes = {
        name: {**recipe, "rounding": list(recipe["rounding"])}
        for name, recipe in summary["recipes"].items()
    }
    return result._replace(recipes=RecordDict(recipes))


class _Proof:
    """Holds what an execution wrote against the plan, before it is a model.

    Attributes:
        found: what was found, once it was asked.
    """

    def __init__(self, output: str, execution: ExecutionOptions) -> None:
        self.output, self.execution = output, execution
        self.found: Verification | None = None

    def __call__(self, running: _core.Execution) -> None:
        """Proves it.

        Raises:
            VerificationError: it is not what was computed; it is discarded then.
        """
        from lorafast._io.device_names import AMX
        from lorafast._io.progress import callback
        from lorafast._merge.verify import Verification

        with callback(self.execution.progress, label="verifying") as tell:
            outcome = running.verify(
                threads=self.execution.threads,
                split=self.execution.device == AMX,
                progress=tell,
            )
        self.found = Verification(**outcome)
        if not self.found.ok:
            running.discard()
            raise VerificationError(
                f"{self.output}: what was written is not what was computed: "
                f"{self.found.problems[0]}; nothing is left of it; check the disk and the memory "
                "of this machine, and what lies between it and the store"
            )


@contextmanager
def _told_how_to_resume(place: str | _core.StoreLocation) -> Iterator[None]:
    """Notes on what ends a merge into a store what becomes of its finished part."""
    try:
        yield
    except OutputError:
        raise
    except BaseException as error:
        if not isinstance(place, str):
            error.add_note(
                f"shards that are finished stay in {place}: the same call again completes them, "
                f"and `lorafast clean {place}` removes them"
            )
        raise


@contextmanager
def _held(lock: OutputLock) -> Iterator[list[str]]:
    """Keeps other merges out of a finished output; the list is what goes wrong at the end."""
    warnings: list[str] = []
    try:
        yield warnings
    except KeyboardInterrupt as stop:
        stop.add_note(FINISHED)
        raise
    finally:
        problem = lock.release()
        if problem is not None:
            warnings.append(problem)


def make_plan(
    base: Source | ModuleBase | None,
    adapters: Source | Sequence[Source],
    options: Combination,
    *,
    subtract: bool = False,
    device: str = "cpu",
    needs: Mapping[str, str] | None = None,
) -> MergePlan:
    """`lorafast.plan`, after it was seen that every package is there.

    Args:
        base: the base; `None` for the one that the adapters name.
        adapters: the adapters.
        options: how they are merged.
        subtract: take the adapters out of `base`, a merged model.
        device: where products will be made.
        needs: further packages that the merge will take, and what for.
    """
    core_options = options.to_core()
    core_options["subtract"] = subtract
    adapters = as_list(adapters)
    require_readers(base, *adapters, device=device, needs=needs)
    revision, notes = options.revision, []
    found: Path | _core.StoreLocation | ModuleBase
    if isinstance(base, tuple):
        found = base
    elif base is not None:
        found = find_source(with_revision(base, revision), BASE_PATTERNS)
    paths = [find_source(adapter, ADAPTER_PATTERNS) for adapter in adapters]
    if base is None:
        from lorafast._merge.own_base import find_own_base

        found, note = find_own_base(adapters, paths, revision)
        notes.append(note)
    sources = [core_source(path, options.format) for path in paths]
    try:
        core = _core.plan_merge(found, sources, core_options)
    except PlanError:
        # The core knows the common models; transformers, which is slow to ask, knows its own.
        rules = None if _core.names_fit(found, sources) else _renaming_rules(found)
        if rules is None:
            raise
        core_options["renames"] = rules
        core = _core.plan_merge(found, sources, core_options)
    # The base is found: what plans again is given its path.
    options = options._replace(revision=None)
    return MergePlan(core, None if subtract or isinstance(found, tuple) else options, notes)


def _renaming_rules(base: Path | _core.StoreLocation | ModuleBase) -> str | None:
    from lorafast._io.transformers_renames import config_of, renaming_rules

    if isinstance(base, tuple):
        import json

        return renaming_rules(json.loads(base[1]))
    if not isinstance(base, Path):
        import json

        try:
            return renaming_rules(json.loads(base.read("config.json")))
        except (OSError, ValueError):
            return None
    config = config_of(base)
    return None if config is None else renaming_rules(config)


# What users see, and what a pickle names.
MergePlan.__module__ = PlanPart.__module__ = WrittenShard.__module__ = "lorafast"
