"""Measurements of tensors, modules and pairs of them: frozen values with typed fields.

Every figure of a module is one of its update ΔW = s·B·A, the scale included, and does not depend
on the factors that the update is written in. The formulas are those of the core's `spectrum` and
`overlap`; their sources are named at each field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lorafast import _core
from lorafast._deprecation import warn_renamed
from lorafast._results import shown

if TYPE_CHECKING:
    from lorafast._types import Matrix, Severity

#: The core's metrics of a module's update by name, in the order in which they are told.
METRICS = {metric["name"]: metric for metric in _core.module_metrics()}

T = TypeVar("T")


def _with_metrics(record: type[T]) -> type[T]:
    """Gives a record a field for each metric of the core, also those that it does not spell out."""
    own = record.__annotations__
    new = {name: metric for name, metric in METRICS.items() if name not in own}
    # Fields without a default come first.
    required = {name: kind for name, kind in own.items() if name not in vars(record)}
    optional = {name: kind for name, kind in own.items() if name in vars(record)}
    kinds = {name: "int" if metric["integer"] else "float" for name, metric in new.items()}
    record.__annotations__ = {**required, **kinds, **optional}
    lines = [f"        {name}: {metric['doc']}.\n" for name, metric in new.items()]
    record.__doc__ = (record.__doc__ or "").rstrip(" ") + "".join(lines) + "    "
    return record


class _Critical(str):
    """The severity "critical", which for one more release also equals its old name, "severe"."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and str.__eq__(other, "severe"):
            warn_renamed('the severity "severe"', '"critical"')
            return True
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        if isinstance(other, str) and str.__eq__(other, "severe"):
            warn_renamed('the severity "severe"', '"critical"')
            return False
        return str.__ne__(self, other)

    __hash__ = str.__hash__


_CRITICAL = _Critical("critical")


@shown
@dataclass(frozen=True, slots=True)
class Finding:
    """Something that an expert would point at.

    Attributes:
        severity: critical (do not use the adapter before it is understood), warning, or note.
        kind: what it is, one of the kinds in `lorafast._analysis.findings`.
        module: the module it is about; `None` for the whole adapter.
        value: the number that gave rise to it.
        reason: one sentence.
    """

    severity: Severity
    kind: str
    module: str | None
    value: float | None
    reason: str

    def __post_init__(self) -> None:
        given: object = self.severity
        if isinstance(given, str) and str.__eq__(given, "severe"):
            # Called by `__init__`, which is called by whoever makes the finding.
            warn_renamed('the severity "severe"', '"critical"', stacklevel=4)
            object.__setattr__(self, "severity", _CRITICAL)
        elif given == _CRITICAL:
            object.__setattr__(self, "severity", _CRITICAL)

    @property
    def figure(self) -> float | None:
        """The old name of `value`."""
        warn_renamed("Finding.figure", "Finding.value")
        return self.value


@shown
@dataclass(frozen=True)
class Histogram:
    """Counts between edges; the last bin contains its upper edge, as `numpy.histogram`.

    Attributes:
        edges: the n+1 edges of n bins, ascending.
        counts: how many values lie in each bin.
    """

    edges: list[float]
    counts: list[int]


