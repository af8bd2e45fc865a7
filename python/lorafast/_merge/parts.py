"""Parts of a plan, which other processes write: they plan again, and refuse another plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorafast import _core
from lorafast._errors import PlanError
from lorafast._io.limits import check_threads
from lorafast._io.paths import expand

if TYPE_CHECKING:
    from lorafast._merge.options import MergeOptions
    from lorafast._types import Progress, Source


class WrittenShard(NamedTuple):
    """A shard that a part of a plan wrote.

    Attributes:
        name: its file name.
        bytes: its size.
        sha256: the digest of its content, in hexadecimal.
    """

    name: str
    bytes: int
    sha256: str


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
    """

    base: str
    adapters: tuple[str, ...]
    options: MergeOptions
    shards: tuple[int, ...]
    bytes: int
    digest: str

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
        from lorafast._merge.plan import make_plan

        check_threads(threads)
        core = make_plan(self.base, self.adapters, self.options).core
        if _core.plan_digest(core) != self.digest:
            problem = (
                f"{self.base}: the base, an adapter or lorafast is not what the merge was planned "
                "with; plan it again"
            )
            raise PlanError(problem, [problem])
        with callback(progress) as tell:
            written = _core.write_shards(
                core, self.shards, expand(directory), threads=threads, sync=sync, progress=tell
            )
        return [WrittenShard(**shard) for shard in written]


# What users see, and what a pickle names.
PlanPart.__module__ = WrittenShard.__module__ = "lorafast"
