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
            source's update and ΔW' what was read back. Of DoRA ΔW is W' - W on the base's weight,
            where there is a base; without one the product and the magnitudes m count apart
            (‖m - m'‖/‖m‖), and `notes` say so. `None` where magnitudes were left out without a
            base, which alone could tell their share.
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
