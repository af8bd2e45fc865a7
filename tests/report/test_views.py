"""The table in which results find their views."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module

import lorafast
import pytest
from lorafast._results import VIEWS, FramedResult, Result, view
from support import records


@pytest.mark.parametrize("key", VIEWS, ids="-".join)
def test_each_view_is_a_function_of_a_result(key: tuple[str, str]) -> None:
    module, name = VIEWS[key]
    function = getattr(import_module(f"lorafast.{module}"), name)
    first, *_ = inspect.signature(function).parameters.values()
    _, result = key
    assert result in str(first.annotation).split(" | ")
    if result in ("object", "Table"):
        return
    # Either a class of results that users see, or what those with a table of parts share.
    own = FramedResult if result == "FramedResult" else getattr(lorafast, result)
    assert issubclass(own, Result | Mapping)


def test_a_derived_result_has_its_parents_views() -> None:
    class Own(lorafast.AdapterAnalysis):
        pass

    plain = records.analysis()
    own = Own(**vars(plain))
    assert view("markdown", own) is view("markdown", plain)
    assert repr(own) == repr(plain)
