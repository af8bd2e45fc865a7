"""Spectra of many updates on a device: factors of one shape in batches, in float64.

With thin QR decompositions B = Q_B·R_B and Aᵀ = Q_A·R_A, s·B·A has the singular values of the
small matrix s·R_B·R_Aᵀ; the figures made of them are the core's (`spectrum.rs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafast import _core
from lorafast._errors import AdapterError, LorafastError
from lorafast._io.sources import CoreSource, path_of
from lorafast._torch.device import exact_products, torch_dtype

if TYPE_CHECKING:
    import torch

#: Bytes of float64 factors in one batch.
BATCH_BYTES = 256 << 20
#: How far a sum may fall short of a share of the energy and still reach it, as in the core.
SHARE_TOLERANCE = 1e-9

Floats = NDArray[np.float64]


def with_spectra(
    found: Sequence[tuple[dict[str, Any], CoreSource]],
    metrics: str,
    have: np.dtype[Any],
    want: np.dtype[Any],
    device: torch.device,
) -> dict[int, Exception]:
    """Adds spectra to what a scan of moments found, and makes it what a scan of `metrics` finds.

    Args:
        found: what the core says of each adapter, and what it was opened from.
        metrics: "full" or "spectra".
        have: the type of the rows that a scan of moments makes.
        want: the type of the rows that one of `metrics` makes.
        device: where to decompose.

    Returns:
        Why some of them could not be read again, by position.
    """
    shared = [name for name in want.names or () if name in (have.names or ())]
    waiting: list[tuple[int, int, Any]] = []
    tables: list[NDArray[Any]] = []
    values: list[list[Floats]] = []
    failed: dict[int, Exception] = {}
    size = 0

    def flush() -> None:
        nonlocal waiting, size
        for adapter, module, figures, own in _decompose(waiting, device):
            values[adapter][module] = own
            for name, figure in figures.items():
                tables[adapter][name][module] = figure
        waiting, size = [], 0

    for position, (result, source) in enumerate(found):
        rows = np.frombuffer(result["rows"], dtype=have)
        table = np.zeros(len(rows), dtype=want)
        for name in shared:
            table[name] = rows[name]
        tables.append(table)
        values.append([np.empty(0)] * len(rows))
        try:
            factors = _core.stored_factors(source)
            if len(factors) != len(rows):
                text = "changed while it was read; run again when it is complete"
                raise AdapterError(f"{path_of(source)}: {text}")
        except (LorafastError, OSError) as error:
            failed[position] = error
            continue
        for module, each in enumerate(factors):
            (outputs, inputs, rank), *_ = each
            waiting.append((position, module, each))
            size += 8 * rank * (outputs + inputs)
            if size >= BATCH_BYTES:
                flush()
    flush()
    for position, ((result, _), table, own) in enumerate(zip(found, tables, values, strict=True)):
        if position in failed:
            continue
        result["rows"] = table.tobytes()
        result["singular_values"] = np.concatenate([*own, np.empty(0)]).astype("<f8").tobytes()
        if metrics == "spectra":
            result["weights"], result["non_finite"] = None, []
    return failed


def _decompose(
    waiting: Sequence[tuple[int, int, Any]], device: torch.device
) -> list[tuple[int, int, dict[str, float], Floats]]:
    shapes: dict[tuple[int, int, int], list[tuple[int, int, Any]]] = {}
    for each in waiting:
        shapes.setdefault(each[2][0], []).append(each)
    result = []
    with exact_products(device):
        for shape, group in shapes.items():
            singular, means = _of_shape([each for _, _, each in group], shape, device)
            figures = figures_of(singular, shape, means)
            for at, (adapter, module, _) in enumerate(group):
                own = {name: column[at] for name, column in figures.items()}
                result.append((adapter, module, own, singular[at]))
    return result


def _of_shape(
    group: Sequence[Any], shape: tuple[int, int, int], device: torch.device
) -> tuple[Floats, Floats]:
    """Singular values, (count, min(m, n, r)) descending, and the means of the entries."""
    import torch

    rows, columns, rank = shape

    def read(stored: tuple[str, bytes], *extents: int) -> torch.Tensor:
        dtype, content = stored
        values = torch.frombuffer(bytearray(content), dtype=torch_dtype(dtype))
        return values.to(device).double().view(extents)

    b = torch.stack([read(each[2], rows, rank) for each in group])
    a = torch.stack([read(each[3], rank, columns) for each in group])
    scales = torch.tensor([each[1] for each in group], dtype=torch.float64, device=device)
    finite = torch.isfinite(b).all(2).all(1) & torch.isfinite(a).all(2).all(1)
    finite &= torch.isfinite(scales)
    b, a = (torch.where(finite[:, None, None], side, 0.0) for side in (b, a))
    left = torch.linalg.qr(b, mode="r").R
    right = torch.linalg.qr(a.mT, mode="r").R
    core = scales.nan_to_num(0.0, 0.0, 0.0)[:, None, None] * (left @ right.mT)
    singular = torch.linalg.svdvals(core)
    sums = scales * (b.sum(1) * a.sum(2)).sum(1) / (rows * columns)
    singular[~finite] = torch.nan
    sums[~finite] = torch.nan
    return singular.cpu().numpy(), sums.cpu().numpy()


def figures_of(
    singular: Floats, shape: tuple[int, int, int], means: Floats
) -> Mapping[str, NDArray[Any]]:
    """The columns of a scan's rows that follow from singular values, as `Spectrum` has them.

    Args:
        singular: (count, k) descending; rows of NaN for updates that are not finite.
        shape: m, n and r of all of them.
        means: of the entries.
    """
    count, length = singular.shape
    first = singular[:, 0] if length else np.zeros(count)
    odd, zero = ~np.isfinite(first), first == 0
    plain = ~(odd | zero)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(plain[:, None], singular / np.where(plain, first, 1.0)[:, None], 1.0)
        squares = relative**2
        energy = squares.sum(1)
        condition = 1.0 / relative[:, -1] if length else np.full(count, np.inf)
        floor = max(shape[:2]) * np.finfo(np.float64).eps
        reals = {
            "frobenius_norm": first * np.sqrt(energy),
            "spectral_norm": first,
            "stable_rank": energy,
            "effective_rank": _perplexity(relative),
            "energy_effective_rank": _perplexity(squares),
            "participation_ratio": energy**2 / (squares**2).sum(1),
            "entry_mean": means,
        }
        integers = {
            name: _leading(squares, share * energy)
            for name, share in (("k90", 0.90), ("k95", 0.95), ("k99", 0.99))
        }
    integers["numerical_rank"] = (relative > floor).sum(1)
    nothing = np.where(odd, np.nan, 0.0)
    result: dict[str, NDArray[Any]] = {
        name: np.where(plain, column, nothing) for name, column in reals.items()
    }
    result["condition"] = np.where(plain, condition, np.inf + nothing)
    result |= {name: np.where(plain, column, 0) for name, column in integers.items()}
    result["singular_values"] = np.full(count, length)
    return result


def _perplexity(weights: Floats) -> Floats:
    """Exp of the Shannon entropy of each row's distribution."""
    shares = weights / weights.sum(1, keepdims=True)
    terms = np.where(shares > 0, -shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0)
    result: Floats = np.exp(terms.sum(1))
    return result


def _leading(squares: Floats, target: Floats) -> NDArray[np.int64]:
    """The least k whose first k squares reach the target."""
    reached = np.cumsum(squares, 1) >= (target * (1.0 - SHARE_TOLERANCE))[:, None]
    first: NDArray[np.int64] = np.full(len(squares), squares.shape[1], dtype=np.int64)
    found = reached.any(1)
    first[found] = reached[found].argmax(1) + 1
    return first
