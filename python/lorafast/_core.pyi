"""The Rust core's Python face. Paths, options and numbers cross it; tensors do not.

What crosses as plain objects has its shape in the dictionaries below, which are type checkers'
alone; a test holds them against what the core returns.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, final, type_check_only

from typing_extensions import Buffer

__all__ = [
    "Collection",
    "ColumnBuffer",
    "Execution",
    "FleetTables",
    "OutputLock",
    "Plan",
    "ScannedAdapter",
    "Table",
    "__version__",
    "adapter_format",
    "analyze_adapter",
    "assemble_shards",
    "build_info",
    "compare_adapters",
    "list_adapter",
    "list_checkpoint",
    "module_metrics",
    "names_fit",
    "open_collection",
    "plan_digest",
    "plan_groups",
    "plan_merge",
    "plan_shard_bytes",
    "recover_output",
    "scan_adapters",
    "stored_factors",
    "write_shards",
]

__version__: str

#: Name, dtype (a safetensors name), shape, and the bytes, or what returns them from any thread, or
#: `None` where there are none to read.
_NamedTensor: TypeAlias = tuple[str, str, Sequence[int], Buffer | Callable[[], Buffer] | None]
#: A path; or a path, the file of its weights, and what reads that, from any thread and as often as
#: the adapter is opened.
_AdapterSource: TypeAlias = (
    str
    | os.PathLike[str]
    | tuple[str | os.PathLike[str], str | os.PathLike[str], Callable[[], Sequence[_NamedTensor]]]
)
#: Options by name: those of `lorafast._merge.options`, as a test sees to.
_Options: TypeAlias = Mapping[str, Any]
#: A path; or the name, the config (JSON) and the tensors of a model in memory.
_Base: TypeAlias = str | os.PathLike[str] | tuple[str, str, Sequence[_NamedTensor]]

@type_check_only
class Use(TypedDict):
    name: str
    verdict: Literal["used", "not_needed", "refused"]
    reason: str

@type_check_only
class Account(TypedDict):
    fields: list[Use]
    tensors: list[Use]

@type_check_only
class Range(TypedDict):
    start: int
    end: int

@type_check_only
class Expert(TypedDict):
    index: int
    count: int

@type_check_only
class UpdatePart(TypedDict):
    expert: Expert | None
    outputs: Range | None
    inputs: Range | None
    rows: Range | None

@type_check_only
class UpdateDescription(TypedDict):
    adapter: int
    module: str
    kind: Literal["low_rank", "dora", "vector", "replace"]
    rank: int
    scale: float
    weight: float
    transposed: bool
    part: NotRequired[UpdatePart]
    on: NotRequired[str]
    residual: NotRequired[Literal["largest", "smallest", "leading"]]
    stage: NotRequired[int]

@type_check_only
class TensorDescription(TypedDict):
    name: str
    shape: list[int]
    dtype: str
    output_dtype: str
    shard: str
    action: Literal["merge", "copy", "cast", "rescale"]
    updates: list[UpdateDescription]
    quantised: NotRequired[str]

@type_check_only
class PlannedAdapter(TypedDict):
    path: str
    name: str
    format: str
    tensors: int
    modules: int
    bytes: int
    account: Account

@type_check_only
class Replication(TypedDict):
    layers: int
    order: list[int]

@type_check_only
class ConfigChanges(TypedDict):
    dtype: str | None
    vocabulary: int | None
    layers: Replication | None
    tied: bool | None
    unquantised: bool

@type_check_only
class PlanDescription(TypedDict):
    base: str
    adapters: list[PlannedAdapter]
    strategy: Literal["sequential", "weighted", "average"]
    weights: list[float] | None
    dtype: str
    tensors: list[TensorDescription]
    tensors_merged: int
    tensors_copied: int
    tensors_cast: int
    total_parameters: int
    bytes_to_write: int
    config_changes: ConfigChanges
    warnings: list[str]
    notes: list[str]
    side_files: list[str]
    left_out: list[str]

@type_check_only
class ChangedTensor(TypedDict):
    #: The shard's position, and the tensor's in it.
    place: tuple[int, int]
    name: str
    rows: int
    columns: int
    dtype: str
    output_dtype: str
    #: First rows and ends.
    segments: list[tuple[int, int]]
    work: int
    quantised: bool
    replaced: bool
    shape: list[int]
    updates: int
    residual: bool

@type_check_only
class Product(TypedDict):
    a: bytes
    a_dtype: str
    b: bytes
    b_dtype: str
    rank: int
    outputs: int
    inputs: int
    coefficient: float

@type_check_only
class Operands(TypedDict):
    kind: Literal["low_rank", "dora", "vector", "replace"]
    weight: float
    stage: int
    rows: tuple[int, int]
    transposed: bool
    products: list[Product]
    #: Little-endian float64.
    magnitude: bytes | None
    own: tuple[str, bytes] | None

@type_check_only
class WrittenShard(TypedDict):
    name: str
    bytes: int
    sha256: str

@type_check_only
class Summary(TypedDict):
    bytes_written: int
    seconds: float
    threads: int
    instruction_set: str
    adapter_sha256: list[str]
    base_header_sha256: list[str]
    side_files: list[str]
    left_out: list[str]
    warnings: list[str]

@type_check_only
class Rounding(TypedDict):
    tensor: str
    lost: float
    unmoved: float

@type_check_only
class AdapterRounding(TypedDict):
    adapter: str
    lost: float
    unmoved: float

@type_check_only
class Untouched(TypedDict):
    tensor: str
    sha256: str

@type_check_only
class VerifyOutcome(TypedDict):
    problems: list[str]
    warnings: list[str]
    tensors_copied: int
    tensors_merged: int
    rows_exact: int
    elements: int
    lost: float
    unmoved: float
    rounding: list[Rounding]
    adapters: list[AdapterRounding]
    untouched: list[Untouched]

@type_check_only
class Distance(TypedDict):
    tensors: int
    largest: float
    norm: float
    change: float

@type_check_only
class ListedFile(TypedDict):
    name: str
    bytes: int
    tensors: int

@type_check_only
class ListedTensor(TypedDict):
    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str

@type_check_only
class ListedModule(TypedDict):
    name: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    #: Outputs and inputs.
    shape: list[int]

@type_check_only
class AdapterSummary(TypedDict):
    type: str | None
    base: str | None
    r: int | None
    alpha: float | None
    rslora: bool
    peft_version: str | None
    modules: list[ListedModule]
    features: list[str]
    account: Account

@type_check_only
class Listing(TypedDict):
    kind: Literal["checkpoint", "adapter"]
    path: str
    files: list[ListedFile]
    metadata: dict[str, str]
    tensors: list[ListedTensor]
    total_parameters: int
    total_bytes: int
    config: dict[str, Any] | None
    adapter: AdapterSummary | None
    quantised: dict[str, int]
    warnings: list[str]

@type_check_only
class HistogramCounts(TypedDict):
    edges: list[float]
    counts: list[int]

@type_check_only
class Moments(TypedDict):
    count: int
    non_finite: int
    zeros: int
    zero_share: float
    mean: float
    std: float
    min: float
    max: float
    l1_norm: float
    l2_norm: float
    max_norm: float
    skewness: float
    kurtosis: float
    percentiles: list[float]
    histogram: HistogramCounts | None
    log_histogram: HistogramCounts | None

@type_check_only
class TensorAnalysis(Moments):
    name: str
    dtype: str
    shape: list[int]

@type_check_only
class BaseNorm(TypedDict):
    tensor: str
    norm: float

@type_check_only
class EntryAnalysis(TypedDict):
    threshold: float
    count: int
    non_finite: int
    min: float
    max: float
    max_abs: float
    below: int
    below_share: float
    histogram: HistogramCounts

@type_check_only
class ModuleSpectrum(TypedDict):
    path: str
    kind: str
    block: int | None
    layer: str
    shape: list[int]
    rank: int
    alpha: float
    scaling: float
    a_name: str
    b_name: str
    singular_values: list[float]
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    participation_ratio: float
    effective_rank: float
    energy_effective_rank: float
    k90: int
    k95: int
    k99: int
    numerical_rank: int
    condition: float
    entry_mean: float
    base: BaseNorm | None
    entries: EntryAnalysis | None

@type_check_only
class UpdatesSummary(TypedDict):
    modules: int
    ranks: list[int]
    alphas: list[float]
    scalings: list[float]
    frobenius_norm: float
    max_spectral_norm: float
    median_spectral_norm: float
    mean_effective_rank: float

@type_check_only
class Analysis(TypedDict):
    path: str
    config: dict[str, Any]
    total_bytes: int
    weights: Moments
    tensors: list[TensorAnalysis]
    modules: list[ModuleSpectrum]
    summary: UpdatesSummary
    features: list[str]
    notes: list[str]

@type_check_only
class ComparedPair(TypedDict):
    first: int
    second: int
    inner_product: float
    cosine: float
    relative_difference: float
    sign_agreement: float
    sign_sampled: bool
    sizes: list[list[int]]
    output_phi: list[list[float]]
    output_expected: list[list[float]]
    input_phi: list[list[float]]
    input_expected: list[list[float]]
    output_angles: list[float]
    input_angles: list[float]

@type_check_only
class ComparedModule(TypedDict):
    path: str
    shape: list[int]
    norms: list[float | None]
    ranks: list[int | None]
    pairs: list[ComparedPair]

@type_check_only
class AdapterComparison(TypedDict):
    cosine: list[list[float]]
    modules: list[ComparedModule]
    notes: list[str]

@type_check_only
class Member(TypedDict):
    path: str
    base: str | None
    modules: list[int]
    ranks: list[int]
    bytes: int
    left_out: list[str]

@type_check_only
class Signature(TypedDict):
    file: str
    tensors: str
    scales: str
    is_finite: bool
    norm: float
    tolerance: float
    rank: int

@type_check_only
class Drift(TypedDict):
    effective_rank: float
    change: float | None
    previous: list[float] | None
    last: list[float]

@type_check_only
class BuildInfo(TypedDict):
    version: str
    profile: Literal["debug", "release"]
    target: str
    instruction_set: str
    instruction_sets: list[str]
    amx: bool

@final
class Plan:
    def describe(self) -> PlanDescription: ...
    def execute(
        self,
        output: str | os.PathLike[str],
        options: _Options | None = None,
        *,
        protected: Sequence[str | os.PathLike[str]] = ...,
        progress: Callable[[int, int], object] | None = None,
    ) -> tuple[Summary, OutputLock]: ...
    def changed_tensors(self) -> list[ChangedTensor]: ...
    def replacement(self, place: tuple[int, int]) -> tuple[str, bytes] | None: ...
    def operands(self, place: tuple[int, int], *, weight: Any | None = None) -> list[Operands]: ...
    def begin(
        self, output: str | os.PathLike[str], options: _Options | None = None
    ) -> Execution: ...
    def verify(
        self,
        merged: str | os.PathLike[str],
        *,
        threads: int | None = None,
        full: bool = False,
        split: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> VerifyOutcome: ...
    def of_base_alone(self, *, dtype: str | None = None) -> Plan: ...
    def distance(
        self,
        output: str | os.PathLike[str],
        *,
        threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Distance: ...

@final
class Execution:
    @property
    def total(self) -> int: ...
    def run(
        self,
        places: Set[tuple[int, int]],
        *,
        only: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> None: ...
    def read_rows(self, place: tuple[int, int], first_row: int, buffer: Any) -> None: ...
    def write_rows(self, place: tuple[int, int], first_row: int, buffer: Any) -> None: ...
    def raise_overflow(self, place: tuple[int, int], index: int) -> None: ...
    def finish(self) -> tuple[Summary, OutputLock]: ...
    def abort(self) -> None: ...

@final
class OutputLock:
    def release(self) -> str | None: ...

def plan_merge(
    base: _Base,
    adapters: Sequence[_AdapterSource],
    options: _Options | None = None,
) -> Plan: ...
def plan_digest(plan: Plan) -> str: ...
def plan_groups(plan: Plan) -> list[list[int]]: ...
def plan_shard_bytes(plan: Plan) -> list[int]: ...
def write_shards(
    plan: Plan,
    shards: Sequence[int],
    directory: str | os.PathLike[str],
    *,
    threads: int | None,
    sync: bool,
    progress: Callable[[int, int], object] | None,
) -> list[WrittenShard]: ...
def assemble_shards(
    plan: Plan,
    directory: str | os.PathLike[str],
    written: Sequence[tuple[str, int, str]],
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    sync: bool,
    progress: Callable[[int, int], object] | None,
) -> tuple[Summary, OutputLock]: ...
def names_fit(
    base: _Base,
    adapters: Sequence[_AdapterSource],
) -> bool: ...
def list_checkpoint(path: str | os.PathLike[str]) -> Listing: ...
def list_adapter(adapter: _AdapterSource) -> Listing: ...
def adapter_format(path: str | os.PathLike[str]) -> str | None: ...
def analyze_adapter(
    adapter: _AdapterSource,
    *,
    base: str | os.PathLike[str] | None,
    percentiles: Sequence[float],
    bins: int,
    entries: bool,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> Analysis: ...
def compare_adapters(
    adapters: Sequence[_AdapterSource],
    *,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> AdapterComparison: ...
def build_info() -> BuildInfo: ...

@type_check_only
class Metric(TypedDict):
    name: str
    symbol: str
    unit: str
    doc: str
    integer: bool

_Finding = tuple[str, str, str | None, float | None, str, int]

@final
class ColumnBuffer:
    # Before, the buffer protocol has no name in Python.
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Table:
    @property
    def rows(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def nbytes(self) -> int: ...
    def column(self, name: str) -> tuple[Any, ...]: ...
    def row(self, row: int) -> dict[str, Any]: ...
    def __arrow_c_stream__(self, requested_schema: object | None = None) -> Any: ...

@final
class ScannedAdapter:
    @property
    def modules(self) -> list[str]: ...
    @property
    def features(self) -> list[str]: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def non_finite(self) -> list[tuple[str, int, int]]: ...
    def column(self, name: str) -> list[float] | None: ...
    def with_spectra(
        self, metrics: str, spectra: Sequence[tuple[Sequence[float], float]]
    ) -> ScannedAdapter: ...
    def encode(self) -> tuple[str, bytes]: ...
    @staticmethod
    def decode(metrics: str, details: str, numbers: bytes) -> ScannedAdapter: ...

@final
class FleetTables:
    def __new__(cls, metrics: str, schema_version: int) -> FleetTables: ...
    def positions(self) -> list[int]: ...
    def add(self, position: int, adapter: ScannedAdapter, findings: Sequence[_Finding]) -> None: ...
    def add_error(self, position: int | None, path: str, reason: str) -> None: ...
    def finish(self, paths: Sequence[str], names: Sequence[str]) -> tuple[Table, Table]: ...
    def findings(self, of_fleet: Sequence[tuple[int | None, _Finding]]) -> Table: ...
    def errors(self) -> Table: ...

def module_metrics() -> list[Metric]: ...
def scan_adapters(
    sources: Sequence[_AdapterSource],
    *,
    metrics: str,
    threads: int | None,
    receive: Callable[[list[tuple[int, ScannedAdapter | Exception]], int, int], object],
) -> None: ...
def stored_factors(
    adapter: _AdapterSource,
) -> list[tuple[tuple[int, int, int], float, tuple[str, bytes], tuple[str, bytes]]]: ...

@final
class Collection:
    def members(self) -> list[Member]: ...
    def modules(self) -> list[tuple[str, int, int]]: ...
    def groups(self, by_shape_alone: bool) -> list[tuple[str, list[int]]]: ...
    def work(self, groups: Sequence[Sequence[int]]) -> int: ...
    def products(
        self,
        groups: Sequence[Sequence[int]],
        *,
        precision: str,
        per_module: bool,
        memory: int,
        cache: str | os.PathLike[str] | None,
        threads: int | None,
        progress: Callable[[int, int], object] | None,
    ) -> tuple[bytearray, list[bytearray], int, tuple[float, float], str | None]: ...
    def stacked(
        self,
        module: int,
        members: Sequence[int],
        *,
        precision: str,
        threads: int | None,
    ) -> tuple[list[int], list[int], list[float], bytearray, bytearray]: ...
    def signatures(
        self,
        members: Sequence[int],
        *,
        threads: int | None,
        progress: Callable[[int, int], object] | None,
    ) -> list[tuple[Signature | Exception, bytearray]]: ...
    def relations(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        threads: int | None,
        progress: Callable[[int, int], object] | None,
    ) -> list[dict[str, Any]]: ...
    def combination_norm(
        self, target: int, terms: Sequence[tuple[int, float]], *, threads: int | None
    ) -> float: ...
    def drift(
        self,
        order: Sequence[int],
        *,
        threads: int | None,
        progress: Callable[[int, int], object] | None,
    ) -> list[Drift]: ...

def open_collection(
    adapters: Sequence[_AdapterSource],
    *,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[Collection, list[tuple[int, Exception]]]: ...
def recover_output(
    output: str | os.PathLike[str],
) -> Literal["nothing", "cleared", "finished", "taken_back", "kept"]: ...
