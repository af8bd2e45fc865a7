"""What became of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafast._results import Result


@dataclass(frozen=True, repr=False)
class ConversionReport(Result):
    """An adapter that was written in another format, and how near that is to what it was.

    Attributes:
        adapter: the path of the source.
        output: the file or the directory that was written.
        source_format: the name of the source's format.
        target_format: the name of the format that was written.
        modules: the number of modules that were written.
        max_error: the largest ‖ΔW - ΔW'‖/‖ΔW‖ (Frobenius norms) of any module, ΔW being the
            source's update and ΔW' what was read back; of DoRA's magnitudes m, ‖m - m'‖/‖m‖ counts
            as well. `None` where magnitudes were left out, whose share only the base could tell.
        lost: what was left out, in words; empty unless `lossy`, but for a file's metadata.
        notes: what else a user would want to know.
        files: the paths of the files that were written.
    """

    _kind = "conversion"

    adapter: str
    output: str
    source_format: str
    target_format: str
    modules: int
    max_error: float | None
    lost: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]

    def _plain(self) -> dict[str, Any]:
        from lorafast._io.plain import fields_of

        found = fields_of(self)
        return {name: list(one) if type(one) is tuple else one for name, one in found.items()}
