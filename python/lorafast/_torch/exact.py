"""Sums that are rounded once from the real number that they are, on a device.

Each element is summed in float64, in any order, and lies within a bound of the real sum: with a
rank of n, (2n + 8)·2⁻⁵³·(|W| + ‖row‖·‖column‖), which is more than n products, their sums and the
factors' own roundings can be off. Where both ends of that interval are rounded to the same number,
that is the number. Elsewhere a NaN says that the core has to decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafast._torch.program import Program, covers, rows_of

if TYPE_CHECKING:
    import torch

#: Half a unit in the last place of 1, of float64 and of float32.
UNIT = 2.0**-53
UNIT_OF_SINGLE = 2.0**-24
#: What is added to bounds for what underflows, of float64 and of float32.
FLOOR = 1e-290
FLOOR_OF_SINGLE = 2.0**-146
#: Room for the roundings of the bounds themselves.
SLACK = 1.01
#: Bytes of scratch for each element of a tile.
WORK_SIZE = 56


class ExactProgram(Program):
    """The products of one tensor that are added to it, in float64.

    The weight and the output are of at most 32 bits, and all updates are products or vectors.
    """

    def __init__(
        self,
        updates: Sequence[Mapping[str, Any]],
        *,
        dtype: torch.dtype,
        output: torch.dtype,
        device: torch.device,
    ) -> None:
        import torch

        super().__init__(updates, dtype=torch.float64, output=output, device=device)
        self.dtype = dtype
        norm = torch.linalg.vector_norm
        #: For each sum ‖·‖₂ of the left factor's rows and of the right factor's columns.
        self.norms = [
            (norm(each.left, dim=1) * SLACK + FLOOR, norm(each.right, dim=0) * SLACK + FLOOR)
            for stage in self.stages
            for each in stage.sums
        ]

    def tensors(self) -> list[torch.Tensor]:
        """Everything that it holds on the device."""
        return super().tensors() + [norm for pair in self.norms for norm in pair]

    @property
    def work_size(self) -> int:
        """Bytes of scratch for each element of a tile, its own value and result left out."""
        return WORK_SIZE

    def apply(
        self, tile: torch.Tensor, first: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The merged rows in the output's dtype, with NaN in place of what is not decided.

        Arguments are those of `Program.apply`.
        """
        import torch

        rows = (first, first + len(tile))
        total, size, count = tile.double(), tile.double().abs_(), 0
        sums = (each for stage in self.stages for each in stage.sums)
        for each, (of_rows, of_columns) in zip(sums, self.norms, strict=True):
            if covers(each.rows, rows):
                left = rows_of(each, rows)
                total.addmm_(left, each.right)
                start = rows[0] - each.rows[0]
                size.addr_(of_rows[start : start + len(tile)], of_columns)
                count += left.shape[1]
        if not count:
            result = tile.to(self.output)
            return result if out is None else out.copy_(result)
        error = size.mul_((2 * count + 8) * SLACK * UNIT).add_(FLOOR)
        if self.output == torch.float32:
            low, high = (total - error).float(), total.add_(error).float()
            bits = torch.int32
        else:
            # Rounding to float32 first, which every later step allows for, as none goes from
            # float64 to 16 bits at once.
            middle = total.float()
            half = error.float().mul_(SLACK).add_(FLOOR_OF_SINGLE)
            half.add_(middle.abs(), alpha=2.125 * UNIT_OF_SINGLE)
            low, high = (middle - half).to(self.output), (middle + half).to(self.output)
            bits = torch.int16
        undecided = low.view(bits) != high.view(bits)
        result = high.masked_fill_(undecided, float("nan"))
        return result if out is None else out.copy_(result)
