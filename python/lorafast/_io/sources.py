"""Sources: from what a user names (paths, hub ids, pickles) to what the core can open."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from glob import escape
from pathlib import Path

from lorafast import _core
from lorafast._errors import (
    AdapterError,
    CheckpointError,
    LorafastError,
    missing,
    raise_interruption,
)
from lorafast._io import hub
from lorafast._io.paths import expand, find, is_directory, open_plain
from lorafast._io.stores import fetched, is_url, located, path_of_file_url, without_user
from lorafast._io.torch_tensors import NAMES, dtype_name, memory_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor

    from lorafast._types import Source

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
#: The same under the name that torchtune saves it by, in its own names of modules.
TORCHTUNE_WEIGHTS = "adapter_model.pt"
#: MLX's, and those of its first releases.
MLX_WEIGHTS = "adapters.safetensors"
ARCHIVED_WEIGHTS = "adapters.npz"
#: The names of an adapter's weights in its directory, in whatever format.
USUAL_WEIGHTS = (WEIGHTS, PICKLED_WEIGHTS, TORCHTUNE_WEIGHTS, MLX_WEIGHTS, ARCHIVED_WEIGHTS)
#: Endings of weights that torch's pickles hold.
PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt"})
#: The ending of llama.cpp's files, of adapters and of models.
GGUF = ".gguf"
#: The ending of weights that NumPy's archives hold.
ARCHIVE = ".npz"
#: What is fetched for a base: safetensors weights, and everything small beside them, its card and
#: its licence among it.
BASE_PATTERNS = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
#: An adapter's files; weights that trainers save beside them, which are part of it; its tokenizer
#: and its configs.
ADAPTER_PATTERNS = [
    *(CONFIG, WEIGHTS, PICKLED_WEIGHTS, "adapter_model*.safetensors", f"{WEIGHTS}.index.json"),
    *(TORCHTUNE_WEIGHTS, MLX_WEIGHTS, ARCHIVED_WEIGHTS),
    *("non_lora_trainables.*", "mm_projector.*", "value_head.*", "v_head.*", "new_embeddings.*"),
    *("config.json", "generation_config.json", "*processor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template.*", "*.tiktoken", "*.spm", "*.model"),
]
#: What lies beside weights in the directory of a training run.
LEFTOVERS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|pytorch_model|model)\b.*"
    r"|.*(optim|sched|model)_states.*",
    re.IGNORECASE,
)
#: Name, dtype (a safetensors name), shape, and the bytes, or what returns them, or `None` where
#: there are none to read.
NamedTensor = tuple[str, str, list[int], memoryview | Callable[[], memoryview] | None]
#: A loaded module as the core plans against it: what messages call it, its config (JSON), and its
#: tensors.
ModuleBase = tuple[str, str, list[NamedTensor]]
if TYPE_CHECKING:
    #: An adapter as the core finds it: a path, or a place in a store; or a path, the file of its
    #: weights, and what reads it.
    FoundSource = (
        Path
        | _core.StoreLocation
        | tuple[Path | _core.StoreLocation, Path, Callable[[], list[NamedTensor]]]
    )
    #: The same, or with the name of its format.
    CoreSource = FoundSource | tuple[FoundSource, str]
else:
    # A build without stores has no class for places in them.
    FoundSource = CoreSource = object


# What is merged passes through public functions that have no such option.
_OFFLINE: ContextVar[bool] = ContextVar("offline", default=False)


@contextmanager
def offline() -> Iterator[None]:
    """Within it, hub ids are taken from the local cache, and the hub is never asked."""
    token = _OFFLINE.set(True)
    try:
        yield
    finally:
        _OFFLINE.reset(token)


def locate(
    source: str | os.PathLike[str], patterns: list[str], *, local_files_only: bool = False
) -> Path:
    """The local path of a base or an adapter; a hub id is fetched if it is no path.

    Args:
        source: what the user named: a path, or an id as `hub` has them.
        patterns: the files to fetch.
        local_files_only: take a hub id from the local cache, and never ask the hub.

    Raises:
        FileNotFoundError: it is neither a path that exists nor could it be a hub id, or a link that
            leads nowhere.
        OSError: it may not be looked at.
        MissingDependencyError: it could be a hub id and huggingface_hub is not installed.
        LorafastError: the hub refused, or could not be reached.
    """
    if is_url(source):
        if patterns is ADAPTER_PATTERNS:
            return fetched(str(source))
        raise LorafastError(
            f"{without_user(str(source))}: a model in a store is read by merge, plan, verify and "
            "inspect; download it for everything else"
        )
    if isinstance(source, str):
        source = path_of_file_url(source)
    path = Path(expand(source))
    text = os.fspath(source)
    if not hub.is_hub_url(source) and find(path) is not None:
        return path
    not_found = FileNotFoundError(2, "No such file or directory", text)
    # A plain name is far more often a mistyped path than one of the hub's few ids without owner,
    # but those exist (gpt2), so it is tried where the hub's client is there to ask.
    named = hub.parse(source)
    if named is None:
        raise not_found
    is_offline = local_files_only or _OFFLINE.get()
    try:
        repository = hub.Repository(named, text, local_files_only=is_offline)
    except ImportError as error:
        if not hub.is_certainly_of_the_hub(source):
            raise not_found from None
        raise error from not_found
    with hub.told_of(named, text):
        return repository.require(_fetched(repository, patterns))


def _fetched(repository: hub.Repository, patterns: list[str]) -> Path:
    """The folder or the file that an id names, with what is read beside it, in the hub's cache."""
    file = repository.named.file
    if file is not None:
        beside = [name for name in patterns if Path(name).suffix not in hub.WEIGHTS_ENDINGS]
        return Path(repository.fetch([escape(file), *beside])) / file
    if patterns is BASE_PATTERNS:
        from lorafast._io.hub_pipelines import fetch_base

        return fetch_base(repository.fetch, patterns)
    found = Path(repository.fetch(patterns))
    if patterns is ADAPTER_PATTERNS and not _holds_usual_weights(found):
        names = repository.names() or []
        return _fetch_lone_weights(str(repository.named), found, repository.fetch, names)
    return found


