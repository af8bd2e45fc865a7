"""What a checkpoint or an adapter holds, as frozen values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lorafast._results import RecordTuple, shown

if TYPE_CHECKING:
    from lorafast import _core


@shown
class ListedFile(NamedTuple):
    """A file of weights."""

    name: str
    bytes: int
    tensors: int


@shown
class ListedTensor(NamedTuple):
    """A tensor, by its file's header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str


@shown
class ListedComponent(NamedTuple):
    """A component of a model of diffusion: a folder of a pipeline, or a part of a single file."""

    name: str
    """Its folder, or what the names of its tensors begin with; empty where it is all there is."""
    kind: str
    """denoiser, text_encoder, vae or other."""
    class_name: str | None
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """How many tensors have each type."""


@shown
class ListedModule(NamedTuple):
    """A module that an adapter changes; the shape is (out, in).

    Alpha and scaling are `None` where the adapter's config is not there.
    """

    name: str
    kind: str
    rank: int
    alpha: float | None
    scaling: float | None
    shape: tuple[int, ...]


@shown
class Use(NamedTuple):
    """What a merge makes of a tensor, of a field of the config, or of a file of weights."""

    name: str
    use: str
    """used, not_needed or refused."""
    reason: str

    @property
    def verdict(self) -> str:
        """What `use` was called before."""
        from lorafast._deprecation import warn_renamed

        warn_renamed("verdict of a use", "its attribute use")
        return self.use


@shown
class Listing(Mapping[str, Any]):
    """What `CheckpointListing` and `AdapterListing` share.

    By key it gives what `to_dict` has there, as listings were read before they had attributes; that
    goes with the next release.
    """

    # No dataclass, whose import takes longer than reading a header.
    def __init__(self, plain: _core.Listing) -> None:
        self.__dict__["_plain"] = plain

    if TYPE_CHECKING:
        _plain: _core.Listing

    @property
    def kind(self) -> str:
        """One of "checkpoint", "pipeline" (of diffusers) and "adapter"."""
        return self._plain["kind"]

    @property
    def format(self) -> str | None:
        """The name of an adapter's format, such as "peft"; `None` where none reads it."""
        return self._plain["format"]

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._plain["path"]

    @cached_property
    def files(self) -> tuple[ListedFile, ...]:
        """The files of weights."""
        return RecordTuple(ListedFile(**file) for file in self._plain["files"])

    @property
    def metadata(self) -> dict[str, str]:
        """Of the files' headers."""
        return self._plain["metadata"]

    @cached_property
    def tensors(self) -> tuple[ListedTensor, ...]:
        """Every tensor of every file, in order."""
        plain = self._plain["tensors"]
        # The fields are the dictionary's keys, which a test holds against the stub.
        return RecordTuple(
            ListedTensor(**{**tensor, "shape": tuple(tensor["shape"])})  # type: ignore[arg-type]
            for tensor in plain
        )

    @property
    def total_parameters(self) -> int:
        """Elements of all tensors."""
        return self._plain["total_parameters"]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._plain["total_bytes"]

    @property
    def config(self) -> dict[str, Any] | None:
        """The config as it was read."""
        return self._plain["config"]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before using it."""
        return RecordTuple(self._plain["warnings"])

    def to_dict(self) -> _core.Listing:
        """Everything as plain objects."""
        import json

        copied: _core.Listing = json.loads(json.dumps(self._plain))
        return copied

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        import json

        return json.dumps(self._plain, indent=2)

    def __getitem__(self, key: str) -> Any:
        # Any key may be asked for; one that is none is the dictionary's own KeyError.
        return self._plain[key]  # type: ignore[literal-required]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")


class CheckpointListing(Listing):
    """What a checkpoint or a pipeline holds, by its headers."""

    @cached_property
    def components(self) -> tuple[ListedComponent, ...]:
        """What a model of diffusion is made of; nothing of other models."""
        # As for the tensors: the fields are the dictionary's keys.
        return RecordTuple(
            ListedComponent(**{**component, "dtypes": dict(component["dtypes"])})  # type: ignore[arg-type]
            for component in self._plain["components"]
        )

    @property
    def quantised(self) -> dict[str, int]:
        """For each way in which weights are quantised, in words, how many are."""
        return self._plain["quantised"]


class AdapterListing(Listing):
    """What an adapter holds, by its header and its config."""

    @property
    def _summary(self) -> _core.AdapterSummary:
        summary = self._plain["adapter"]
        assert summary is not None, "the core lists an adapter with its summary"
        return summary

    @property
    def type(self) -> str | None:
        """PEFT's name of what it is, such as LORA."""
        return self._summary["type"]

    @property
    def base(self) -> str | None:
        """The base that it was trained on, as it names that."""
        return self._summary["base"]

    @property
    def r(self) -> int | None:
        """The rank, where all modules share one."""
        return self._summary["r"]

    @property
    def alpha(self) -> float | None:
        """The α that scales are made of, where all modules share one."""
        return self._summary["alpha"]

    @property
    def rslora(self) -> bool:
        """Whether scales are α/√r and not α/r."""
        return self._summary["rslora"]

    @property
    def peft_version(self) -> str | None:
        """The version of PEFT that wrote it, where it says so."""
        return self._summary["peft_version"]

    @property
    def algorithm(self) -> str | None:
        """What its modules add: lora, locon, loha, …; mixed where they are not of one kind."""
        return self._summary["algorithm"]

    @property
    def trainer(self) -> str | None:
        """The program that trained it, where its metadata says so."""
        return self._summary["trainer"]

    @property
    def family(self) -> str | None:
        """The family of image or video models that it is of, where its modules' names tell."""
        return self._summary["family"]

    @property
    def components(self) -> tuple[str, ...]:
        """The components of an image model that it changes: denoiser, text_encoder, …."""
        return tuple(self._summary["components"])

    @property
    def scale(self) -> str | None:
        """Where its scales come from."""
        return self._summary["scale"]

    @property
    def needs(self) -> tuple[str, ...]:
        """What a merge needs."""
        return tuple(self._summary["needs"])

    @cached_property
    def modules(self) -> tuple[ListedModule, ...]:
        """The modules that it changes, with their ranks and scales."""
        # As for the tensors: the fields are the dictionary's keys.
        return RecordTuple(
            ListedModule(**{**module, "shape": tuple(module["shape"])})  # type: ignore[arg-type]
            for module in self._summary["modules"]
        )

    @property
    def features(self) -> tuple[str, ...]:
        """What in it cannot be merged."""
        return RecordTuple(self._summary["features"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of its names: an adapter's name in the keys, modules of trainers."""
        return tuple(self._summary["notes"])

    @cached_property
    def fields_use(self) -> tuple[Use, ...]:
        """What a merge makes of every field of the config."""
        return RecordTuple(Use(**use) for use in self._summary["coverage"]["fields"])

    @cached_property
    def files_use(self) -> tuple[Use, ...]:
        """What a merge makes of every file of weights in the adapter's directory."""
        return tuple(Use(**use) for use in self._summary["coverage"]["files"])

    @cached_property
    def tensors_use(self) -> tuple[Use, ...]:
        """What a merge makes of every tensor."""
        return RecordTuple(Use(**use) for use in self._summary["coverage"]["tensors"])


# What users see, and what a pickle names.
CheckpointListing.__module__ = AdapterListing.__module__ = "lorafast"
