"""Merged views: the tensors of a merge that writes nothing, each computed when it is asked for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from lorafast import _core
from lorafast._errors import LorafastError, TensorNotFoundError
from lorafast._io.hub import with_revision
from lorafast._io.limits import check_threads
from lorafast._io.sources import BASE_PATTERNS, as_list, find_source
from lorafast._io.stores import current, using
from lorafast._merge.plan import MergePlan, make_plan
from lorafast._merge.view_tensors import check_framework, maker_for

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol, Self

    from lorafast._merge.options import Combination
    from lorafast._types import MergePrecision, Source, Strategy, Weight

    class Options(Combination, Protocol):
        """What a view has to know of how adapters are merged: `api.MergeOptions`."""

        @property
        def weights(self) -> Sequence[Weight] | None: ...

        def _replace(
            self,
            *,
            dtype: str = ...,
            precision: MergePrecision = ...,
            strategy: Strategy | None = ...,
            strategy_options: Mapping[str, float] | None = ...,
            weights: Sequence[Weight] | None = ...,
            revision: str | None = ...,
        ) -> Self: ...


#: From so many names on, only their beginnings and ends are held against an unknown one.
_MANY_NAMES = 20_000
#: How many near names an error has.
_NEAR_NAMES = 3


class MergedView:
    """The tensors of a merge that writes nothing, as `safetensors.safe_open` has those of a file.

    Made by `lorafast.open_merged`, and closed at the end of `with`. Every tensor is computed when
    it is asked for, and its bytes are those that `lorafast.merge` would write. Any number of
    threads may use one view at the same time.

    Attributes:
        base: path of the base.
        adapters: paths of the adapters, in order.
        warnings: what to know before using the result.
        notes: how adapters were made to fit where it was not plain.
    """

    def __init__(
        self,
        base: Source | None,
        adapters: Source | Sequence[Source],
        options: Options,
        *,
        framework: str,
        threads: int | None,
    ) -> None:
        self._make = maker_for(check_framework(framework))
        check_threads(threads)
        self._threads = threads
        self._lock = Lock()
        self._stores = current()
        plan = _plan_of(base, as_list(adapters), options)
        # The base that the adapters name stays, whatever is swapped in.
        self._source: Source = plan.base
        options = options._replace(revision=None)
        self._set(plan, options, _core.open_view(plan.core, threads=threads))

    def _set(self, plan: MergePlan, options: Options, view: _core.View) -> None:
        self._view, self._options = view, options
        self.base = plan.base
        self.adapters = plan.adapters
        self.warnings = plan.warnings
        self.notes = plan.notes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. Tensors that were taken out of the view stay as they are."""
        self._view.close()

    def __repr__(self) -> str:
        return f"<MergedView of {self.base!r} and {self.adapters!r}>"

    def keys(self) -> list[str]:
        """The names of all tensors, in alphabetical order.

        In a pipeline of diffusers each begins with its component's folder, such as `unet.`.
        """
        return sorted(self._view.names())

    def offset_keys(self) -> list[str]:
        """The names of all tensors, by the names of the shards and their places in these."""
        return self._view.names()

    def metadata(self) -> dict[str, str] | None:
        """The metadata of the files' headers; `None` where they have none."""
        return self._view.metadata()

    def config(self, name: str = "config.json") -> dict[str, Any] | None:
        """A config of the model as the merge would write it; `None` where there is none.

        It differs from the base's where the adapters change the vocabulary, untie a head, repeat
        layers or bring a head, and where the dtype is another.

        Args:
            name: its path within the model.
        """
        import json

        content = self._view.configs().get(name)
        return None if content is None else json.loads(content)

    def get_tensor(self, name: str) -> Any:
        """A tensor, computed now.

        Raises:
            TensorNotFoundError: there is none of that name.
            NumericError: a finite weight would become NaN or infinite.
            LorafastError: base or adapter changed since the view was opened.
            ValueError: the view is closed.
        """
        view = self._view
        found = view.read(name)
        if found is None:
            raise _unknown(name, view)
        return self._make(*found)

    def get_slice(self, name: str) -> MergedSlice:
        """A tensor of which parts are computed when they are asked for.

        Raises:
            TensorNotFoundError: there is none of that name.
            ValueError: the view is closed.
        """
        return MergedSlice(self, name)

    def items(self) -> Iterator[tuple[str, Any]]:
        """All tensors with their names, in the order of `offset_keys`.

        While one is used the next are computed. What is in memory beside the tensors that the
        caller keeps is the largest tensor, or 32 MiB where all are smaller.

        Raises:
            LorafastError: as `get_tensor`; or other adapters were swapped in meanwhile.
            ValueError: the view is closed.
        """
        view = self._view
        return _Tensors(self, view, view.stream())

    def swap(
        self,
        adapters: Source | Sequence[Source],
        *,
        strategy: Strategy | None = None,
        weights: Sequence[Weight] | None = None,
        strategy_options: Mapping[str, float] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Puts other adapters in the place of these, and computes what that changes.

        The view is that of the other adapters at once, whether or not what is returned is used.
        It goes through every tensor that is made in another way than before, in the order of
        `offset_keys`: those that the new adapters change, and those that return to the base.
        A name that the output has no longer comes at the end, with the tensor that stands for it
        (a head that is tied again, with the embeddings); one that nothing stands for is left out.

        Args:
            adapters: one or several others; with none, `[]`, all is the base's again.
            strategy: how they are combined; as before if missing.
            weights: a weight for each; those before if missing, where there are as many.
            strategy_options: what the strategy takes; as before if missing, with the strategy
                before.

        Returns:
            The names and tensors that differ.

        Raises:
            LorafastError: as `lorafast.plan`; the view is then what it was.
            ValueError: the weights are not as many as the adapters, or the view is closed.
        """
        with self._lock:
            before = self._view
            # An error if it is closed.
            before.names()
            sources = as_list(adapters)
            options = self._options
            if strategy is not None:
                options = options._replace(strategy=strategy, strategy_options=strategy_options)
            elif strategy_options is not None:
                options = options._replace(strategy_options=strategy_options)
            if weights is not None:
                options = options._replace(weights=weights)
            elif options.weights is not None and len(options.weights) != len(sources) and sources:
                raise ValueError(
                    f"the view was opened with {len(options.weights)} weights, and there are "
                    f"{len(sources)} adapters now; give swap their weights"
                )
            with using(self._stores):
                plan = _plan_of(self._source, sources, options)
            view = _core.open_view(plan.core, threads=self._threads)
            stream = view.changed_from(before)
            self._set(plan, options, view)
            before.close()
            return _Tensors(self, view, stream)


def _plan_of(base: Source | None, adapters: Sequence[Source], options: Options) -> MergePlan:
    """The plan of a merge, or of the base as it is where there is no adapter."""
    if adapters:
        return make_plan(base, adapters, options)
    # There is nothing to combine.
    plain = options._replace(strategy=None, strategy_options=None, weights=None)
    if base is None:
        raise ValueError("there are no adapters that could name the base; give it")
    found = find_source(with_revision(base, options.revision), BASE_PATTERNS)
    return MergePlan(_core.plan_base(found, plain.to_core()), options)


class _Tensors(Iterator[tuple[str, Any]]):
    """Tensors that are computed ahead; one iterator may be shared by several threads."""

    def __init__(self, merged: MergedView, view: _core.View, stream: _core.ViewStream) -> None:
        self._merged, self._view, self._stream = merged, view, stream

    def __length_hint__(self) -> int:
        return len(self._stream)

    def __next__(self) -> tuple[str, Any]:
        if self._merged._view is not self._view:
            self._stream.close()
            raise LorafastError(
                "other adapters were swapped in while the tensors of those before were computed; "
                "begin again"
            )
        name, found = next(self._stream)
        return name, self._merged._make(*found)


class MergedSlice:
    """A tensor of a view, parts of which are computed when they are asked for.

    It takes what `safe_open`'s slices take (numbers, ranges and `...` for each dimension), and
    stays good after a swap.
    """

    def __init__(self, merged: MergedView, name: str) -> None:
        self._merged, self._name = merged, name
        self._view, self._part = self._find()

    def _find(self) -> tuple[_core.View, _core.ViewPart]:
        view = self._merged._view
        part = view.part(self._name)
        if part is None:
            raise _unknown(self._name, view)
        return view, part

    def _current(self) -> _core.ViewPart:
        if self._merged._view is not self._view:
            self._view, self._part = self._find()
        return self._part

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return self._current().shape

    def get_dtype(self) -> str:
        """The tensor's dtype, by its name in a safetensors header."""
        return self._current().dtype

    def __repr__(self) -> str:
        return f"<MergedSlice of {self._name!r}: {self.get_dtype()} {self.get_shape()}>"

    def __getitem__(self, index: Any) -> Any:
        """The part of the tensor that an index means: numbers, ranges and `...`.

        Raises:
            IndexError: a number is beyond the tensor, or there are more than it has dimensions.
            TypeError: it is no such index.
            ValueError: a range goes backwards, or a part begins within a byte.
            LorafastError: as `MergedView.get_tensor`.
        """
        part = self._current()
        shape = part.shape
        ranges, steps, kept = _resolve(self._name, index, shape)
        extents = [end - start for start, end in ranges]
        if extents == shape:
            # Nothing of it is kept for further parts.
            found = self._view.read(self._name)
            assert found is not None, "there is a part of it"
            content = found[2]
        else:
            content = part.read(ranges)
        tensor = self._merged._make(part.dtype, extents, content)
        if any(step != 1 for step in steps) or not all(kept):
            where = (
                slice(None, None, step) if keep else 0
                for step, keep in zip(steps, kept, strict=True)
            )
            tensor = tensor[tuple(where)]
            if any(step != 1 for step in steps):
                tensor = tensor.clone() if hasattr(tensor, "clone") else tensor.copy()
        return tensor


def _resolve(
    name: str, index: Any, shape: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int], list[bool]]:
    """For each dimension its range, the step in it, and whether the result has it."""
    given = list(index) if isinstance(index, tuple) else [index]
    dots = [place for place, each in enumerate(given) if each is Ellipsis]
    if len(dots) > 1:
        raise IndexError(f"{name}: an index has one ... at most")
    missing = len(shape) - len(given) + len(dots)
    if missing < 0:
        raise IndexError(
            f"{name} has {len(shape)} dimensions, and the index is of {len(given) - len(dots)}"
        )
    place = dots[0] if dots else len(given)
    given[place : place + len(dots)] = [slice(None)] * missing
    ranges, steps, kept = [], [], []
    for dimension, (each, extent) in enumerate(zip(given, shape, strict=True)):
        if isinstance(each, slice):
            start, end, step = each.indices(extent)
            if step < 0:
                raise ValueError(f"{name}: the range of dimension {dimension} goes backwards")
            ranges.append((start, max(start, end)))
            steps.append(step)
            kept.append(True)
            continue
        if isinstance(each, bool) or not hasattr(each, "__index__"):
            raise TypeError(
                f"{name}: the index of dimension {dimension} is {each!r}; it is a number, a range "
                "or ..."
            )
        number = operator.index(each)
        if not -extent <= number < extent:
            raise IndexError(
                f"{name}: {number} is beyond dimension {dimension}, which has {extent} entries"
            )
        number %= extent
        ranges.append((number, number + 1))
        steps.append(1)
        kept.append(False)
    return ranges, steps, kept


def _unknown(name: str, view: _core.View) -> TensorNotFoundError:
    """The error for a name that no tensor has, with those that are near to it."""
    from difflib import get_close_matches

    names = view.names()
    text = str(name)
    # What differs is most often a prefix.
    near = [each for each in names if each.endswith(f".{text}") or text.endswith(f".{each}")]
    if len(names) <= _MANY_NAMES:
        near += get_close_matches(text, names, n=_NEAR_NAMES)
    near = list(dict.fromkeys(near))[:_NEAR_NAMES]
    advice = f"did you mean {' or '.join(near)}?" if near else "keys() lists all names"
    return TensorNotFoundError(
        f"the merged model has no tensor {text!r} among its {len(names)}; {advice}"
    )


# What users see.
MergedView.__module__ = MergedSlice.__module__ = "lorafast"
