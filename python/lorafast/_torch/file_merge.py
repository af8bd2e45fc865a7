"""The executor that merges files on a device.

Readers fill pinned buffers with rows of the base, which go up on one stream, through the program of
their tensor on another, and down on a third into pinned buffers that writers put into the output;
several tiles are on their way at a time. Meanwhile the core carries out, on the CPU's threads, all
that is no product: copies, casts, and what stays with it, tensor by tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafast._torch.device import (
    describe,
    exact_products,
    host_buffer,
    ran_out,
    stream,
    torch_dtype,
)
from lorafast._torch.exact import ExactProgram
from lorafast._torch.memory import building_bytes, workspace_bytes
from lorafast._torch.program import Program, rounds_once
from lorafast._torch.rest import Rest
from lorafast._torch.tiles import EXACT_BYTES, Place, Rows, Slot, Tile, Work, tiles_of

if TYPE_CHECKING:
    import os

    import torch

    from lorafast import _core

    Progress = Callable[[int, int], object]

#: Bytes of a tile: at a link's 20 GB/s and more a tile is on its way for under 2 ms; on the CPU
#: what a tile needs stays in its caches.
TILE_BYTES = {"cuda": 32 << 20, "cpu": 1 << 20}
#: Tiles on their way at a time.
TILES = 6
#: Of the device's free memory, where no bound is given.
SHARE_OF_MEMORY = 0.8
#: How often the main thread looks at the progress of the CPU's part, in seconds.
STEP = 0.05


@dataclass
class Outcome:
    """What a file merge on a device did.

    Attributes:
        finished: the core's summary, as plain objects, and the lock on the output.
        device: the device in words.
        fallbacks: for each reason the tensors that the CPU merged.
        tile_bytes: the largest tile of W₀ in the end, in bytes.
    """

    finished: tuple[_core.Summary, _core.OutputLock]
    device: str
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    tile_bytes: int = 0


def execute(
    plan: _core.Plan,
    output: str | os.PathLike[str] | _core.StoreLocation,
    device: torch.device,
    options: Mapping[str, Any],
    *,
    memory: int | None = None,
    progress: Progress | None = None,
    prove: Callable[[_core.Execution], None] | None = None,
) -> Outcome:
    """Carries a plan out on a device.

    Args:
        plan: the core's plan.
        output: the directory to write.
        device: where products are made.
        options: the core's, of the execution; the threads are those of the CPU's part.
        memory: the most bytes of the device to use; most of what is free if missing.
        progress: called with the bytes done and the bytes in all.
        prove: holds what was written against the plan, before it is a model.

    Raises:
        LorafastError: what the CPU's executor raises; the output is then as it was.
    """
    execution = plan.begin(output, options)
    threads = options.get("threads")
    try:
        merge = _Merge(plan, execution, device, memory=memory, threads=threads, progress=progress)
        with exact_products(device):
            merge.run()
        if prove is not None:
            prove(execution)
        words = describe(device)
        return Outcome(execution.finish(), words, merge.fallbacks, merge.tile_bytes)
    except BaseException:
        execution.abort()
        raise


def _reason_for_cpu(tensor: _core.ChangedTensor) -> str | None:
    """Why a tensor is merged on the CPU whatever the device, if it is."""
    if tensor["exact"] and "F64" in (tensor["dtype"], tensor["output_dtype"]):
        return "exact sums of float64 are computed in more digits than a device has, on the CPU"
    if tensor["exact"] and not tensor["only_adds"]:
        return "exact sums with parameters that were trained whole are computed on the CPU"
    if tensor["quantised"]:
        return "quantised weights are decoded and encoded on the CPU"
    if tensor["staged_whole"]:
        return "what is made of the whole of what other adapters leave is computed on the CPU"
    return None


def _place(tensor: _core.ChangedTensor) -> Place:
    return tensor["place"]


class _Merge:
    def __init__(
        self,
        plan: _core.Plan,
        execution: _core.Execution,
        device: torch.device,
        *,
        memory: int | None,
        threads: int | None,
        progress: Progress | None,
    ) -> None:
        import torch

        self.plan, self.execution, self.device = plan, execution, device
        self.progress, self.total = progress, execution.total
        self.on_cuda = device.type == "cuda"
        if memory is None:
            free = torch.cuda.mem_get_info(device)[0] if self.on_cuda else 2 << 30
            memory = int(free * SHARE_OF_MEMORY)
        #: For programs and tiles.
        self.memory = max(0, memory - workspace_bytes(device))
        self.fallbacks: dict[str, list[str]] = {}
        self.tile_bytes = 0
        self.limit = TILE_BYTES[device.type]
        self.tensors = []
        for tensor in plan.changed_tensors():
            if not tensor["updates"]:
                continue
            reason = _reason_for_cpu(tensor)
            if reason is None:
                self.tensors.append(tensor)
            else:
                self.fallbacks.setdefault(reason, []).append(tensor["name"])
        self.again: set[Place] = set()
        self.rest = Rest(execution, {_place(tensor) for tensor in self.tensors})
        self.written = 0
        workers = 4 if threads is None else max(1, min(4, threads))
        self.readers = ThreadPoolExecutor(workers, "lorafast-read")
        self.writers = ThreadPoolExecutor(workers, "lorafast-write")
        self.writes: deque[Future[int]] = deque()
        self.free: list[Slot] = []
        self.slots = 0
        if self.on_cuda:
            self.up, self.down, self.aside = (stream(device) for _ in range(3))

    def run(self) -> None:
        self._prove_rounding()
        rest = self.rest
        rest.start()
        try:
            for tile, slot in self._read(self._all_tiles()):
                self._compute(tile, slot)
                # The last one's program would stay while the next one's is built.
                del tile, slot
            self._drain(0)
            while rest.is_alive():
                rest.join(STEP)
                self._report()
            self._check_rest()
        finally:
            rest.stop()
            self.readers.shutdown(wait=True, cancel_futures=True)
            self.writers.shutdown(wait=True, cancel_futures=True)
            rest.join()
        if self.again:
            self.execution.run(self.again, only=True)
        if self.progress is not None:
            self.progress(self.total, self.total)

    def _prove_rounding(self) -> None:
        """Tries the products of 16 bits while nothing else is on the device.

        Later it would be on the stream of programs, where cuBLAS would take a second workspace.
        """
        if not self.on_cuda or not self.memory:
            return
        kinds = {tensor["dtype"] for tensor in self.tensors} & {"F16", "BF16"}
        for kind in sorted(kinds):
            try:
                rounds_once(self.device, torch_dtype(kind))
            except RuntimeError as error:
                if not ran_out(error):
                    raise

    def _check_rest(self) -> None:
        if self.rest.error is not None:
            raise self.rest.error

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(min(self.rest.done + self.written, self.total), self.total)

    def _with_updates(self) -> Iterator[tuple[_core.ChangedTensor, list[_core.Operands]]]:
        """Every tensor with its updates, those of the next one being read meanwhile."""
        following: Future[list[_core.Operands]] | None = None
        for position, tensor in enumerate(self.tensors):
            current = following or self.readers.submit(self._updates, tensor)
            following = None
            if position + 1 < len(self.tensors):
                following = self.readers.submit(self._updates, self.tensors[position + 1])
            yield tensor, current.result()

    def _updates(self, tensor: _core.ChangedTensor) -> list[_core.Operands]:
        return self.plan.operands(_place(tensor))

    def _all_tiles(self) -> Iterator[Tile | None]:
        """The tiles of all tensors, one after the other, so that reading never pauses between.

        None stands where the tiles before are to be on their way first.
        """
        import torch

        for tensor, updates in self._with_updates():
            dtype, output = torch_dtype(tensor["dtype"]), torch_dtype(tensor["output_dtype"])
            wide = torch.float64 if tensor["exact"] else dtype
            size = building_bytes(updates, wide, output)
            if size > self.memory:
                self._leave(tensor)
                continue
            # Every tile that is read, computed or written keeps its tensor's program; one that
            # takes more than its share of half the memory is alone on the device.
            large = size > self.memory // (2 * (TILES + 1))
            if large:
                yield None
                self._drain(0)
            work = self._prepare(tensor, updates)
            if work is not None:
                yield from self._tiles(work)
            del work
            if large:
                yield None
                self._drain(0)

    def _prepare(
        self, tensor: _core.ChangedTensor, updates: Sequence[_core.Operands]
    ) -> Work | None:
        """A tensor with its program on the device; None if it is left to the CPU."""
        dtype, output = torch_dtype(tensor["dtype"]), torch_dtype(tensor["output_dtype"])
        kind = ExactProgram if tensor["exact"] else Program
        program = self._program(kind, updates, dtype, output)
        if program is None:
            self._release_memory()
            self._leave(tensor)
            return None
        work = Work(tensor, _place(tensor), tensor["columns"], dtype, output, program)
        work.rows = self._tile_rows(work)
        if work.rows < 1:
            self._leave(tensor)
            return None
        scanned = True
        try:
            if program.needs_scan:
                program.scan(lambda: self._scanned(work))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            scanned = False
        if scanned:
            return work
        # Only now, when nothing of the scan is held by the exception any more.
        self._leave(tensor)
        self._release_memory()
        return None

    def _program(
        self,
        kind: type[Program],
        updates: Sequence[_core.Operands],
        dtype: torch.dtype,
        output: torch.dtype,
    ) -> Program | None:
        """The program of some updates; None if the device has no room for it."""
        import torch

        try:
            if not self.on_cuda:
                return kind(updates, dtype=dtype, output=output, device=self.device)
            # On a stream of its own: looking at factors must not wait for tiles on their way.
            with torch.cuda.stream(self.aside):
                program = kind(updates, dtype=dtype, output=output, device=self.device)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.aside)
            for tensor in program.tensors():
                tensor.record_stream(current)
            return program
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return None

    def _leave(self, tensor: _core.ChangedTensor) -> None:
        """Leaves a tensor to the CPU for want of memory."""
        reason = "their factors and one row of work do not fit the device's memory"
        self.fallbacks.setdefault(reason, []).append(tensor["name"])
        self.again.add(_place(tensor))

    def _tile_rows(self, work: Work) -> int:
        """Rows of a tile; 0 if there is no room for one."""
        # Half is for programs, of which there are several, or one that takes more.
        left = min(self.memory // 2, self.memory - work.program.bytes)
        if work.is_measured:
            left -= TILES * work.exact_bytes
        # Each tile on its way may be on the device, and one of them is worked on.
        of_row = TILES * (work.read_bytes + work.written_bytes)
        of_row += work.columns * work.program.work_size
        most = min(left // of_row, max(1, self.limit // work.read_bytes))
        return int(max(0, min(most, work.tensor["rows"])))

    def _tiles(self, work: Work) -> Iterator[Tile]:
        # Memory may run out on the way.
        return tiles_of(work, lambda: min(work.rows, max(1, self.limit // work.read_bytes)))

    def _slot(self, source: int, target: int, exact: int) -> Slot:
        """Free buffers of at least so many bytes; waits for a tile to be written if need be."""
        import torch

        while not self.free and self.slots >= TILES and self.writes:
            self._drain(len(self.writes) - 1)
        if self.free:
            slot = self.free.pop()
        else:
            self.slots += 1
            empty = self._buffer(0)
            finite = host_buffer(1, torch.bool, self.device)
            slot = Slot(empty, empty, finite, empty)
        if slot.source.numel() < source:
            slot.source = self._buffer(source)
        if slot.target.numel() < target:
            slot.target = self._buffer(target)
        if slot.exact.numel() < exact:
            slot.exact = self._buffer(exact)
        return slot

    def _buffer(self, size: int) -> torch.Tensor:
        import torch

        return host_buffer(size, torch.uint8, self.device)

    def _read(self, tiles: Iterable[Tile | None]) -> Iterator[tuple[Tile, Slot]]:
        """Tiles with their rows in a slot, read some tiles ahead."""
        waiting: deque[tuple[Tile, Slot, Future[None]]] = deque()
        for tile in tiles:
            self._check_rest()
            while waiting and (tile is None or len(waiting) >= TILES // 2):
                yield self._arrived(waiting)
            if tile is None:
                continue
            size = tile.rows * tile.work.read_bytes
            exact = tile.work.exact_bytes if tile.measured else 0
            slot = self._slot(size, tile.rows * tile.work.written_bytes, exact)
            buffer = slot.source[:size].numpy()
            read = self.readers.submit(self.execution.read_rows, tile.place, tile.first, buffer)
            waiting.append((tile, slot, read))
        while waiting:
            yield self._arrived(waiting)

    @staticmethod
    def _arrived(waiting: deque[tuple[Tile, Slot, Future[None]]]) -> tuple[Tile, Slot]:
        tile, slot, read = waiting.popleft()
        read.result()
        return tile, slot

    def _upload(
        self, tile: Tile, slot: Slot, within: tuple[int, int] | None = None
    ) -> torch.Tensor:
        import torch

        start, end = within or (0, tile.rows)
        size = tile.work.read_bytes
        rows = slot.source[start * size : end * size].view(tile.work.dtype)
        rows = rows.reshape(end - start, tile.work.columns)
        if not self.on_cuda:
            return rows
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.up):
            uploaded = rows.to(self.device, non_blocking=True)
        current.wait_stream(self.up)
        uploaded.record_stream(current)
        return uploaded

    def _scanned(self, work: Work) -> Iterator[tuple[int, torch.Tensor]]:
        import torch

        for tile, slot in self._read(self._tiles(work)):
            yield tile.first, self._upload(tile, slot)
            if self.on_cuda:
                torch.cuda.current_stream(self.device).synchronize()
            self.free.append(slot)

    def _compute(self, tile: Tile, slot: Slot) -> None:
        """Sends a tile on its way to the output."""
        work = tile.work
        target = slot.target[: tile.rows * work.written_bytes].view(work.output)
        target = target.reshape(tile.rows, work.columns)
        slot.finite.fill_(True)
        waiting = [] if work.failed else [(0, tile.rows)]
        finite: torch.Tensor | None = None
        limit = self.limit
        while waiting:
            start, end = waiting.pop()
            made = self._tried(tile, slot, (start, end))
            if made is None:
                self._release_memory()
                if end - start == 1:
                    work.failed = True
                    # What has no room for one row says nothing of the other tensors.
                    self.limit = limit
                    self._leave(work.tensor)
                    break
                middle = (start + end) // 2
                waiting += [(middle, end), (start, middle)]
                self.limit = max(1, min(self.limit, (end - start) * work.read_bytes // 2))
                continue
            result, good, exact = made
            if exact is not None:
                self._download(exact, slot.exact[: work.exact_bytes].view(exact.dtype))
            finite = good if finite is None else finite & good
            self._download(result, target[start:end])
            self.tile_bytes = max(self.tile_bytes, (end - start) * work.read_bytes)
        if work.failed:
            self._release_memory()
            self.free.append(slot)
            return
        assert finite is not None, "a tile has rows"
        self._download(finite.reshape(1), slot.finite)
        if self.on_cuda:
            slot.done = self.down.record_event()
        # Without the tensor's program, which a writer has no need of and would keep.
        rows = Rows(
            tile.place,
            tile.first,
            work.dtype,
            measured=tile.measured,
            only_added=work.program.only_adds,
            exact=work.tensor["exact"],
        )
        self.writes.append(self.writers.submit(self._write, rows, slot, target))
        self._drain(TILES - 1)
        self._report()

    def _tried(
        self, tile: Tile, slot: Slot, within: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Some of a tile's rows, merged, whether all are finite, and what rounding is measured by.

        None if memory ran out.
        """
        import torch

        try:
            source, program = self._upload(tile, slot, within), tile.work.program
            result = program.apply(source, tile.first + within[0])
            # NaN passes through to both, and this is one pass with nothing of the tile's size.
            least, most = torch.aminmax(result)
            exact = None
            if tile.measured and within[0] == 0:
                exact = program.before_rounding(source[:1], tile.first)[0]
            return result, torch.isfinite(least) & torch.isfinite(most), exact
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return None

    def _download(self, result: torch.Tensor, target: torch.Tensor) -> None:
        import torch

        if not self.on_cuda:
            target.copy_(result)
            return
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            target.copy_(result, non_blocking=True)
        result.record_stream(self.down)

    def _write(self, rows: Rows, slot: Slot, target: torch.Tensor) -> int:
        """Writes a finished tile; returns its bytes and gives its buffers back."""
        import torch

        if slot.done is not None:
            slot.done.synchronize()
        if not bool(slot.finite.item()):
            size = target.numel() * rows.dtype.itemsize
            if rows.exact:
                before, after = slot.source[:size], target.view(torch.uint8).reshape(-1)
                self.execution.decide(rows.place, rows.first, before.numpy(), after.numpy())
            source = slot.source[:size].view(rows.dtype).reshape(target.shape)
            made = torch.isfinite(source) & ~torch.isfinite(target)
            if bool(made.any()):
                index = int(made.flatten().nonzero()[0].item())
                self.execution.raise_overflow(rows.place, rows.first * target.shape[1] + index)
        content = target.view(torch.uint8).reshape(-1).numpy()
        self.execution.write_rows(rows.place, rows.first, content)
        if rows.measured:
            columns = target.shape[1]
            self.execution.measure_rounding(
                rows.place,
                slot.source[: columns * rows.dtype.itemsize].numpy(),
                slot.exact[: columns * EXACT_BYTES].numpy(),
                content[: columns * target.element_size()],
                is_change=rows.only_added,
            )
        self.free.append(slot)
        return int(content.size)

    def _drain(self, most: int) -> None:
        """Waits until no more than so many writes are on their way."""
        while len(self.writes) > max(most, 0):
            self.written += self.writes.popleft().result()
        while self.writes and self.writes[0].done():
            self.written += self.writes.popleft().result()

    def _release_memory(self) -> None:
        import torch

        if self.on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
