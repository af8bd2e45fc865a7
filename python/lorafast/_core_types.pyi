"""The dictionaries that cross from the Rust core, for type checkers: there is no such module."""

from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, type_check_only

from lorafast._types import AdapterFormat, Strategy

#: What kind of layer a module is.
LayerKind: TypeAlias = Literal["linear", "embedding", "convolution"]
#: What a component of a model of diffusion does.
ComponentKind: TypeAlias = Literal["denoiser", "text_encoder", "vae", "other"]
#: How updates change a weight.
UpdateKind: TypeAlias = Literal["low_rank", "dora", "vector", "replace", "transform"]
#: What the core's products are made with.
InstructionSet: TypeAlias = Literal["portable", "neon", "avx2", "avx512", "avx512_bf16", "amx"]

@type_check_only
class Cleaned(TypedDict):
    removed: list[str]
    holds_model: bool

@type_check_only
class Use(TypedDict):
    name: str
    use: Literal["used", "not_needed", "refused"]
    reason: str

@type_check_only
class Coverage(TypedDict):
    fields: list[Use]
    tensors: list[Use]
    #: Files of weights in the adapter's directory.
    files: list[Use]

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
    kind: UpdateKind
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
    action: Literal["merge", "replace", "repeat", "copy", "cast", "rescale"]
    adapter: NotRequired[int]
    origin: NotRequired[str]
    updates: list[UpdateDescription]
    quantised: NotRequired[str]

@type_check_only
class PlannedAdapter(TypedDict):
    path: str
    name: str
    format: AdapterFormat
    #: What it calls the model that it was trained on.
    base_model: str | None
    tensors: int
    modules: int
    bytes: int
    coverage: Coverage

@type_check_only
class Replication(TypedDict):
    layers: int
    order: list[int]

@type_check_only
class TaskHead(TypedDict):
    #: The class of transformers.
    architecture: str | None
    labels: int
    names: dict[str, str] | None

@type_check_only
class ConfigChanges(TypedDict):
    dtype: str | None
    vocabulary: int | None
    layers: Replication | None
    tied: bool | None
    head: TaskHead | None
    unquantised: bool

@type_check_only
class PlannedComponent(TypedDict):
    #: Its folder in a pipeline, its prefix in a single file, nothing where it is all of the base.
    name: str
    kind: ComponentKind
    class_name: str | None
    tensors_changed: int

@type_check_only
class StoreRequests(TypedDict):
    requests: int
    bytes: int

@type_check_only
class PlanDescription(TypedDict):
    base: str
    components: list[PlannedComponent]
    adapters: list[PlannedAdapter]
    strategy: Strategy
    #: What the strategy was given, if anything.
    strategy_options: NotRequired[dict[str, float | bool]]
    #: What random masks depend on, where there are any.
    seed: NotRequired[int]
    weights: list[float | dict[str, float]] | None
    #: Where it is not the default.
    precision: NotRequired[Literal["exact"]]
    dtype: Literal["auto", "float16", "bfloat16", "float32"]
    tensors: list[TensorDescription]
    tensors_merged: int
    tensors_replaced: int
    tensors_repeated: int
    tensors_copied: int
    tensors_cast: int
    total_parameters: int
    bytes_to_write: int
    #: What is asked of stores beside the headers, where anything lies in one.
    reads: NotRequired[StoreRequests]
    config_changes: ConfigChanges
    warnings: list[str]
    notes: list[str]
    side_files: list[str]
    file_origins: dict[str, str]
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
    staged_whole: bool
    exact: bool
    only_adds: bool

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
    kind: UpdateKind
    weight: float
    stage: int
    rows: tuple[int, int]
    transposed: bool
    products: list[Product]
    #: Little-endian float64.
    magnitude: bytes | None
    base_override: tuple[str, bytes] | None

@type_check_only
class WrittenShard(TypedDict):
    name: str
    bytes: int
    sha256: str
    rounding: tuple[float, float, int, int, int]

@type_check_only
class RoundingLoss(TypedDict):
    lost: float
    unmoved: float
    #: How many values were looked at.
    values: int

