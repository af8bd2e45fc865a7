"""The flag that names a device."""

from __future__ import annotations

import argparse


def add_device_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare `--device` of a command that analyses."""
    parser.add_argument(
        "--device",
        type=device_name,
        default="cpu",
        metavar="DEVICE",
        help=f"where {what}: cpu, cuda, cuda:N, auto (CUDA where there is a device), or torch:cpu "
        "to compare backends (default: %(default)s)",
    )


def device_name(name: str) -> str:
    """Return the name if it is of a device, as argparse's `type`."""
    from lorafast._io.device_names import check_name

    try:
        return check_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
