"""Inner products of many adapters' updates on a device.

By module K = blocksum((𝐁ᵀ𝐁)∘(𝐀𝐀ᵀ)) over stacked factors, as in the core (`similarity/products.rs`):
products of factors in float64 or float32, TF32 off, and everything after them, and all norms, in
float64. The N×N result is made in tiles of members, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorafast._torch.device import exact_products

if TYPE_CHECKING:
    import torch

    from lorafast import _core
    from lorafast._types import SumPrecision

#: Ranks on one side of a tile: their products take twice 128 MB in float32.
TILE_RANKS = 5792
#: Bytes of stacked factors of one module, where no bound is given.
FACTOR_BYTES = 2 << 30


@dataclass
class _Stack:
    """Members' factors of one module: rows of 𝐁ᵀ (R, m) and 𝐀 (R, n)."""

    members: list[int]
    ranks: list[int]
    scales: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    #: The position among `members` of each row.
    owner: torch.Tensor
    #: The first row of each member, and the end.
    starts: list[int]


def products(
    collection: _core.Collection,
    groups: Sequence[Sequence[int]],
    *,
    device: torch.device,
    precision: SumPrecision,
    per_module: bool,
    memory: int | None,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[Any, list[Any]]:
    """All inner products within groups.

    Args:
        collection: the core's.
        groups: positions of the members of each.
        device: where to multiply.
        precision: "float64" or "float32".
        per_module: whether to keep those of each module.
        memory: bytes for the factors and products on the device.
        threads: worker threads that read.
        progress: called with the pairs of members done and to do, over all modules.

    Returns:
        N×N float64 NumPy arrays: of the whole updates (NaN for pairs in no group together), and of
        each module.
    """
    import numpy as np

    members, extents = collection.members(), collection.modules()
    count, modules = len(members), len(extents)
    rank = max((max(own["ranks"], default=1) for own in members), default=1)
    whole = np.full((count, count), np.nan)
    tables = [np.full((count, count), np.nan) for _ in range(modules if per_module else 0)]
    total = modules * sum(len(group) ** 2 for group in groups)
    done = 0
    with exact_products(device):
        for group in groups:
            place = np.ix_(group, group)
            whole[place] = 0.0
            for module in range(modules):
                _, rows, columns = extents[module]
                how = (precision, memory or FACTOR_BYTES, threads)
                own = _of_module(
                    collection, module, (rows, columns, rank), group, device=device, how=how
                )
                whole[place] += own
                if per_module:
                    tables[module][place] = own
                done += len(group) ** 2
                if progress is not None:
                    progress(done, total)
    return whole, tables


def _of_module(
    collection: _core.Collection,
    module: int,
    extents: tuple[int, int, int],
    group: Sequence[int],
    *,
    device: torch.device,
    how: tuple[SumPrecision, int, int | None],
) -> Any:
    """The products of a group's members in one module; zero where a member lacks it.

    `extents` are m, n and the largest rank.
    """
    import numpy as np

    precision, memory, threads = how
    rows, columns, rank = extents
    size = 8 if precision == "float64" else 4
    position = {member: at for at, member in enumerate(group)}
    result = np.zeros((len(group), len(group)))
    # Half of the memory for two blocks of factors, the rest for their products.
    fit = max(1, memory // 4 // (size * (rows + columns) * max(1, rank)))
    blocks = [group[first : first + fit] for first in range(0, len(group), fit)]

    def read(block: Sequence[int]) -> _Stack:
        found = collection.stacked(module, block, precision=precision, threads=threads)
        return _stack(found, rows, columns, device, precision)

    tile = _tile_ranks(memory, size)
    for at, block in enumerate(blocks):
        left = read(block)
        for other_at in range(at, len(blocks)):
            right = left if other_at == at else read(blocks[other_at])
            if not left.members or not right.members:
                continue
            table = _multiply(left, right, tile).cpu().numpy()
            over = [position[member] for member in left.members]
            across = [position[member] for member in right.members]
            result[np.ix_(over, across)] = table
            result[np.ix_(across, over)] = table.T
            # Not beside the next block, nor beside the squares.
            del right
        # All norms are sums of float64 products.
        for member, norm in zip(left.members, _squares(left), strict=True):
            result[position[member], position[member]] = norm
    return result


def _tile_ranks(memory: int, size: int) -> int:
    # Two products of factors at a time: of float32 the first widened, the second in both types.
    each = 16 if size == 8 else 20
    return max(1, min(TILE_RANKS, int((memory / 2 / each) ** 0.5)))


def _stack(
    found: tuple[list[int], list[int], list[float], bytearray, bytearray],
    rows: int,
    columns: int,
    device: torch.device,
    precision: SumPrecision,
) -> _Stack:
    import torch

    members, ranks, scales, b, a = found
    dtype = torch.float64 if precision == "float64" else torch.float32
    total = sum(ranks)
    starts = [0]
    for rank in ranks:
        starts.append(starts[-1] + rank)
    nothing = torch.empty(0, dtype=dtype, device=device)
    flat = torch.frombuffer(b, dtype=dtype).to(device) if total else nothing
    if len(set(ranks)) == 1:
        left = flat.view(len(ranks), rows, ranks[0]).transpose(1, 2).reshape(total, rows)
    else:
        parts = [
            flat[rows * start : rows * end].view(rows, end - start).T
            for start, end in pairwise(starts)
        ]
        left = torch.cat(parts) if parts else flat.view(0, rows)
    right = torch.frombuffer(a, dtype=dtype).to(device) if total else nothing
    owner = torch.repeat_interleave(
        torch.arange(len(ranks), device=device),
        torch.tensor(ranks, dtype=torch.long, device=device),
    )
    return _Stack(
        members,
        ranks,
        torch.tensor(scales, dtype=torch.float64, device=device),
        left.contiguous(),
        right.view(total, columns),
        owner,
        starts,
    )


def _runs(stack: _Stack, most: int) -> list[tuple[int, int]]:
    """Runs of members of at most so many ranks, one at least."""
    runs = []
    first = 0
    for at in range(len(stack.members)):
        if at > first and stack.starts[at + 1] - stack.starts[first] > most:
            runs.append((first, at))
            first = at
    runs.append((first, len(stack.members)))
    return runs


def _multiply(left: _Stack, right: _Stack, most: int) -> torch.Tensor:
    """⟨Xᵢ, Yⱼ⟩ of every member of the one with every member of the other, float64."""
    import torch

    table = torch.zeros(
        len(left.members), len(right.members), dtype=torch.float64, device=left.b.device
    )
    for top, bottom in _runs(left, most):
        over = slice(left.starts[top], left.starts[bottom])
        for first, last in _runs(right, most):
            if left is right and last <= top:
                continue
            across = slice(right.starts[first], right.starts[last])
            both = (left.b[over] @ right.b[across].T).double()
            both *= (left.a[over] @ right.a[across].T).double()
            sums = _block_sums(both, left, right, (top, bottom), (first, last))
            if left is right and (top, bottom) == (first, last):
                # A GEMM need not round the two halves alike.
                sums = sums.triu() + sums.triu(1).T
            table[top:bottom, first:last] = sums
            if left is right:
                table[first:last, top:bottom] = sums.T
    return table * (left.scales[:, None] * right.scales[None, :])


def _block_sums(
    both: torch.Tensor,
    left: _Stack,
    right: _Stack,
    over: tuple[int, int],
    across: tuple[int, int],
) -> torch.Tensor:
    """The sums of the blocks that each pair of members has in a product."""
    height, width = over[1] - over[0], across[1] - across[0]
    tall = set(left.ranks[over[0] : over[1]])
    wide = set(right.ranks[across[0] : across[1]])
    if len(tall) == len(wide) == 1:
        return both.view(height, tall.pop(), width, wide.pop()).sum((1, 3))
    rows = left.owner[left.starts[over[0]] : left.starts[over[1]]] - over[0]
    columns = right.owner[right.starts[across[0]] : right.starts[across[1]]] - across[0]
    half = both.new_zeros(height, both.shape[1]).index_add_(0, rows, both)
    return both.new_zeros(height, width).index_add_(1, columns, half)


def _squares(stack: _Stack) -> list[float]:
    """‖X‖² of every member, from float64 Gram matrices, members of one rank together."""
    import torch

    result = torch.zeros(len(stack.members), dtype=torch.float64, device=stack.b.device)
    by_rank: dict[int, list[int]] = {}
    for at, rank in enumerate(stack.ranks):
        by_rank.setdefault(rank, []).append(at)
    for rank, positions in by_rank.items():
        # As many at a time as take, widened, no more than the factors of all.
        most = max(1, min(64, len(stack.members) // 4))
        for first in range(0, len(positions), most):
            some = positions[first : first + most]
            rows = torch.cat(
                [
                    torch.arange(stack.starts[at], stack.starts[at] + rank, device=stack.b.device)
                    for at in some
                ]
            )
            b = stack.b[rows].double().view(len(some), rank, -1)
            a = stack.a[rows].double().view(len(some), rank, -1)
            squares = (torch.bmm(b, b.mT) * torch.bmm(a, a.mT)).sum((1, 2))
            # A sum of squares of what cancels may round to below zero.
            result[torch.tensor(some, device=result.device)] = squares.clamp(min=0)
    values: list[float] = (result * stack.scales.square()).tolist()
    return values
