"""From directories, globs and lists to the adapters that lie in them."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafast import _core
from lorafast._errors import AdapterError, CheckpointError, LorafastError
from lorafast._fleet.exclude import Exclusion
from lorafast._fleet.members import common_root
from lorafast._io.paths import expand, find
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    ARCHIVE,
    ARCHIVED_WEIGHTS,
    CONFIG,
    GGUF,
    LEFTOVERS,
    MLX_WEIGHTS,
    PICKLED_WEIGHTS,
    PICKLES,
    WEIGHTS,
    locate_all,
    what_is,
)
from lorafast._io.strangers import read_header, reason_of
from lorafast._results import shown
from lorafast._types import Source

#: Any of these makes the directory that it lies in an adapter, even if the others are missing.
MARKS = frozenset({CONFIG, WEIGHTS, PICKLED_WEIGHTS, MLX_WEIGHTS, ARCHIVED_WEIGHTS})
#: What makes a directory a model's, whose weights files are none of adapters.
MODEL_MARKS = ("config.json", "model_index.json")
#: In the tensors' names of adapters, whatever saved them.
ADAPTER_NAMES = re.compile(
    r"lora|hada_w|lokr_w|ia3|oft_|vera_lambda|:(up|down)\b|\.alpha\b|dora_scale"
    r"|^w_[ab]_\d{3}$|\.adapter\.linear_(in|out)\b|\.(diff|diff_b|w_norm|b_norm|on_input|[ab][12]\.weight)$",
    re.IGNORECASE,
)

#: What a path's part is compared by, one after another.
PIECES = re.compile(r"\d+|\D+")


@shown
@dataclass(frozen=True)
class ScanError:
    """Something that could not be read.

    Attributes:
        path: the adapter, file or directory.
        reason: why, in one sentence.
    """

    path: Path
    reason: str


@dataclass
class Discovery:
    """What was found.

    Attributes:
        adapters: adapters' directories, and weights files that stand alone; each once, in the
            order of the paths given and by name within each. Texts, since thousands of paths as
            objects take five times the memory.
        errors: what could not be looked into, or was named and is not there.
        searched: the directories that were searched with all below them.
        root: the directory that names are paths below: the one that was given, that of a glob or
            of a file, and of several what holds them all.
    """

    adapters: list[str]
    errors: list[ScanError] = field(default_factory=list)
    searched: list[Path] = field(default_factory=list)
    root: str = os.curdir


def discover(paths: Source | Iterable[Source], exclude: Sequence[str] = ()) -> Discovery:
    """Finds adapters.

    A directory is searched with all that lies below it, links followed; what is reached in two
    ways is found once, and hidden directories are passed over. An adapter is a directory that
    holds `adapter_config.json` or weights under PEFT's names, whether they are sound or not, or a
    weights file without a config whose tensors are named as adapters' are, or a GGUF file that says
    that it is one.

    Args:
        paths: directories, adapters, weights files, globs (`runs/*/final`, `**` for any depth),
            ids of the hub's repositories or of folders in them, or any number of these.
        exclude: patterns of paths below the root that are left out, with all below them.

    Raises:
        ValueError: no path was given, or a pattern is empty.
        FileNotFoundError: the only path, or every path, is not there.
        AdapterError: there is no adapter, and nothing that went wrong explains it.
    """
    sources = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not sources:
        raise ValueError("no path was given; name a directory that holds adapters")
    errors: list[ScanError] = []
    # Why ids on the hub could not be fetched, by themselves.
    unfetched: dict[Source, str] = {}
    sources = [_fetched(source, unfetched, alone=len(sources) == 1) for source in sources]
    root = common_root([_root_of(source) for source in sources])
    excluded = Exclusion(exclude, root)
    search = _Search(errors, excluded)
    missing = 0
    for source in sources:
        matches = _expand(source)
        if not matches:
            missing += 1
            what = "Nothing matches" if _is_glob(source) else "No such file or directory"
            errors.append(ScanError(Path(source), unfetched.get(source, what)))
        for path in matches:
            search.add(path, named=len(sources) == 1 and path == Path(expand(source)))
    if missing == len(sources):
        raise FileNotFoundError(2, errors[0].reason, os.fspath(sources[0]))
    found = Discovery(search.adapters, errors, search.searched, root)
    if not found.adapters and not found.errors:
        names = ", ".join(os.fspath(source) for source in sources[:3])
        more = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
        # Of one directory it can be said what it is instead.
        found_there = _core.identify_path(expand(sources[0])) if len(sources) == 1 else None
        beside = " beside what is excluded" if excluded else ""
        one_is = f"one is a directory with {CONFIG} and {WEIGHTS}"
        of = f"; it {found_there}" if found_there else f"; {one_is}"
        raise AdapterError(f"{names}{more}: no adapter was found{beside}{of}")
    return found


def natural(path: str | Path) -> str:
    """A key that puts `checkpoint-500` before `checkpoint-1000`, small for thousands of paths."""
    text = os.fspath(path)
    parts = text.removeprefix(os.sep).split(os.sep)
    if text.startswith(os.sep):
        parts.insert(0, os.sep)
    return "\0".join(PIECES.sub(_sortable, part) for part in parts)


def _sortable(piece: re.Match[str]) -> str:
    """Numbers before texts; of numbers those with fewer digits first."""
    text = piece.group()
    if not text.isdecimal():
        return f"\2{text}"
    digits = str(int(text))
    return f"\1{len(digits):03}{digits}"


def _fetched(source: Source, reasons: dict[Source, str], *, alone: bool) -> Source:
    """What a source names; of an id on the hub, the folder of all adapters in it.

    Args:
        source: the path or the id.
        reasons: takes why an id could not be fetched.
        alone: raise what the hub says, as there is nothing else to go on with.
    """
    if not isinstance(source, str) or os.path.lexists(expand(source)) or _is_glob(source):
        return source
    try:
        fetched = locate_all(source, ADAPTER_PATTERNS)
    except (LorafastError, OSError) as error:
        if alone and not isinstance(error, FileNotFoundError):
            raise
        reasons[source] = reason_of(error)
        return source
    return source if fetched is None else fetched


def _is_glob(source: Source) -> bool:
    return glob.has_magic(os.fspath(source))


def _root_of(source: Source) -> str:
    """The directory that a source's adapters are named below."""
    path = expand(source)
    if os.path.isdir(path):
        return path
    if not os.path.lexists(path) and glob.has_magic(path):
        while glob.has_magic(path):
            path = os.path.dirname(path)
        return path or os.curdir
    return os.path.dirname(path) or os.curdir