def locate_all(source: str, patterns: list[str]) -> Path | None:
    """The folder of a hub id, with all files in it and below that patterns name.

    `None` for what is no such id with an owner.

    Raises:
        LorafastError, OSError: as for `locate`.
    """
    named = hub.parse(source)
    if named is None or not hub.is_certainly_of_the_hub(source):
        return None
    repository = hub.Repository(named, source, local_files_only=_OFFLINE.get())
    with hub.told_of(named, source):
        if named.file is not None:
            return repository.require(_fetched(repository, patterns))
        below = [f"*/{name}" for name in patterns]
        return repository.require(Path(repository.fetch([*patterns, *below])))


def find_source(
    source: str | os.PathLike[str] | _core.StoreLocation,
    patterns: list[str],
    *,
    local_files_only: bool = False,
) -> Path | _core.StoreLocation:
    """As `locate`, of a base or an adapter that may lie in a store.

    Raises:
        LorafastError, OSError, ValueError: as for `locate` and `stores.located`.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    if is_url(source):
        return located(str(source))
    return locate(source, patterns, local_files_only=local_files_only)


def _holds_usual_weights(directory: Path) -> bool:
    """Whether an adapter's directory has its config, or weights under a usual name."""
    return any(directory.glob("adapter_model*")) or any(
        find(directory / name) is not None for name in (CONFIG, *USUAL_WEIGHTS)
    )


