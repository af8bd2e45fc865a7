"""Flags of NeuroTrain's `lora_merge.py`: its command lines change the program's name alone."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from lorafast._cli.options import say_renamed
from lorafast._cli.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Flags that change nothing here, each with the reason.
WITHOUT_EFFECT = {
    "--trust-remote-code": "no code of a model or adapter is ever run",
    "--save-tokenizer": "the tokenizer is written beside the model without it",
    "--use-proxy": "the hub's client takes the proxy of HTTPS_PROXY by itself",
}
#: Of the values of --device-map those that name one device, or leave the choice.
DEVICE = re.compile(r"cpu|auto|cuda|(?:cuda:)?(\d+)")


def add_neurotrain_arguments(
    parser: argparse.ArgumentParser,
    inputs: argparse._ArgumentGroup,
    outcome: argparse._ArgumentGroup,
) -> None:
    """Declare the flags that have no other name here.

    Args:
        parser: the command's, which understands those without an effect as well.
        inputs: the group of what is merged.
        outcome: the group of what is written.
    """
    inputs.add_argument(
        "--local-files-only",
        action="store_true",
        help="take hub ids from the local cache, and never ask the hub",
    )
    outcome.add_argument(
        "--no-safetensors",
        dest="save_safetensors",
        action="store_false",
        help="write .bin files instead, by torch",
    )
    for flag in WITHOUT_EFFECT:
        parser.add_argument(flag, nargs=0, action=_WithoutEffect, help=argparse.SUPPRESS)
    parser.add_argument("--device-map", action=_DeviceMap, help=argparse.SUPPRESS)


class _WithoutEffect(argparse.Action):
    """A flag that is accepted, and says that it changes nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Say why."""
        flag = str(option_string)
        _say_without_effect(flag, WITHOUT_EFFECT[flag])


class _DeviceMap(argparse.Action):
    """A map of a model's layers to devices: one device is where products are made."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Take the device, or say why there is nothing to map."""
        value = str(values)
        found = DEVICE.fullmatch(value)
        if found is None:
            reason = "no model is loaded whose layers could be mapped; --device says where "
            _say_without_effect(f"--device-map {value}", reason + "products are made")
            return
        say_renamed("--device-map", "--device")
        namespace.device = value if found[1] is None else f"cuda:{found[1]}"


def _say_without_effect(flag: str, reason: str) -> None:
    print(printable(f"note: {flag} has no effect: {reason}"), file=sys.stderr)