@type_check_only
class Summary(TypedDict):
    bytes_written: int
    seconds: float
    threads: int
    instruction_set: InstructionSet
    adapter_sha256: list[str]
    base_header_sha256: list[str]
    side_files: list[str]
    file_origins: dict[str, str]
    left_out: list[str]
    rounding: RoundingLoss | None
    #: Where weights are real numbers that are rounded once.
    recomputed: Recomputed | None
    shard_sha256: dict[str, str] | None
    recipes: dict[str, WrittenRecipe]
    kept: list[str]
    warnings: list[str]

@type_check_only
class Recomputed(TypedDict):
    near_ties: int
    in_integers: int

@type_check_only
class FileMark(TypedDict):
    bytes: int
    inode: int
    modified: int
    changed: int

@type_check_only
class WrittenRecipe(TypedDict):
    recipe: str
    file: FileMark
    rounding: tuple[float, float, int, int, int]

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
    tensors_replaced: int
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
    kind: LayerKind
    rank: int
    #: `None` where nothing tells it.
    alpha: float | None
    #: Likewise.
    scaling: float | None
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
    algorithm: str | None
    trainer: str | None
    family: str | None
    components: list[str]
    scale: str | None
    needs: list[str]
    modules: list[ListedModule]
    features: list[str]
    notes: list[str]
    coverage: Coverage

@type_check_only
class ListedComponent(TypedDict):
    #: As in a plan.
    name: str
    kind: ComponentKind
    class_name: str | None
    tensors: int
    parameters: int
    bytes: int
    #: How many tensors have each type.
    dtypes: dict[str, int]

@type_check_only
class Conversion(TypedDict):
    source_format: AdapterFormat
    target_format: AdapterFormat
    modules: int
    max_error: float | None
    lost: list[str]
    notes: list[str]
    files: list[str]

class AlgebraModule(TypedDict):
    shape: list[int]
    source_rank: int
    rank: int
    kept: float
    error: float
    norm: float
    singular_values: list[float]
    coefficients: list[float] | None
    expert_ranks: list[int] | None

class AlgebraBudget(TypedDict):
    measure: Literal["ranks", "parameters", "bytes"]
    amount: int
    spent: int
    gap: float

class AlgebraResult(TypedDict):
    target_format: AdapterFormat
    dtype: str
    modules: dict[str, AlgebraModule]
    error: float
    budget: AlgebraBudget | None
    lost: list[str]
    notes: list[str]
    bytes: int
    files: list[str]

class ExtractedModule(TypedDict):
    floor: float
    mean_floor: float
    energy_above: float
    certificate: float

class ExtractPlan(TypedDict):
    digest: str
    #: Parameters that are not finished, and the bytes of each.
    left: list[tuple[str, int]]

class ExtractResult(AlgebraResult):
    extraction: dict[str, ExtractedModule]
    saved: list[str]
    unchanged: int
    resumed: int

class Listing(TypedDict):
    kind: Literal["checkpoint", "pipeline", "adapter"]
    format: str | None
    path: str
    files: list[ListedFile]
    metadata: dict[str, str]
    tensors: list[ListedTensor]
    components: list[ListedComponent]
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
    change: float | None

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
    kind: LayerKind
    block: int | None
    layer: str
    shape: list[int]
    rank: int
    alpha: float
    scaling: float
    zero_cause: str | None
    rescaled: bool
    made_of_weight: bool
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
    base: str | None
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
    family: int

@type_check_only
class Signature(TypedDict):
    file: str
    tensors: str
    scales: str
    is_finite: bool
    changes_nothing: bool
    norm: float
    tolerance: float
    rank: int

@type_check_only
class Relation(TypedDict):
    cosine: float
    norms: tuple[float, float]
    difference: float
    factor: float
    scaled_difference: float
    truncation_factor: float | None
    truncation_difference: float | None
    kept: float | None
    other_difference: str | None

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
    instruction_set: InstructionSet
    instruction_sets: list[InstructionSet]
    amx: bool

@type_check_only
class Metric(TypedDict):
    name: str
    symbol: str
    unit: str
    doc: str
    integer: bool