def _fetch_lone_weights(
    repository: str, found: Path, fetch: Callable[[Sequence[str]], str], names: Sequence[str]
) -> Path:
    """The GGUF adapter of a repository that has no other: fetched, where it is the only one.

    Args:
        repository: the hub id.
        found: what was fetched of it.
        fetch: fetches the files that patterns name, and returns their directory.
        names: all files of the repository; none where the hub may not be asked.

    Raises:
        LorafastError: it has several files of which one could be meant.
    """
    local = [each.name for each in found.glob("*") if each.suffix.lower() == GGUF]
    files = [name for name in names or local if "/" not in name and name.lower().endswith(GGUF)]
    if len(files) > 1:
        listed = ", ".join(files[:4]) + (", …" if len(files) > 4 else "")
        raise LorafastError(
            f"{repository}: has {len(files)} files of which each could be the adapter ({listed}); "
            f"give the one that is meant ({repository}/{files[0]}, …)"
        )
    return Path(fetch([escape(files[0])])) / files[0] if files else found


def as_list(adapters: Source | Sequence[Source]) -> list[Source]:
    """Adapters, of which one may be given by itself."""
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)


def require_readers(
    *sources: Source | ModuleBase | None,
    device: str = "cpu",
    needs: Mapping[str, str] | None = None,
) -> None:
    """Makes sure that what reading bases and adapters takes is installed, before any is read.

    Args:
        sources: as for `readers_needs`.
        device: where products are made, by its name.
        needs: further packages that are asked for, and what for.

    Raises:
        MissingDependencyError: packages are missing; the message names all of them.
    """
    known = readers_needs(*sources) | device_needs(device) | dict(needs or {})
    if known:
        from lorafast._io.packages import require

        require(known)


def readers_needs(*sources: Source | ModuleBase | None) -> dict[str, str]:
    """The packages that reading some bases and adapters takes, and what each is needed for.

    What is there is looked at by name alone; what is not, and is no hub id, is left to whoever
    opens it. A loaded module, and `None`, take nothing.
    """
    needs: dict[str, str] = {}
    for source in sources:
        if isinstance(source, str | os.PathLike):
            needs = _needs_of(source) | needs
    return needs


def device_needs(device: str) -> dict[str, str]:
    """The packages that computing on a device takes, and what for."""
    takes_torch = str(device).startswith(("cuda", "torch:"))
    return {"torch": f"compute on {device!r}"} if takes_torch else {}


def _needs_of(source: str | os.PathLike[str]) -> dict[str, str]:
    """The packages that reading a base or an adapter takes, and what for."""
    if is_url(source):
        return {}
    path = Path(expand(source))
    try:
        if not hub.is_hub_url(source) and find(path) is not None:
            pickle = _other_weights(path)
            is_torchs = pickle is not None and pickle.suffix != ARCHIVE
            return {"torch": f"read {pickle}"} if is_torchs else {}
    except OSError:
        return {}
    if hub.is_certainly_of_the_hub(source):
        return {"huggingface_hub": hub.FETCH.format(os.fspath(source))}
    return {}


def _other_weights(adapter: Path) -> Path | None:
    """The file of the weights of an adapter's directory, where it is no safetensors file.

    Raises:
        OSError: what is there leads nowhere or may not be looked at.
    """
    for safetensors, *others in (
        (WEIGHTS, PICKLED_WEIGHTS, TORCHTUNE_WEIGHTS),
        (MLX_WEIGHTS, ARCHIVED_WEIGHTS),
    ):
        # A link that leads nowhere is told of by who opens it.
        if any(os.path.lexists(adapter / f"{safetensors}{end}") for end in ("", ".index.json")):
            return None
        for name in others:
            if find(adapter / name) is not None:
                return adapter / name
    return None


def is_pickle(file: Path) -> bool:
    """Whether a file is one of weights that torch or NumPy has to read, by its name."""
    return file.suffix.lower() in PICKLES | {ARCHIVE} and not is_directory(file)


def _lone_pickle(directory: Path) -> Path | None:
    """The only weights of a directory that has no config, if they are a pickle or an archive."""
    marks = (CONFIG, WEIGHTS, PICKLED_WEIGHTS, "config.json", "model_index.json")
    # A link that leads nowhere is a mark, too, and is told of by who opens it.
    if not is_directory(directory) or any(os.path.lexists(directory / mark) for mark in marks):
        return None
    weights = [
        each
        for each in directory.iterdir()
        if each.suffix.lower() in PICKLES | {".safetensors", ARCHIVE}
        and not LEFTOVERS.fullmatch(each.name)
    ]
    return weights[0] if len(weights) == 1 and is_pickle(weights[0]) else None


