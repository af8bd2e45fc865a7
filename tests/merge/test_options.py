"""The options of merging stand in one table: signatures, flags and the core agree with it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import lorafast
import pytest
from lorafast import _core
from lorafast._cli.main import main
from lorafast._cli.merge import add_arguments as merge_arguments
from lorafast._cli.subtract import add_arguments as subtract_arguments
from lorafast._cli.verify import add_arguments as verify_arguments
from lorafast._merge.api import MergeOptions, Verb, options_of
from lorafast._merge.options import ExecutionOptions, StoreOptions
from support.handmade import make_adapter, make_base
from support.options import check_flags, check_signature, keywords

#: The keywords of a verb that are no options of merging.
OWN = {"verify": {"full", "digests"}, "subtract": {"original"}}
VERBS: tuple[Verb, ...] = get_args(Verb)
FLAGS = {"merge": merge_arguments, "verify": verify_arguments, "subtract": subtract_arguments}


@pytest.mark.parametrize("verb", VERBS)
def test_a_signature_has_the_options_of_the_table(verb: Verb) -> None:
    check_signature(getattr(lorafast, verb), options_of(verb), OWN.get(verb, set()))


def test_a_plan_is_executed_with_the_options_of_a_merge() -> None:
    given = keywords(lorafast.MergePlan.execute)
    assert {name: each.default for name, each in given.items()} == ExecutionOptions()._asdict()


def test_every_option_belongs_to_a_verb() -> None:
    of_verbs = {option.name for verb in VERBS for option in options_of(verb)}
    tables = (MergeOptions, ExecutionOptions, StoreOptions)
    assert of_verbs == {name for table in tables for name in table._fields}
    of_plans = {*MergeOptions._fields, *StoreOptions._fields}
    assert {option.name for option in options_of("plan")} == of_plans


def test_options_are_frozen_and_survive_pickling() -> None:
    options = MergeOptions(weights=[1.0], strategy="weighted")
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(AttributeError):
        options.strategy = "average"  # type: ignore[misc]  # wrong on purpose


def test_what_crosses_to_the_core_is_what_the_core_knows(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    plan = lorafast.plan(base, adapter).core

    def known(call: Callable[[dict[str, int]], object]) -> set[str]:
        with pytest.raises(ValueError, match="unknown field `odd`, expected one of") as refused:
            call({"odd": 1})
        return set(re.findall(r"`(\w+)`", str(refused.value))) - {"odd"}

    beside = {"subtract", "renames"}
    assert known(lambda odd: _core.plan_merge(base, [adapter], odd)) == {
        *MergeOptions().to_core(),
        *beside,
    }
    assert known(lambda odd: plan.execute(tmp_path / "out", odd)) == {
        *ExecutionOptions().to_core(),
        "instruction_set",
        "card",
        "recipes",
        "shard_digests",
    }


@pytest.mark.parametrize("verb", FLAGS)
def test_the_command_has_a_flag_for_each_option(verb: Verb) -> None:
    check_flags(FLAGS[verb], options_of(verb))


def test_a_verb_may_say_something_of_its_own() -> None:
    merge = {option.name: option.help for option in options_of("merge")}
    verify = {option.name: option.help for option in options_of("verify")}
    assert str(merge["device"]).startswith("where products are made: cpu, cpu:amx")
    assert str(verify["device"]).startswith("where the merge was made")
    assert merge["weights"] == verify["weights"]


@pytest.mark.parametrize("options", [{}, {"strategy": "weighted", "weights": [0.5]}], ids=str)
def test_older_spellings_still_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    where, given = str(tmp_path / "merged"), ["--base", str(base), "--adapters", str(adapter)]
    how = ["--merge-strategy", "weighted", "--weights", "0.5"] if options else []
    said = "--merge-strategy is called --strategy now\n" if options else ""
    assert main(["merge", *given, "--output", where, *how, "--quiet"]) == 0
    assert capsys.readouterr() == ("", said)
    lorafast.merge(base, adapter, tmp_path / "same", **options)
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert (
        main(["subtract", where, str(adapter), "--output", f"{where}-back", *how, "--quiet"]) == 0
    )
    assert "subtract --merged MERGED --adapters ADAPTER" in capsys.readouterr().err
    assert (tmp_path / "merged-back" / name).is_file()


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (["info"], ["inspect"]),
        (["similar"], ["similarity"]),
        (["lineage", "--checkpoints"], ["trajectory"]),
        (["lineage", "--checkpoints", "--by", "name"], ["trajectory", "--by", "name"]),
    ],
    ids=str,
)
def test_older_commands_still_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], older: list[str], newer: list[str]
) -> None:
    make_adapter(tmp_path / "run" / "checkpoint-1")
    where = str(tmp_path / "run" / ("" if "checkpoints" in older[-1] else "checkpoint-1"))
    assert main([*newer, where, "--json"]) == 0
    expected = capsys.readouterr().out
    assert main([*older, where, "--json"]) == 0
    streams = capsys.readouterr()
    assert streams.out == expected
    assert streams.err.splitlines()[0].endswith(f" is called {newer[0]} now")


def test_older_spellings_are_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "verify", "subtract", "lineage"):
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert not {"--merge-strategy", "--merge-dtype", "--checkpoints"} & set(shown.split())
        assert "SUPPRESS" not in shown
    assert main(["--help"]) == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"inspect", "similarity"} <= shown
    assert not {"info", "similar"} & shown


def test_a_subtraction_given_both_ways_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["subtract", "one", "two", "--merged", "three", "--output", "out"]
    assert main(words) == 2
    assert "unrecognized arguments: one" in capsys.readouterr().err
