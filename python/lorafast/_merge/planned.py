"""What a plan does to one tensor, as frozen values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorafast._results import shown

if TYPE_CHECKING:
    from lorafast import _core


@shown
class UpdatePart(NamedTuple):
    """Which part of a module's product an update takes, and where it lies.

    Attributes:
        expert: the expert's index and their number, where the factors hold those of all experts.
        outputs: the outputs of the product that are used.
        inputs: the inputs of the product that are used.
        rows: the rows of the stored tensor that are changed.
    """

    expert: tuple[int, int] | None = None
    outputs: range | None = None
    inputs: range | None = None
    rows: range | None = None


@shown
class Update(NamedTuple):
    """What one adapter does to one tensor.

    Attributes:
        adapter: the adapter's position.
        module: its module, or for a replacement the tensor in its file.
        kind: low_rank, dora, vector (a bias), replace, or transform (made of the whole weight).
        rank: the rank; 1 for a vector, 0 for a replacement.
        scale: s of s·B·A.
        weight: the adapter's weight under the strategy.
        transposed: whether the base stores the weight (in, out), so that the product is turned.
        part: which part of the product it is, where it is not the whole.
        on: the adapter's tensor that it is made from, where that replaces the base's.
        residual: what the adapter's initialisation took out of the base's weight: largest, smallest
            or leading components.
        stage: updates are made from what those of all lower stages leave.
    """

    adapter: int
    module: str
    kind: str
    rank: int
    scale: float
    weight: float
    transposed: bool
    part: UpdatePart | None = None
    on: str | None = None
    residual: str | None = None
    stage: int = 0


@shown
class PlannedTensor(NamedTuple):
    """A tensor of the output, and what becomes of it.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: how the base stores it, as in a safetensors header.
        output_dtype: how it is written.
        shard: the file that it is written to.
        action: merge; replace (an adapter's tensor stands in its place, or is new); repeat (another
            tensor of the base stands there); copy; cast; or rescale (new scales of a quantised
            tensor).
        updates: what adapters do to it, in order.
        quantised: the scheme, where it is quantised and does not stay as it is.
        adapter: the position of the adapter whose tensor replaces it.
        origin: the name of what stands in its place, where that is another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    output_dtype: str
    shard: str
    action: str
    updates: tuple[Update, ...]
    quantised: str | None = None
    adapter: int | None = None
    origin: str | None = None


def planned_tensor(plain: _core.TensorDescription) -> PlannedTensor:
    """The value of what the core says of a tensor."""
    return PlannedTensor(
        plain["name"],
        tuple(plain["shape"]),
        plain["dtype"],
        plain["output_dtype"],
        plain["shard"],
        plain["action"],
        tuple(map(_update, plain["updates"])),
        plain.get("quantised"),
        plain.get("adapter"),
        plain.get("origin"),
    )


def _update(plain: _core.UpdateDescription) -> Update:
    return Update(
        plain["adapter"],
        plain["module"],
        plain["kind"],
        plain["rank"],
        plain["scale"],
        plain["weight"],
        plain["transposed"],
        _part(plain["part"]) if "part" in plain else None,
        plain.get("on"),
        plain.get("residual"),
        plain.get("stage", 0),
    )


def _part(plain: _core.UpdatePart) -> UpdatePart:
    def to_range(found: _core.Range | None) -> range | None:
        return None if found is None else range(found["start"], found["end"])

    expert = plain["expert"]
    return UpdatePart(
        None if expert is None else (expert["index"], expert["count"]),
        to_range(plain["outputs"]),
        to_range(plain["inputs"]),
        to_range(plain["rows"]),
    )


# What users see, and what a pickle names.
PlannedTensor.__module__ = Update.__module__ = "lorafast"
