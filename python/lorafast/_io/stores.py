"""Object stores: which texts are URLs, and what a merge was told of the stores that they name."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from lorafast import _core
from lorafast._errors import MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

    from lorafast._types import CredentialProvider, StorageOptions

#: What URLs of stores begin with. `hf://`, once it is read, belongs here and into `located`.
SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https"})
#: What reads ahead and uploads take together, where nobody says otherwise.
IO_MEMORY = 128 << 20


class StoreSettings(NamedTuple):
    """What was told of stores. Its text has no secrets, and it is not pickled.

    Attributes:
        options: object_store's keys, or from the beginnings of URLs to such.
        provider: gives credentials, and until when they hold.
        memory: what all reads ahead and uploads take together.
    """

    options: StorageOptions | None = None
    provider: CredentialProvider | None = None
    memory: _core.IoMemory | None = None

    def __repr__(self) -> str:
        return "StoreSettings(…)"

    def __reduce__(self) -> str:
        raise TypeError("what is told of stores may have secrets in it and is not pickled")

    def options_for(self, url: str) -> dict[str, str]:
        """The keys for a URL: all of them, or those of the longest beginning that it has.

        Raises:
            ValueError: it is no mapping of texts, or of mappings of texts.
        """
        options = self.options or {}
        if not isinstance(options, Mapping):
            raise ValueError("storage_options is a mapping of object_store's keys to texts")
        nested = [value for value in options.values() if isinstance(value, Mapping)]
        if nested and len(nested) != len(options):
            raise ValueError(
                "storage_options maps either keys to texts, or beginnings of URLs to such mappings"
            )
        chosen: Mapping[str, object] = options
        if nested:
            bare = without_user(url)
            fitting = [each for each in options if _begins(bare, without_user(each))]
            found = options[max(fitting, key=len)] if fitting else {}
            assert isinstance(found, Mapping)
            chosen = found
        for key, value in chosen.items():
            if not isinstance(key, str) or not isinstance(value, str):
                # The value may be a secret.
                raise ValueError(f"storage_options has the key {key!r}, whose value is no text")
        return {str(key): str(value) for key, value in chosen.items()}


_NOTHING_TOLD = StoreSettings()
_SETTINGS: ContextVar[StoreSettings] = ContextVar("store_settings", default=_NOTHING_TOLD)


def settings_of(
    storage_options: StorageOptions | None,
    credential_provider: CredentialProvider | None,
    io_memory: int | str | None,
) -> StoreSettings:
    """What was told of stores, as one value.

    Raises:
        ValueError: `io_memory` is no size.
    """
    memory = None
    if "IoMemory" in vars(_core):
        from lorafast._io.device_names import parse_size

        size = IO_MEMORY if io_memory is None else parse_size(io_memory, "io_memory")
        memory = _core.IoMemory(size)
    return StoreSettings(storage_options, credential_provider, memory)


@contextmanager
def using(settings: StoreSettings) -> Iterator[None]:
    """Within it, URLs are opened with these settings."""
    token = _SETTINGS.set(settings)
    try:
        yield
    finally:
        _SETTINGS.reset(token)


def current() -> StoreSettings:
    """The settings that URLs are opened with here."""
    return _SETTINGS.get()


def scheme_of(source: object) -> str | None:
    """The scheme of a URL of a store; `None` for paths and hub ids."""
    if not isinstance(source, str):
        return None
    scheme, separator, _ = source.partition("://")
    return scheme.lower() if separator and scheme.lower() in SCHEMES else None


def is_url(source: object) -> bool:
    """Whether a source is the URL of a store."""
    return scheme_of(source) is not None


def path_of_file_url(source: str) -> str:
    """The path that a `file://` URL names; any other text as it is."""
    if not source.startswith("file://"):
        return source
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"file://{parts.netloc}: names another machine; file:///path is one here")
    return unquote(parts.path)


def without_user(url: str) -> str:
    """A URL without user, password and signature, as messages show it."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    if scheme.lower() in ("http", "https"):
        rest = rest.partition("?")[0]
    authority, slash, path = rest.partition("/")
    # abfss://container@account…: what stands before the @ is no secret.
    if "@" in authority and not (scheme.startswith("abfs") and ".core." in authority):
        authority = authority.rpartition("@")[2]
    return f"{scheme}{separator}{authority}{slash}{path}"


def located(url: str) -> _core.StoreLocation:
    """The place that a URL names, with the settings of the context.

    Raises:
        MissingDependencyError: this build of lorafast has no stores.
        ValueError: it is no URL, or the options are none.
    """
    if "StoreLocation" not in vars(_core):
        raise MissingDependencyError(
            f"{without_user(url)}: this build of lorafast reads no object stores; install a wheel, "
            "or build it with them: pip install . (with Cargo's default features)"
        )
    settings = _SETTINGS.get()
    return _core.StoreLocation(
        url, settings.options_for(url), provider=settings.provider, memory=settings.memory
    )


def _begins(url: str, beginning: str) -> bool:
    rest = url.removeprefix(beginning) if url.startswith(beginning) else None
    return rest is not None and (not rest or beginning.endswith("/") or rest.startswith("/"))


def fetched(url: str) -> Path:
    """An adapter of a store as a directory here, for what reads files alone; gone at the end."""
    import shutil
    import tempfile
    from pathlib import Path

    location = located(url)
    folder = Path(tempfile.mkdtemp(prefix="lorafast-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = location.url.rstrip("/").rpartition("/")[2]
    if os.path.splitext(name)[1] in {".safetensors", ".gguf", ".bin", ".pt", ".npz"}:  # noqa: PTH122
        (folder / name).write_bytes(location.read())
        return folder / name
    place = folder / name
    place.mkdir()
    for each in location.names():
        if "." in each:
            (place / each).write_bytes(location.read(each))
    return place