def _expand(source: Source) -> list[Path]:
    """The paths that a source names. One that is there is itself, whatever its characters."""
    path = Path(expand(source))
    if os.path.lexists(path):
        return [path]
    if not _is_glob(source):
        return []
    # Path.glob wants a pattern relative to a directory; what is given may be absolute or not.
    matches = glob.iglob(os.fspath(path), recursive=True)
    return sorted({Path(match) for match in matches}, key=natural)


class _Search:
    """One walk over everything that was named; remembers where it has been."""

    def __init__(self, errors: list[ScanError], excluded: Exclusion) -> None:
        self.adapters: list[str] = []
        self.searched: list[Path] = []
        self._errors = errors
        self._excluded = excluded
        self._visited: set[int] = set()
        self._taken: set[int] = set()

    def add(self, path: Path, *, named: bool) -> None:
        """What a path is, or what lies below it; `named` is the one that was asked for."""
        try:
            found = find(path)
            if found is None:
                # Gone since it was listed.
                raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        except OSError as error:
            self._errors.append(ScanError(path, reason_of(error)))
            return
        is_directory = stat.S_ISDIR(found.st_mode)
        if self._excluded(os.fspath(path), is_directory=is_directory):
            return
        if is_directory:
            # Thousands of paths are texts, which take a fifth of the memory and of the time.
            adapters = sorted(self._walk(os.fspath(path)), key=natural)
            self.searched.append(path)
        elif path.name in MARKS:
            adapters = [os.fspath(path.parent)]
            if self._excluded(adapters[0], is_directory=True):
                return
        elif path.suffix in PICKLES | {".safetensors", ARCHIVE} or (
            path.suffix.lower() == GGUF and (named or _core.holds_adapter(path))
        ):
            adapters = [os.fspath(path)]
        else:
            # What a glob sweeps in beside the adapters is not meant.
            if named:
                self._errors.append(ScanError(path, what_is(path)))
            return
        for adapter in adapters:
            if self._is_new(adapter):
                self.adapters.append(adapter)

    def _is_new(self, adapter: str) -> bool:
        try:
            identity = _identity(adapter)
        except OSError as error:
            self._errors.append(ScanError(Path(adapter), _why(adapter, error)))
            return False
        if identity in self._taken:
            return False
        self._taken.add(identity)
        return True

    def _walk(self, root: str) -> Iterator[str]:
        # Links come last, so that what is reached in two ways keeps its own name.
        waiting = [root]
        links: list[str] = []
        while waiting or links:
            directory = waiting.pop() if waiting else links.pop()
            try:
                identity = _identity(directory)
                if identity in self._visited:
                    continue
                self._visited.add(identity)
                with os.scandir(directory) as listing:
                    entries = list(listing)
            except OSError as error:
                self._errors.append(ScanError(Path(directory), reason_of(error)))
                continue
            files = []
            for entry in entries:
                if _is_directory(entry):
                    if not entry.name.startswith("."):
                        below = entry.path.removeprefix(f".{os.sep}")
                        if not self._excluded(below, is_directory=True):
                            (links if entry.is_symlink() else waiting).append(below)
                else:
                    files.append(entry.name)
            yield from self._adapters_in(directory, files)

    def _adapters_in(self, directory: str, files: list[str]) -> Iterator[str]:
        if not MARKS.isdisjoint(files):
            yield directory
            return
        is_model = any(mark in files for mark in MODEL_MARKS)
        for name in files:
            suffix = Path(name).suffix.lower()
            path = Path(directory, name)
            if suffix not in {".safetensors", ARCHIVE, GGUF, *PICKLES}:
                continue
            if self._excluded(os.fspath(path), is_directory=False):
                continue
            if suffix in {".safetensors", GGUF}:
                is_adapter = _core.holds_adapter if suffix == GGUF else _names_an_adapter
                try:
                    if is_adapter(path):
                        yield os.fspath(path)
                except (AdapterError, CheckpointError, OSError) as error:
                    if not is_model:
                        reason = reason_of(error).removeprefix(f"{path}: ")
                        self._errors.append(ScanError(path, reason))
            elif suffix == ARCHIVE:
                # Archives of arrays are the usual form of many other things.
                if _archives_an_adapter(path):
                    yield os.fspath(path)
            elif not is_model and not LEFTOVERS.fullmatch(name):
                yield os.fspath(path)


