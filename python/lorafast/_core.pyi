"""The Rust core's Python face. Paths, options and numbers cross it; tensors do not."""

import os
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, TypeAlias, TypedDict, final

from typing_extensions import Buffer

__all__ = [
    "Collection",
    "ColumnBuffer",
    "Execution",
    "FleetTables",
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
    "recover_output",
    "scan_adapters",
    "stored_factors",
    "write_shards",
]

__version__: str

#: Name, dtype (a safetensors name), shape, and the bytes or, where nobody will read them, `None`.
_NamedTensor: TypeAlias = tuple[str, str, Sequence[int], Buffer | None]
#: A path; or a path, the file of its weights, and what reads that, from any thread and as often as
#: the adapter is opened.
_AdapterSource: TypeAlias = (
    str
    | os.PathLike[str]
    | tuple[str | os.PathLike[str], str | os.PathLike[str], Callable[[], Sequence[_NamedTensor]]]
)
#: A path; or the name, the config (JSON) and the tensors of a model in memory.
_Base: TypeAlias = str | os.PathLike[str] | tuple[str, str, Sequence[_NamedTensor]]

@final
class Plan:
    def describe(self) -> dict[str, Any]: ...
    def execute(
        self,
        output: str | os.PathLike[str],
        *,
        threads: int | None = None,
        overwrite: bool = False,
        sync: bool = True,
        instruction_set: str | None = None,
        protected: Sequence[str | os.PathLike[str]] = ...,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, Any]: ...
    def changed_tensors(self) -> list[dict[str, Any]]: ...
    def replacement(self, place: tuple[int, int]) -> tuple[str, bytes] | None: ...
    def operands(
        self, place: tuple[int, int], *, weight: Any | None = None
    ) -> list[dict[str, Any]]: ...
    def begin(
        self,
        output: str | os.PathLike[str],
        *,
        threads: int | None = None,
        overwrite: bool = False,
        sync: bool = True,
    ) -> Execution: ...
    def verify(
        self,
        merged: str | os.PathLike[str],
        *,
        threads: int | None = None,
        full: bool = False,
        split: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, Any]: ...
    def of_base_alone(self, *, dtype: str | None = None) -> Plan: ...
    def distance(
        self,
        output: str | os.PathLike[str],
        *,
        threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, Any]: ...

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
    def finish(self) -> dict[str, Any]: ...
    def abort(self) -> None: ...

def plan_merge(
    base: _Base,
    adapters: Sequence[_AdapterSource],
    *,
    strategy: str,
    weights: Sequence[float] | None,
    dtype: str | None,
    allow: Sequence[str],
    compat: str | None,
    subtract: bool,
    expert_layout: str | None = None,
    renames: str | None = None,
) -> Plan: ...
def plan_digest(plan: Plan) -> str: ...
def plan_groups(plan: Plan) -> list[list[int]]: ...
def write_shards(
    plan: Plan,
    shards: Sequence[int],
    directory: str | os.PathLike[str],
    *,
    threads: int | None,
    sync: bool,
    progress: Callable[[int, int], object] | None,
) -> list[dict[str, Any]]: ...
def assemble_shards(
    plan: Plan,
    directory: str | os.PathLike[str],
    written: Sequence[tuple[str, int, str]],
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    sync: bool,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Any]: ...
def names_fit(
    base: _Base,
    adapters: Sequence[_AdapterSource],
) -> bool: ...
def list_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]: ...
def list_adapter(adapter: _AdapterSource) -> dict[str, Any]: ...
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
) -> dict[str, Any]: ...
def compare_adapters(
    adapters: Sequence[_AdapterSource],
    *,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Any]: ...
def build_info() -> dict[str, Any]: ...

class _Metric(TypedDict):
    name: str
    symbol: str
    unit: str
    doc: str
    integer: bool

_Finding = tuple[str, str, str | None, float | None, str, int]

@final
class ColumnBuffer:
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

def module_metrics() -> list[_Metric]: ...
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
    def members(self) -> list[dict[str, Any]]: ...
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
    ) -> list[tuple[dict[str, Any] | Exception, bytearray]]: ...
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
    ) -> list[dict[str, Any]]: ...

def open_collection(
    adapters: Sequence[_AdapterSource],
    *,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[Collection, list[tuple[int, Exception]]]: ...
def recover_output(
    output: str | os.PathLike[str],
) -> Literal["nothing", "cleared", "finished", "taken_back", "kept"]: ...