def core_source(adapter: Path | _core.StoreLocation, format: str | None = None) -> CoreSource:
    """An adapter as the core opens it: its path, or with it what reads its pickled weights.

    Args:
        adapter: the adapter's directory, or its weights file.
        format: the name of its format, where that is not to be told by what lies there.

    Raises:
        OSError: what is there leads nowhere or may not be looked at.
    """
    found = _found_source(adapter) if isinstance(adapter, Path) else _found_in_store(adapter)
    return found if format is None else (found, format)


def _found_source(adapter: Path) -> FoundSource:
    if is_pickle(adapter):
        weights = adapter
    elif (lone := _lone_pickle(adapter)) is not None:
        adapter = weights = lone
    elif (other := _other_weights(adapter)) is not None:
        weights = other
    else:
        return adapter
    read = read_archive if weights.suffix.lower() == ARCHIVE else read_pickle
    return adapter, weights, partial(read, weights)


def _found_in_store(location: _core.StoreLocation) -> FoundSource:
    """An adapter of a store; with what fetches weights that only torch or NumPy reads."""
    name = location.url.rpartition("/")[2]
    ending = Path(name).suffix.lower()
    if ending in {".safetensors", GGUF}:
        return location
    if ending in PICKLES | {ARCHIVE}:
        return location, Path(name), partial(_read_fetched, location, None, name)
    names = set(location.names())
    others = [each for each in (*USUAL_WEIGHTS, f"{WEIGHTS}.index.json") if each in names]
    if not others or Path(others[0]).suffix not in PICKLES | {ARCHIVE}:
        return location
    return location, Path(others[0]), partial(_read_fetched, location, others[0], others[0])


