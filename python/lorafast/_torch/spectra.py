"""Spectra of many updates on a device: factors of one shape in batches, in float64.

With thin QR decompositions B = Q_B·R_B and Aᵀ = Q_A·R_A, s·B·A has the singular values of the
small matrix s·R_B·R_Aᵀ; the figures made of them are the core's (`spectrum.rs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafast import _core
from lorafast._errors import AdapterError, LorafastError
from lorafast._io.sources import CoreSource
from lorafast._torch.device import exact_products, torch_dtype

if TYPE_CHECKING:
    import torch

    from lorafast._types import Metrics

#: Bytes of float64 factors in one batch.
BATCH_BYTES = 256 << 20

Floats = NDArray[np.float64]


def with_spectra(
    found: Sequence[tuple[_core.ScannedAdapter, str | CoreSource]],
    metrics: Metrics,
    device: torch.device,
) -> list[_core.ScannedAdapter | Exception]:
    """Makes what a scan of moments found what a scan of `metrics` finds.

    Args:
        found: what the core says of each adapter, and what it was opened from.
        metrics: "full" or "spectra".
        device: where to decompose.

    Returns:
        The adapters in their order, or why one could not be read again.
    """
    waiting: list[tuple[int, int, Any]] = []
    spectra: list[list[tuple[list[float], float, str | None]]] = []
    failed: dict[int, Exception] = {}
    size = 0

    def flush() -> None:
        nonlocal waiting, size
        for adapter, module, values, mean in _decompose(waiting, device):
            _, _, zero_cause = spectra[adapter][module]
            spectra[adapter][module] = (values.tolist(), mean, zero_cause)
        waiting, size = [], 0

    for position, (result, source) in enumerate(found):
        spectra.append([([], 0.0, None)] * len(result.modules))
        try:
            factors = _core.stored_factors(source)
            if len(factors) != len(result.modules):
                text = "changed while it was read; run again when it is complete"
                path = source[0] if isinstance(source, tuple) else source
                raise AdapterError(f"{path}: {text}")
        except (LorafastError, OSError) as error:
            failed[position] = error
            continue
        for module, each in enumerate(factors):
            (outputs, inputs, rank), *_, zero_cause = each
            spectra[position][module] = ([], 0.0, zero_cause)
            waiting.append((position, module, each))
            size += 8 * rank * (outputs + inputs)
            if size >= BATCH_BYTES:
                flush()
    flush()
    return [
        failed.get(position) or result.with_spectra(metrics, own)
        for position, ((result, _), own) in enumerate(zip(found, spectra, strict=True))
    ]


def _decompose(
    waiting: Sequence[tuple[int, int, Any]], device: torch.device
) -> list[tuple[int, int, Floats, float]]:
    shapes: dict[tuple[int, int, int], list[tuple[int, int, Any]]] = {}
    for each in waiting:
        shapes.setdefault(each[2][0], []).append(each)
    result = []
    with exact_products(device):
        for shape, group in shapes.items():
            singular, means = _of_shape([each for _, _, each in group], shape, device)
            for (adapter, module, _), values, mean in zip(group, singular, means, strict=True):
                result.append((adapter, module, values, float(mean)))
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
