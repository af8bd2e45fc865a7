"""Names of devices and amounts of their memory, as users write them; without torch."""

from __future__ import annotations

import re

#: The forms of a device's name, for messages and help.
FORMS = "cpu, cuda, cuda:N, auto, torch:cpu"
#: The core with AMX, which is for merges alone.
AMX = "cpu:amx"
#: Less than this holds no tile worth sending.
MIN_MEMORY = 1 << 20
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def check_name(name: str) -> str:
    """Returns a device's name if it has one of the known forms.

    Raises:
        ValueError: it has not.
    """
    if re.fullmatch(r"cpu|auto|torch:cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"unknown device {name!r}; there are {FORMS}")
    return name


def check_merge_name(name: str) -> str:
    """As `check_name`, for what merges: AMX has a name there, too."""
    if name == AMX:
        return name
    try:
        return check_name(name)
    except ValueError as error:
        raise ValueError(f"{error}, {AMX}") from None


def check_merge_device(name: str) -> str:
    """As `check_merge_name`, where the device is about to be used.

    Raises:
        ValueError: it is no device's name.
        DeviceError: it asks for AMX, and there is none.
    """
    if check_merge_name(name) == AMX:
        from lorafast._core import build_info
        from lorafast._errors import DeviceError

        if not build_info()["amx"]:
            raise DeviceError(
                f"device {name!r} cannot be used: this processor has no AMX with bf16, or its "
                "system does not let processes use it; use device='cpu'"
            )
    return name


def parse_memory(memory: int | str | None, device: str) -> int | None:
    """Bytes from a number or a text such as "2GiB" or "500 MB".

    Args:
        memory: bytes, a text with a unit, or None for no bound.
        device: the name of the device that it bounds.

    Raises:
        ValueError: it is no such amount, less than 1 MiB, or bounds the CPU's own backend.
    """
    if memory is None:
        return None
    if device in ("cpu", AMX):
        raise ValueError(f"device_memory bounds the memory of a device, and device is {device!r}")
    return parse_size(memory, "device_memory")


def parse_size(size: int | str, name: str) -> int:
    """Bytes from a number or a text such as "2GiB" or "500 MB".

    Args:
        size: bytes, or a text with a unit.
        name: what messages call it.

    Raises:
        ValueError: it is no such amount, or less than 1 MiB.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", size, re.IGNORECASE)
        if found is None:
            raise ValueError(f"{name} is {size!r}; give bytes, or as '2GiB' or '500MB'")
        size = int(float(found[1]) * UNITS[(found[2] or "").upper()])
    if size < MIN_MEMORY:
        raise ValueError(f"{name} is {size} bytes; it is at least 1 MiB")
    return size