def _read_fetched(
    location: _core.StoreLocation, member: str | None, name: str
) -> list[NamedTensor]:
    """The tensors of a pickle or an archive of a store, by way of a file here."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lorafast-") as folder:
        file = Path(folder) / name
        file.write_bytes(location.read(member))
        return read_archive(file) if file.suffix.lower() == ARCHIVE else read_pickle(file)


def read_archive(archive: Path) -> list[NamedTensor]:
    """The arrays of an archive of NumPy's (`.npz`), as `read_pickle` has the tensors of a pickle.

    Raises:
        AdapterError: the file is no such archive, or holds something other than arrays of numbers.
        OSError: it cannot be read.
    """
    import numpy as np

    tensors: list[NamedTensor] = []
    # A pipe would keep NumPy waiting for a writer.
    with open_plain(archive, AdapterError) as file:
        if not file.read(2).startswith(b"PK"):
            found = _core.identify_path(archive)
            raise AdapterError(f"{archive}: {found or 'is no archive of NumPy'}")
        file.seek(0)
        try:
            # allow_pickle: an array of objects can otherwise run any code it likes.
            with np.load(file, allow_pickle=False) as arrays:
                found_arrays = {name: arrays[name] for name in arrays.files}
        except Exception as error:
            raise_interruption(error)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise AdapterError(f"{archive}: cannot be read as plain arrays: {reason}") from error
    for name, array in found_arrays.items():
        # MLX writes bfloat16, which NumPy does not have, as two bytes of no type.
        dtype = "BF16" if array.dtype.str.endswith("V2") else NAMES.get(array.dtype.name)
        if dtype is None:
            raise AdapterError(
                f"{archive}: holds {name} of the type {array.dtype}, which is unknown"
            )
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        plain = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
        tensors.append((name, dtype, list(array.shape), plain.data))
    return tensors


def read_pickle(pickle: Path) -> list[NamedTensor]:
    """The tensors of a pickle, each with its name, its dtype (a safetensors name) and its shape.

    Raises:
        MissingDependencyError: torch is not installed.
        AdapterError: the file is no pickle, the pickle holds something other than tensors, or it is
            no plain file.
        OSError: it cannot be read.
    """
    with open_plain(pickle, AdapterError) as file:
        beginning = file.read(2)
    if not beginning.startswith((b"PK", b"\x80")):
        found = _core.identify_path(pickle)
        if found is not None:
            raise AdapterError(f"{pickle}: {found}")
    try:
        import torch
    except ImportError as error:
        raise missing("torch", "torch", f"read {pickle}") from error
    # A pipe would keep torch waiting for a writer.
    with open_plain(pickle, AdapterError) as file:
        try:
            # weights_only: a pickle can otherwise run any code it likes.
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise_interruption(error)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise AdapterError(f"{pickle}: cannot be read as plain tensors: {reason}") from error
    if (pairs := _numbered(state)) is not None:
        state = pairs
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise AdapterError(f"{pickle}: {_other_than_tensors(state)}")
    tensors: list[NamedTensor] = []
    for name, tensor in state.items():
        dtype = dtype_name(tensor.dtype)
        if dtype is None:
            raise AdapterError(
                f"{pickle}: holds {name} of the type {tensor.dtype}, which is unknown"
            )
        tensors.append((str(name), dtype, list(tensor.shape), memory_of(tensor)))
    return tensors


def _numbered(state: object) -> dict[str, Tensor] | None:
    """The factors that cloneofsimo's lora saved in 2022, a list of up, down, up, down, ….

    They get the names that its later releases give. Which model's they are their shapes tell: the
    layers of CLIP's attention are all square and of one size, those of a UNet are not.
    """
    import torch

    if not isinstance(state, list) or not state or len(state) % 2:
        return None
    if not all(isinstance(each, torch.Tensor) and each.ndim >= 2 for each in state):
        return None
    pairs = list(zip(state[::2], state[1::2], strict=True))
    if any(up.shape[1] != down.shape[0] for up, down in pairs):
        return None
    sizes = {size for up, down in pairs for size in (up.shape[0], down.shape[1])}
    component = "text_encoder" if len(sizes) == 1 else "unet"
    named = {}
    for number, (up, down) in enumerate(pairs):
        named[f"{component}:{number}:up"] = up
        named[f"{component}:{number}:down"] = down
    return named


def _other_than_tensors(state: object) -> str:
    """What a pickle holds that is no mapping of names to tensors."""
    import torch

    if isinstance(state, list) and state and all(isinstance(t, torch.Tensor) for t in state):
        return (
            f"is a list of {len(state)} tensors without names, which are no pairs of factors as "
            "cloneofsimo's lora saved them in 2022 (up, down, up, down, …)"
        )
    if isinstance(state, dict):
        names = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
        nested = [name for name in names if isinstance(state[name], dict)]
        of = f"such as {nested[0]}" if nested else f"such as {names[0]}"
        return (
            f"holds more than a mapping of names to tensors ({of}), as a checkpoint of training "
            "does; save its tensors alone as safetensors"
        )
    return (
        f"holds an object of the type {type(state).__name__} and no mapping of names to tensors; "
        "save its tensors as safetensors"
    )


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's rather than a model's.

    Raises:
        CheckpointError: it is neither a directory nor a file of weights.
        OSError: something there leads nowhere or may not be looked at.
    """
    if is_pickle(path) or _lone_pickle(path) is not None:
        return True
    if not is_directory(path) and path.suffix.lower() not in {".safetensors", GGUF}:
        raise CheckpointError(f"{path}: {what_is(path)}")
    return _core.holds_adapter(path)


def what_is(path: Path) -> str:
    """What a path is that is neither an adapter nor a model, as a message about it."""
    if path.name == CONFIG:
        return "is the config of an adapter; give the directory that it lies in"
    found = _core.identify_path(path)
    return "is neither a directory nor a .safetensors file" if found is None else found