def _why(path: str, error: OSError) -> str:
    """Why a path cannot be looked at: of a link that leads nowhere, where it should lead."""
    try:
        find(path)
    except OSError as better:
        return reason_of(better)
    return reason_of(error)


def _identity(path: str) -> int:
    """What two names of one file or directory have in common."""
    status = os.stat(path)
    return status.st_dev << 64 | status.st_ino


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory; a link that leads nowhere or into itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _names_an_adapter(file: Path) -> bool:
    """Whether a safetensors file holds an adapter, by the names in its header.

    Raises:
        LorafastError: its header cannot be read.
        OSError: it cannot be opened.
    """
    try:
        names = read_header(file)
    except (CheckpointError, OSError):
        # Whoever reads an adapter says what is wrong with it.
        if "lora" in file.name.lower():
            return True
        raise
    return any(map(ADAPTER_NAMES.search, names))


def _archives_an_adapter(file: Path) -> bool:
    """Whether an archive of NumPy's holds an adapter, by the names of its arrays."""
    import zipfile

    try:
        with zipfile.ZipFile(file) as archive:
            return any(map(ADAPTER_NAMES.search, archive.namelist()))
    except (OSError, zipfile.BadZipFile):
        return False


# What users see, and what a pickle names.
ScanError.__module__ = "lorafast"