@shown
@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of stored values: of one tensor, or of all together.

    NaN and infinities are counted in `non_finite` and left out of everything else but `count`.
    Sums are in float64; figures that do not exist (the mean of nothing) are NaN.

    Attributes:
        shape: of the tensor; `None` for all together.
        dtype: as safetensors writes it (F32, BF16, …); `None` for all together.
        count: all values.
        non_finite: NaN and ±∞ among them.
        mean: the arithmetic mean.
        std: the population standard deviation (divisor n), as `numpy.std`.
        min: the least value.
        max: the greatest value.
        l1_norm: Σ|w|.
        l2_norm: √Σw².
        max_norm: max|w|.
        zeros: values equal to zero.
        zero_share: their share of the finite values.
        skewness: m₃/m₂^1.5, biased, as `scipy.stats.skew`.
        kurtosis: m₄/m₂² − 3, biased, as `scipy.stats.kurtosis`.
        percentiles: percentile (0 to 100) to value, by linear interpolation as NumPy's.
        histogram: of the values, from least to greatest.
        log_histogram: of log₁₀(|w| + 1e-8).
    """

    shape: tuple[int, ...] | None
    dtype: str | None
    count: int
    non_finite: int
    mean: float
    std: float
    min: float
    max: float
    l1_norm: float
    l2_norm: float
    max_norm: float
    zeros: int
    zero_share: float
    skewness: float
    kurtosis: float
    percentiles: dict[float, float]
    histogram: Histogram
    log_histogram: Histogram


@shown
@dataclass(frozen=True)
class EntryStatistics:
    """Statistics of the entries of ΔW itself, computed tile by tile in float32.

    Attributes:
        count: all entries, out × in.
        non_finite: NaN and ±∞ among them, left out of the rest.
        min: the least entry.
        max: the greatest entry.
        max_abs: max|ΔW|.
        threshold: the magnitude that `below_share` is about.
        below: entries of a magnitude below it.
        below_share: their share of the finite entries.
        histogram: of the entries, from least to greatest.
    """

    count: int
    non_finite: int
    min: float
    max: float
    max_abs: float
    threshold: float
    below: int
    below_share: float
    histogram: Histogram


@shown
@dataclass(frozen=True)
@_with_metrics
class ModuleAnalysis:
    """One module's update ΔW = s·B·A, with σ₁ ≥ σ₂ ≥ … its singular values.

    Of what only the base's weight makes an update of (`made_of_weight`) it is W′ − W₀.

    Of an update with NaN or infinity every figure is NaN and every count 0; of a zero update
    norms and ranks are 0 and the condition is infinite.

    Attributes:
        path: the module's path in the model.
        kind: linear, embedding or convolution.
        block: the index of the block it lies in, from its path; `None` outside of blocks.
        layer: the path within the block, `self_attn.q_proj`.
        shape: (out, in) of ΔW; a convolution's in-channels and kernel are taken together.
        rank: r, the common extent of the factors.
        alpha: the alpha that the config gives the module.
        scaling: s: α/r, or α/√r for rsLoRA (Kalajdzievski 2023).
        a_name: the tensor of A in `AdapterAnalysis.tensors`.
        b_name: the tensor of B.
        frobenius_norm: ‖ΔW‖_F = √Σσ².
        spectral_norm: ‖ΔW‖₂ = σ₁.
        singular_values: σ, descending; min(r, out, in) of them, the others of ΔW are zero.
        stable_rank: Σσ²/σ₁².
        effective_rank: exp H(σ/Σσ) (Roy & Vetterli 2007).
        energy_effective_rank: exp H(σ²/Σσ²).
        participation_ratio: (Σσ²)²/Σσ⁴.
        k90: the least k for which the first k of σ² make 90 % of Σσ².
        k95: the same for 95 %.
        k99: the same for 99 %.
        numerical_rank: σ above max(out, in)·ε·σ₁, as `numpy.linalg.matrix_rank` in float64.
        condition: σ₁ over the last singular value.
        entry_mean: the mean of ΔW's entries.
        rescaled: whether DoRA's magnitudes rescale the whole weight; figures are of s·B·A alone.
        made_of_weight: whether the figures are of W′ − W₀, as of what only the base's weight makes
            an update of (IA³, GLoRA, orthogonal blocks). Of large weights there are norms alone.
        zero_cause: why a merge of the module changes nothing, as it says itself; `None` where it
            changes something, be it by a DoRA magnitude, by a bias, or by what its start took out
            of the base's weight, beside a product of zero.
        relative_norm: ‖ΔW‖_F/‖W₀‖_F, with a base; else `None`.
        change_norm: ‖W′ − W₀‖_F of a module that makes more of its weight than a sum with a product
            (DoRA, IA³, GLoRA, orthogonal blocks), with a base; else `None`.
        base_norm: ‖W₀‖_F, with a base; else `None`.
        base_tensor: the base's tensor, with a base; else `None`.
        entries: statistics of ΔW's entries where they were asked for; else `None`.
    """

    path: str
    kind: str
    block: int | None
    layer: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scaling: float
    a_name: str
    b_name: str
    frobenius_norm: float
    spectral_norm: float
    singular_values: list[float]
    stable_rank: float
    effective_rank: float
    energy_effective_rank: float
    participation_ratio: float
    k90: int
    k95: int
    k99: int
    numerical_rank: int
    condition: float
    entry_mean: float
    zero_cause: str | None = None
    relative_norm: float | None = None
    base_norm: float | None = None
    base_tensor: str | None = None
    entries: EntryStatistics | None = None
    rescaled: bool = False
    made_of_weight: bool = False
    change_norm: float | None = None


@shown
@dataclass(frozen=True)
class PairComparison:
    """Two adapters' updates of one module.

    φ(i, j) = ‖UᵢᵀUⱼ‖²_F/min(i, j) of the i and j leading singular directions (Hu et al. 2021,
    LoRA, §7.2), 0 for orthogonal subspaces and 1 where one contains the other. Random subspaces
    of a d-dimensional space have the expectation max(i, j)/d. Output is the left side (U, d = out),
    input the right (V, d = in).

    Attributes:
        first: position of the first adapter in `Comparison.names`.
        second: position of the second.
        cosine: ⟨X, Y⟩/(‖X‖·‖Y‖); NaN where one is zero or not finite.
        relative_difference: ‖X − Y‖_F/max(‖X‖_F, ‖Y‖_F).
        sign_agreement: share of entries that both change in the same direction, of those that
            both change.
        sign_sampled: whether the entries were sampled (2¹⁸ of them, error about 0.001).
        sizes: the i and the j that φ is given for: powers of two, and the ranks.
        output_phi: φ of the output subspaces, a row for each i.
        output_expected: its expectation for random subspaces.
        input_phi: φ of the input subspaces.
        input_expected: its expectation for random subspaces.
        output_angles: principal angles between the whole output subspaces in radians, ascending.
        input_angles: the same of the input subspaces.
    """

    first: int
    second: int
    cosine: float
    relative_difference: float
    sign_agreement: float
    sign_sampled: bool
    sizes: tuple[list[int], list[int]]
    output_phi: list[list[float]]
    output_expected: list[list[float]]
    input_phi: list[list[float]]
    input_expected: list[list[float]]
    output_angles: list[float]
    input_angles: list[float]


@shown
@dataclass(frozen=True, eq=False)
class ModuleComparison:
    """One module in each of N adapters.

    Attributes:
        path: the module's path.
        shape: (out, in) of its update in the first adapter that has it.
        present: for each adapter whether it has the module.
        norms: ‖ΔW‖_F in each adapter; `None` where it is absent.
        ranks: the rank in each adapter; `None` where it is absent.
        cosine: N×N, of the updates; NaN where one is absent, zero or not finite.
        sign_agreement: N×N, NaN where one is absent.
        subspace: N×N, φ of the whole output subspaces; NaN where one is absent.
        subspace_expected: N×N, its expectation for random subspaces of these ranks; NaN on the
            diagonal.
        pairs: the pairs of adapters that both have the module, in order.
        block: the index of the block that it lies in; `None` outside of blocks.
        layer: the path within the block.

    Where modules were not compared (`Comparison.modules_compared`) the matrices are NaN, and there
    are no pairs.
    """

    path: str
    shape: tuple[int, int]
    present: list[bool]
    norms: list[float | None]
    ranks: list[int | None]
    cosine: Matrix
    sign_agreement: Matrix
    subspace: Matrix
    subspace_expected: Matrix
    pairs: list[PairComparison]
    block: int | None = None
    layer: str = ""


#: The fields of a module's comparison that are matrices of pairs.
PAIR_MATRICES = ("cosine", "sign_agreement", "subspace", "subspace_expected")


def not_compared(count: int) -> Matrix:
    """N×N of NaN, which takes no memory and cannot be written to."""
    import numpy as np

    return np.broadcast_to(np.float64(np.nan), (count, count))


# What users see, and what a pickle names, whichever function made it.
for _value in list(vars().values()):
    if isinstance(_value, type) and _value.__module__ == __name__ and _value is not _Critical:
        _value.__module__ = "lorafast"
del _value
