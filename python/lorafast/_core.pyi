"""The Rust core's Python face. Paths, options and numbers cross it; tensors do not.

What crosses as plain objects has its shape in the dictionaries of `_core_types.pyi`, which are type
checkers' alone and have their names here too; a test holds them against what the core returns.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, TypeAlias, final

from typing_extensions import Buffer

from lorafast._core_types import *
from lorafast._types import AdapterFormat, Metrics, Severity, SumPrecision

__all__ = [
    "Collection",
    "ColumnBuffer",
    "Execution",
    "FleetTables",
    "IoMemory",
    "OutputLock",
    "Plan",
    "ScannedAdapter",
    "StoreLocation",
    "Table",
    "TensorBytes",
    "View",
    "ViewPart",
    "ViewStream",
    "__version__",
    "adapter_format",
    "analyze_adapter",
    "assemble_shards",
    "bake_adapter",
    "build_info",
    "combine_adapters",
    "compare_adapters",
    "convert_adapter",
    "extract_adapter",
    "extract_part",
    "holds_adapter",
    "identify_path",
    "list_adapter",
    "list_checkpoint",
    "module_metrics",
    "names_fit",
    "open_collection",
    "open_view",
    "plan_base",
    "plan_digest",
    "plan_extraction",
    "plan_groups",
    "plan_merge",
    "plan_shards",
    "recover_output",
    "resize_adapter",
    "scan_adapters",
    "stored_factors",
    "write_adapter",
    "write_shards",
]

__version__: str

#: Name, dtype (a safetensors name), shape, and the bytes, or what returns them from any thread, or
#: `None` where there are none to read.
_NamedTensor: TypeAlias = tuple[str, str, Sequence[int], Buffer | Callable[[], Buffer] | None]
#: A path, or a place in a store.
_Place: TypeAlias = str | os.PathLike[str] | StoreLocation
#: One of these; or that, the file of its weights, and what reads it, from any thread and as often
#: as the adapter is opened.
_FoundSource: TypeAlias = (
    _Place | tuple[_Place, str | os.PathLike[str], Callable[[], Sequence[_NamedTensor]]]
)
#: The same, or with the name of the adapter's format.
_AdapterSource: TypeAlias = _FoundSource | tuple[_FoundSource, str]
#: Options by name: those of `lorafast._merge`, as a test sees to.
_Options: TypeAlias = Mapping[str, Any]
#: A path, or a place in a store; or the name, the config (JSON) and the tensors of a model in
#: memory.
_Base: TypeAlias = _Place | tuple[str, str, Sequence[_NamedTensor]]

@final
class IoMemory:
    def __new__(cls, bytes: int = ...) -> IoMemory: ...

@final
class StoreLocation:
    def __new__(
        cls,
        url: str,
        options: Mapping[str, str],
        *,
        provider: Callable[[], tuple[Mapping[str, str], int | float | None]] | None = None,
        memory: IoMemory | None = None,
    ) -> StoreLocation: ...
    @property
    def url(self) -> str: ...
    def names(self) -> list[str]: ...
    def read(self, name: str | None = None) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def clean(self) -> Cleaned: ...

@final
class Plan:
    def describe(self) -> PlanDescription: ...
    def execute(
        self,
        output: str | os.PathLike[str] | StoreLocation,
        options: _Options | None = None,
        *,
        protected: Sequence[str | os.PathLike[str]] = ...,
        progress: Callable[[int, int], object] | None = None,
    ) -> tuple[Summary, OutputLock]: ...
    def changed_tensors(self) -> list[ChangedTensor]: ...
    def replacement(self, place: tuple[int, int]) -> tuple[str, bytes] | None: ...
    def operands(self, place: tuple[int, int], *, weight: Any | None = None) -> list[Operands]: ...
    def begin(
        self,
        output: str | os.PathLike[str] | StoreLocation,
        options: _Options | None = None,
        *,
        protected: Sequence[str | os.PathLike[str]] = ...,
    ) -> Execution: ...
    def verify(
        self,
        merged: _Base,
        *,
        threads: int | None = None,
        full: bool = False,
        split: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> VerifyOutcome: ...
    def verify_part(
        self,
        merged: str | os.PathLike[str],
        part: tuple[int, int],
        *,
        threads: int | None = None,
        full: bool = False,
        split: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Any]: ...
    def verify_found(
        self, merged: str | os.PathLike[str], found: Sequence[Any]
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
    # Buffers; NumPy's arrays are typed as such from Python 3.12 on.
    def read_rows(self, place: tuple[int, int], first_row: int, buffer: Any) -> None: ...
    def write_rows(self, place: tuple[int, int], first_row: int, buffer: Any) -> None: ...
    def measure_rounding(
        self, place: tuple[int, int], before: Any, exact: Any, written: Any, *, is_change: bool
    ) -> None: ...
    def decide(self, place: tuple[int, int], first_row: int, source: Any, target: Any) -> None: ...
    def raise_overflow(self, place: tuple[int, int], index: int) -> None: ...
    def verify(
        self,
        *,
        threads: int | None = None,
        split: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> VerifyOutcome: ...
    def finish(self) -> tuple[Summary, OutputLock]: ...
    def discard(self) -> None: ...
    def abort(self) -> None: ...

@final
class OutputLock:
    def release(self) -> str | None: ...

@final
class TensorBytes:
    def __len__(self) -> int: ...
    # Before, the buffer protocol has no name in Python.
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

#: A tensor's dtype (a safetensors name), its shape and its bytes.
_TensorValue: TypeAlias = tuple[str, list[int], TensorBytes]

@final
class View:
    def names(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def configs(self) -> dict[str, bytes]: ...
    def read(self, name: str) -> _TensorValue | None: ...
    def part(self, name: str) -> ViewPart | None: ...
    def stream(self) -> ViewStream: ...
    def changed_from(self, other: View) -> ViewStream: ...
    def shard_digests(self, *, progress: Callable[[int, int], object] | None) -> dict[str, str]: ...
    def close(self) -> None: ...

@final
class ViewPart:
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...
    def read(self, ranges: Sequence[tuple[int, int]]) -> TensorBytes: ...

@final
class ViewStream:
    def __len__(self) -> int: ...
    def __iter__(self) -> ViewStream: ...
    def __next__(self) -> tuple[str, _TensorValue]: ...
    def close(self) -> None: ...

def open_view(plan: Plan, *, threads: int | None = None) -> View: ...
def plan_base(base: _Base, options: _Options | None = None) -> Plan: ...
def plan_merge(
    base: _Base,
    adapters: Sequence[_AdapterSource],
    options: _Options | None = None,
) -> Plan: ...
def plan_digest(plan: Plan) -> str: ...
def plan_groups(plan: Plan) -> list[list[int]]: ...
def plan_shards(plan: Plan) -> list[tuple[str, int]]: ...
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
    written: Sequence[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    sync: bool,
    card: str | None,
    adopt: bool,
    progress: Callable[[int, int], object] | None,
) -> tuple[Summary, OutputLock]: ...
def names_fit(
    base: _Base,
    adapters: Sequence[_AdapterSource],
) -> bool: ...
def list_checkpoint(path: _Base) -> Listing: ...
def list_adapter(adapter: _AdapterSource) -> Listing: ...
def adapter_format(path: _AdapterSource) -> AdapterFormat | None: ...
def holds_adapter(path: _AdapterSource) -> bool: ...
def write_adapter(
    adapter: _AdapterSource,
    target: str | os.PathLike[str],
    *,
    format: str,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
) -> None: ...
def convert_adapter(
    adapter: _AdapterSource,
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    options: str,
) -> Conversion: ...
def combine_adapters(
    adapters: Sequence[_AdapterSource],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    options: str,
    progress: Callable[[int, int], object] | None,
) -> AlgebraResult: ...
def resize_adapter(
    adapter: _AdapterSource,
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    options: str,
    progress: Callable[[int, int], object] | None,
) -> AlgebraResult: ...
def bake_adapter(
    adapter: _AdapterSource,
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    options: str,
    progress: Callable[[int, int], object] | None,
) -> AlgebraResult: ...
def extract_adapter(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: str,
    parts: Sequence[str | os.PathLike[str]],
    progress: Callable[[int, int], object] | None,
) -> ExtractResult: ...
def plan_extraction(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: str,
    parts: Sequence[str | os.PathLike[str]],
) -> ExtractPlan: ...
def extract_part(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    digest: str,
    names: Sequence[str],
    *,
    options: str,
) -> None: ...
def identify_path(path: str | os.PathLike[str]) -> str | None: ...
def analyze_adapter(
    adapter: _AdapterSource,
    *,
    base: str | os.PathLike[str] | None,
    percentiles: Sequence[float],
    bins: int,
    entries: bool,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
    alpha: float | None = None,
    scale: float | None = None,
) -> Analysis: ...
def compare_adapters(
    adapters: Sequence[_AdapterSource],
    *,
    modules: bool,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> AdapterComparison: ...
def build_info() -> BuildInfo: ...

_Finding: TypeAlias = tuple[Severity, str, str | None, float | None, str, int]

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
    @property
    def zero_causes(self) -> list[tuple[str, str]]: ...
    @property
    def rescaled(self) -> list[str]: ...
    def column(self, name: str) -> list[float] | None: ...
    def with_spectra(
        self, metrics: Metrics, spectra: Sequence[tuple[Sequence[float], float, str | None]]
    ) -> ScannedAdapter: ...
    def encode(self) -> tuple[str, bytes]: ...
    @staticmethod
    def decode(metrics: Metrics, details: str, numbers: bytes) -> ScannedAdapter: ...

@final
class FleetTables:
    def __new__(cls, metrics: Metrics, schema_version: int) -> FleetTables: ...
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
    metrics: Metrics,
    threads: int | None,
    receive: Callable[[list[tuple[int, ScannedAdapter | Exception]], int, int], object],
) -> None: ...
def stored_factors(
    adapter: _AdapterSource,
) -> list[tuple[tuple[int, int, int], float, tuple[str, bytes], tuple[str, bytes], str | None]]: ...

@final
class Collection:
    def members(self) -> list[Member]: ...
    def modules(self) -> list[tuple[str, int, int]]: ...
    def groups(self, by_shape_alone: bool) -> list[tuple[str, list[int]]]: ...
    def reason_apart(self, x: int, y: int) -> str | None: ...
    def work(self, groups: Sequence[Sequence[int]]) -> int: ...
    def products(
        self,
        groups: Sequence[Sequence[int]],
        *,
        precision: SumPrecision,
        per_module: bool,
        memory: int,
        cache: str | os.PathLike[str] | None,
        threads: int | None,
        progress: Callable[[int, int], object] | None,
    ) -> tuple[bytearray, list[bytearray], int, tuple[float, float], str | None]: ...
    def blocks(
        self,
        groups: Sequence[Sequence[int]],
        *,
        precision: SumPrecision,
        per_module: bool,
        memory: int,
        ranks: int,
    ) -> tuple[str, list[tuple[int, list[int], list[int]]]]: ...
    def block(
        self,
        groups: Sequence[Sequence[int]],
        index: int,
        digest: str,
        *,
        precision: SumPrecision,
        per_module: bool,
        memory: int,
        ranks: int,
        threads: int | None,
    ) -> tuple[bytearray, list[bytearray]]: ...
    def stacked(
        self,
        module: int,
        members: Sequence[int],
        *,
        precision: SumPrecision,
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
    ) -> list[Relation]: ...
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
