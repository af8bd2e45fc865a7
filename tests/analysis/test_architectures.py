"""Which adapters are of one architecture."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from lorafast._analysis.architectures import architectures

LLAMA: Mapping[Any, Any] = {"q_proj": (64, 64), "k_proj": (16, 64)}
MISTRAL: Mapping[Any, Any] = {"q_proj": (64, 64), "k_proj": (32, 64)}
GPT: Mapping[Any, Any] = {"c_attn": (48, 16)}


def groups(*adapters: tuple[str | None, Mapping[Hashable, Hashable]], **options: bool) -> list[Any]:
    bases, shapes = zip(*adapters, strict=True)
    return [(one.label, one.members) for one in architectures(bases, shapes, **options)]


def test_other_modules_are_another_architecture() -> None:
    found = groups(("a/llama", LLAMA), ("gpt2", GPT), ("a/llama", LLAMA))
    assert found == [("a/llama", [0, 2]), ("gpt2", [1])]


def test_without_names_of_bases_the_modules_tell() -> None:
    found = groups((None, GPT), (None, LLAMA), (None, LLAMA), (None, MISTRAL))
    assert [members for _, members in found] == [[1, 2], [0], [3]]
    assert len({label for label, _ in found}) == 3


def test_one_name_with_two_shapes_is_two_architectures() -> None:
    found = groups(("base", LLAMA), ("base", MISTRAL))
    assert [members for _, members in found] == [[0], [1]]
    assert found[0][0] != found[1][0]


def test_adapters_of_one_base_need_no_module_in_common() -> None:
    assert groups(("base", {"q": (2, 2)}), ("base", {"up": (8, 2)})) == [("base", [0, 1])]


def test_a_local_copy_is_the_base_it_is_named_after() -> None:
    local = ("/models/LLAMA/", {"up": (8, 2)})
    windows = ("D:\\models\\llama", {"down": (2, 8)})
    for by_base in (False, True):
        found = groups(("meta/llama", LLAMA), local, windows, by_base=by_base)
        assert [members for _, members in found] == [[0, 1, 2]]


def test_bases_of_the_same_shapes_are_kept_apart_where_it_is_asked_for() -> None:
    both = (("llama", LLAMA), ("llama-instruct", LLAMA), (None, LLAMA))
    assert groups(*both) == [("llama, llama-instruct", [0, 1, 2])]
    assert [members for _, members in groups(*both, by_base=True)] == [[0], [1], [2]]


def test_a_base_that_is_named_counts_before_shapes_that_fit() -> None:
    part = {"q_proj": (64, 64)}
    found = groups(("llama", LLAMA), ("mistral", MISTRAL), ("mistral", part), (None, part))
    assert [members for _, members in found] == [[0, 3], [1, 2]]


def test_many_bases_are_counted_in_the_label() -> None:
    found = groups(*((f"base-{i}", LLAMA) for i in range(5)))
    assert found == [("base-0, base-1 and 3 more", [0, 1, 2, 3, 4])]


def test_an_adapter_without_modules_stands_with_its_base_or_alone() -> None:
    assert groups(("base", LLAMA), ("base", {}), (None, {}), (None, {})) == [
        ("base", [0, 1]),
        ("no base named, shapes 1", [2]),
        ("no base named, shapes 2", [3]),
    ]
