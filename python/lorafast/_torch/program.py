"""The arithmetic of one tensor's updates on a device, tile by tile.

What an update means stands in the core (`execute/operands.rs`): over stages, from what the stage
before left (S, at first W₀), (1 − Σ w)·S + Σ w·V + Σ w·c·(B·A), in float32 (float64 for a float64
weight), and one rounding to the output's dtype.

Where updates only add and weight and output are of one 16-bit dtype, a tile is one `addmm`: the
factors are written as sums of 16-bit parts, whose products a GEMM accumulates in float32, and W is
added before the only rounding. W is then read and written once, and nothing else is of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lorafast._torch.device import exact_products, ran_out, torch_dtype

if TYPE_CHECKING:
    import torch

    Scan = Callable[[], Iterable[tuple[int, torch.Tensor]]]

#: 16-bit parts that a factor is written in: 3 times 8 bits hold the 24 of a float32.
PARTS = 3
#: Ranks of a 16-bit product come in multiples of this, as tensor cores take them.
RANK_MULTIPLE = 8
#: Devices whose 16-bit `addmm` has been found to round once, or not to.
_proved: dict[tuple[str, str], bool] = {}


@dataclass
class Sum:
    """Products that are added to the same rows: left (rows, rank) · right (rank, columns)."""

    rows: tuple[int, int]
    left: torch.Tensor
    right: torch.Tensor
    #: The same as parts in the weight's 16-bit dtype, with the factor on their product.
    parts: tuple[torch.Tensor, torch.Tensor, float] | None = None


@dataclass
class Place:
    """An update that takes S's place: a replacement, or DoRA's rescaled sum."""

    rows: tuple[int, int]
    weight: float
    own: torch.Tensor | None
    products: Sum | None
    #: (rows,) or, where it lies turned, (columns,); float64.
    magnitude: torch.Tensor | None
    transposed: bool
    #: weight · m/‖V‖ of the columns, once the norms are known.
    gains: torch.Tensor | None = None


@dataclass
class Stage:
    """Updates that are made from the same S."""

    sums: list[Sum]
    places: list[Place]


class Program:
    """The updates of one tensor with their factors on a device.

    Attributes:
        bytes: what the factors take there.
    """

    def __init__(
        self,
        updates: Sequence[Mapping[str, Any]],
        *,
        dtype: torch.dtype,
        output: torch.dtype,
        device: torch.device,
        sign: float = 1.0,
    ) -> None:
        import torch

        self.dtype, self.output, self.device = dtype, output, device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.stages: list[Stage] = []
        number = None
        for update in updates:
            if update["stage"] != number:
                number = update["stage"]
                self.stages.append(Stage([], []))
            self._add(self.stages[-1], update, sign)
        for stage in self.stages:
            stage.sums = _joined(stage.sums)
        self.fused = self._fuse()

    def _add(self, stage: Stage, update: Mapping[str, Any], sign: float) -> None:
        import torch

        rows, weight = tuple(update["rows"]), sign * update["weight"]
        kind = update["kind"]
        if kind in {"low_rank", "vector"}:
            stage.sums.append(self._sum(update, rows, weight))
            return
        own = None
        if update["base_override"] is not None:
            name, content = update["base_override"]
            values = _tensor(content, name).reshape(rows[1] - rows[0], -1)
            own = values.to(self.device, self.wide)
        products = magnitude = None
        if kind == "dora":
            products = self._sum(update, rows, 1.0)
            values = torch.frombuffer(bytearray(update["magnitude"]), dtype=torch.float64)
            magnitude = values.to(self.device)
        stage.places.append(Place(rows, weight, own, products, magnitude, update["transposed"]))

    def _sum(self, update: Mapping[str, Any], rows: tuple[int, int], weight: float) -> Sum:
        import torch

        lefts, rights = [], []
        for product in update["products"]:
            rank, coefficient = product["rank"], product["coefficient"] * weight
            a = _tensor(product["a"], product["a_dtype"]).reshape(rank, product["inputs"])
            b = _tensor(product["b"], product["b_dtype"]).reshape(product["outputs"], rank)
            a = a.to(self.device).to(self.wide)
            b = b.to(self.device).to(self.wide)
            if coefficient != 1.0:
                # As the CPU's kernels: the factor's product in float64, rounded once.
                b = b.double().mul_(coefficient).to(self.wide)
            lefts.append(a.T if update["transposed"] else b)
            rights.append(b.T if update["transposed"] else a)
        return Sum(rows, torch.cat(lefts, 1), torch.cat(rights, 0).contiguous())

    def _fuse(self) -> bool:
        """Whether tiles can be one 16-bit `addmm`; splits the factors if so."""
        import torch

        if self.dtype != self.output or self.dtype not in {torch.float16, torch.bfloat16}:
            return False
        if len(self.stages) != 1 or self.stages[0].places:
            return False
        sums = self.stages[0].sums
        bands = sorted(each.rows for each in sums)
        apart = all(left[1] <= right[0] for left, right in pairwise(bands))
        if not apart or not rounds_once(self.device, self.dtype):
            return False
        for each in sums:
            each.parts = split(each.left, each.right, self.dtype)
        return all(each.parts is not None for each in sums)

    @classmethod
    def joined(cls, programs: Sequence[Program]) -> Program:
        """One program that adds what several do, of the same tensor and none that does more."""
        first = programs[0]
        sums = [each for program in programs for stage in program.stages for each in stage.sums]
        return cls._of_sums(first, [Sum(each.rows, each.left, each.right) for each in sums])

    def negated(self) -> Program:
        """The program that subtracts what this one adds."""
        sums = [each for stage in self.stages for each in stage.sums]
        return self._of_sums(self, [Sum(each.rows, -each.left, each.right) for each in sums])

    @classmethod
    def _of_sums(cls, like: Program, sums: Sequence[Sum]) -> Program:
        program = cls([], dtype=like.dtype, output=like.output, device=like.device)
        program.stages = [Stage(_joined(sums), [])]
        program.fused = program._fuse()
        return program

    def tensors(self) -> list[torch.Tensor]:
        """Everything that it holds on the device."""
        held = []
        for stage in self.stages:
            sums = stage.sums + [place.products for place in stage.places if place.products]
            held += [tensor for each in sums for tensor in (each.left, each.right)]
            held += [part for each in sums if each.parts for part in each.parts[:2]]
            for place in stage.places:
                own = (place.own, place.magnitude, place.gains)
                held += [tensor for tensor in own if tensor is not None]
        return held

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def work_size(self) -> int:
        """Bytes of scratch for each element of a tile, its own value and result left out."""
        if self.fused:
            return 0
        buffers = 2 if self.only_adds else 5
        # A scan for norms of a later stage keeps W₀ beside what the stages before make of it.
        buffers += any(
            place.magnitude is not None and place.transposed
            for stage in self.stages[1:]
            for place in stage.places
        )
        return int(buffers * self.wide.itemsize)

    @property
    def needs_scan(self) -> bool:
        """Whether norms of columns need all of W₀ before the first tile."""
        return any(
            place.magnitude is not None and place.transposed and place.gains is None
            for stage in self.stages
            for place in stage.places
        )

    def scan(self, tiles: Scan) -> None:
        """Finds the norms of columns.

        Args:
            tiles: called once for each norm; gives all of W₀ as (first row, rows) on the device.
        """
        for position, stage in enumerate(self.stages):
            for place in stage.places:
                if place.magnitude is None or not place.transposed:
                    continue
                total: torch.Tensor | None = None
                for first, tile in tiles():
                    wide = tile.to(self.wide)
                    rows = (first, first + len(wide))
                    if rows[0] < place.rows[0] or rows[1] > place.rows[1]:
                        continue
                    start = self._advance(wide, rows, self.stages[:position])
                    squares = self._value(place, start, rows).double().square().sum(0)
                    total = squares if total is None else total + squares
                assert total is not None, "an update lies on rows of its tensor"
                place.gains = (place.weight * (place.magnitude / total.sqrt())).to(self.wide)

    @property
    def only_adds(self) -> bool:
        """Whether what it adds does not depend on W₀."""
        return not any(stage.places for stage in self.stages)

    def before_rounding(self, tile: torch.Tensor, first: int) -> torch.Tensor:
        """What rows become before they are rounded, in float32; what is added if it `only_adds`.

        Arguments are those of `apply`. Added to a weight in float32, a change far smaller than the
        weight would be lost, so that it stands alone where it can.
        """
        import torch

        rows = (first, first + len(tile))
        owned = self.only_adds or tile.dtype != self.wide
        start = tile.new_zeros(tile.shape, dtype=self.wide) if self.only_adds else tile
        values = self._advance(start.to(self.wide), rows, self.stages, owned=owned)
        return values.to(torch.float32)

    def apply(
        self, tile: torch.Tensor, first: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The merged rows, in the output's dtype.

        Args:
            tile: (rows, columns) of W₀ in its own dtype, on the device, within one segment.
            first: the tile's first row in the tensor.
            out: takes the result; may be `tile` itself.
        """
        import torch

        rows = (first, first + len(tile))
        if self.fused:
            covering = [each for each in self.stages[0].sums if covers(each.rows, rows)]
            if not covering:
                return tile if out is None else out.copy_(tile)
            parts = covering[0].parts
            assert parts is not None, "a fused program is made of such parts"
            left, right, scale = parts
            left = left[rows[0] - covering[0].rows[0] : rows[1] - covering[0].rows[0]]
            if out is tile:
                return tile.addmm_(left, right, alpha=scale)
            return torch.addmm(tile, left, right, alpha=scale, out=out)
        owned = tile.dtype != self.wide
        result = self._advance(tile.to(self.wide), rows, self.stages, owned=owned)
        return result.to(self.output) if out is None else out.copy_(result)

    def _advance(
        self,
        start: torch.Tensor,
        rows: tuple[int, int],
        stages: Sequence[Stage],
        *,
        owned: bool = False,
    ) -> torch.Tensor:
        """What some stages make of S, which they may use up if it is `owned`."""
        for stage in stages:
            places = [place for place in stage.places if covers(place.rows, rows)]
            keep = 1.0 - sum(place.weight for place in places)
            if not places:
                result = start if owned else start.clone()
            elif keep == 0.0:
                # Not by a product with zero, which would make NaN of a base's infinity.
                result = start.new_zeros(start.shape)
            else:
                result = start * keep
            for each in stage.sums:
                if covers(each.rows, rows):
                    result.addmm_(rows_of(each, rows), each.right)
            for place in places:
                value = self._value(place, start, rows)
                result += value * self._gain(place, value, rows)
            start, owned = result, True
        return start

    def _value(self, place: Place, start: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        """V on some rows, before DoRA's gain."""
        import torch

        if place.own is not None:
            start = place.own[rows[0] - place.rows[0] : rows[1] - place.rows[0]]
        if place.products is None:
            return start
        return torch.addmm(start, rows_of(place.products, rows), place.products.right)

    def _gain(self, place: Place, value: torch.Tensor, rows: tuple[int, int]) -> Any:
        import torch

        if place.magnitude is None:
            return place.weight
        if place.transposed:
            assert place.gains is not None, "scanned before"
            return place.gains
        magnitude = place.magnitude[rows[0] - place.rows[0] : rows[1] - place.rows[0]]
        norms = torch.linalg.vector_norm(value, dim=1, dtype=torch.float64)
        return (place.weight * (magnitude / norms)).to(self.wide)[:, None]

    def largest_change(self) -> float | None:
        """A bound on the absolute change of any element, or None where updates do more than add.

        |Σ b·a| ≤ Σ ‖b‖·‖a‖ over each sum's rows of B and columns of A (Cauchy and Schwarz), with
        a percent for the rounding of the sums themselves.
        """
        import torch

        if not self.only_adds:
            return None
        total = 0.0
        for stage in self.stages:
            for each in stage.sums:
                rows = torch.linalg.vector_norm(each.left, dim=1, dtype=torch.float64)
                columns = torch.linalg.vector_norm(each.right, dim=0, dtype=torch.float64)
                total += float((rows.max() * columns.max()).item())
        return 1.01 * total


def covers(band: tuple[int, int], rows: tuple[int, int]) -> bool:
    return band[0] <= rows[0] and rows[1] <= band[1]


def rows_of(each: Sum, rows: tuple[int, int]) -> torch.Tensor:
    return each.left[rows[0] - each.rows[0] : rows[1] - each.rows[0]]


def _joined(sums: Sequence[Sum]) -> list[Sum]:
    """One sum for each band, the ranks behind one another."""
    import torch

    bands: dict[tuple[int, int], list[Sum]] = {}
    for each in sums:
        bands.setdefault(each.rows, []).append(each)
    return [
        Sum(
            rows,
            torch.cat([each.left for each in group], 1).contiguous(),
            torch.cat([each.right for each in group], 0).contiguous(),
        )
        for rows, group in bands.items()
    ]


def _tensor(content: bytes, dtype: str) -> torch.Tensor:
    import torch

    # A copy: torch warns of memory that it may not write to.
    return torch.frombuffer(bytearray(content), dtype=torch_dtype(dtype))


def split(
    left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Two float32 factors as parts of a 16-bit dtype, the ranks of all needed products in a row.

    left = 2ᵖ·Σ lᵢ and right = 2^q·Σ rⱼ with parts of falling size, so that left·right is
    2^(p+q)·Σ lᵢ·rⱼ; products below the third part are smaller than float32's rounding.

    Returns:
        Both factors, and the power of two on their product; None where a number is not finite or
        a factor so small or large that float32 does not hold that power.
    """
    import torch

    # At the upper end of float16's range, so that small numbers' smallest parts still have digits.
    top = 15 if dtype == torch.float16 else 0
    sides = [_parts(factor, inner, dtype, top) for inner, factor in ((1, left), (0, right))]
    if sides[0] is None or sides[1] is None:
        return None
    (lefts, up), (rights, down) = sides[0], sides[1]
    if abs(up + down) > 100:
        return None
    pairs = [(i, j) for i in range(len(lefts)) for j in range(len(rights)) if i + j < PARTS]
    lines = _in_a_row([lefts[i] for i, _ in pairs], 1)
    columns = _in_a_row([rights[j] for _, j in pairs], 0)
    return lines, columns, 2.0 ** -(up + down)


def _parts(
    factor: torch.Tensor, inner: int, dtype: torch.dtype, top: int
) -> tuple[list[torch.Tensor], int] | None:
    """A factor times a power of two as 16-bit parts of falling size, with that power.

    Args:
        factor: float32.
        inner: its dimension of ranks.
        dtype: of the parts.
        top: the power of two below which the largest number is brought.
    """
    largest = float(factor.abs().max().item())
    if not largest < float("inf"):
        return None
    shift = top - math.frexp(largest)[1] if largest else 0
    shift = max(-120, min(120, shift))
    whole = factor * 2.0**shift
    rest = whole.clone()
    parts: list[torch.Tensor] = []
    while len(parts) < PARTS:
        parts.append(rest.to(dtype))
        rest -= parts[-1]
        if not bool(rest.any()):
            break
    # Of a row (of the right factor a column) that is far smaller than the largest, float16
    # has too few digits even so.
    lost = rest.abs_().amax(inner) > 2.0**-21 * whole.abs_().amax(inner)
    return None if bool(lost.any()) else (parts, shift)


def _in_a_row(parts: Sequence[torch.Tensor], dimension: int) -> torch.Tensor:
    """Parts one behind the other, and zeros up to a rank that tensor cores take."""
    rank = parts[0].shape[dimension]
    shape = list(parts[0].shape)
    shape[dimension] = -(-len(parts) * rank // RANK_MULTIPLE) * RANK_MULTIPLE
    result = parts[0].new_zeros(shape)
    for position, part in enumerate(parts):
        result.narrow(dimension, position * rank, rank).copy_(part)
    return result


def rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a 16-bit `addmm` on a device rounds its float32 sum once, found by trying it.

    On the CPU it does, and is no faster there: for float16 a hundred times slower.
    """
    import torch

    if device.type == "cpu":
        return False
    key = (str(device), str(dtype))
    if key not in _proved:
        generator = torch.Generator().manual_seed(7)
        how: dict[str, Any] = {"generator": generator, "device": "cpu"}
        weight = torch.randn(96, 128, **how).to(dtype)
        left = 0.1 * torch.randn(96, 16, **how)
        right = 0.1 * torch.randn(16, 128, **how)
        expected = (weight.double() + left.double() @ right.double()).to(dtype)
        parts = split(left, right, dtype)
        assert parts is not None, "finite"
        try:
            with exact_products(device):
                got = torch.addmm(
                    weight.to(device), parts[0].to(device), parts[1].to(device), alpha=parts[2]
                )
        except RuntimeError as error:
            if ran_out(error):
                raise
            # A device without such a product.
            return False
        same = (got.cpu() == expected).double().mean().item()
        # A second rounding would show in a tenth of all elements.
        _proved[key] = same >= 0.998
    return _proved[key]
