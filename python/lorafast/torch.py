"""Merging adapters into loaded modules of torch, in place.

`merge_into` adds adapters to a module's weights and returns a handle to take them out again or to
swap them; `applied` does so for the length of a `with` block. torch itself is imported by what is
called, not by this module.
"""

from lorafast._torch.in_place import Restoration
from lorafast._torch.live_merge import MergedModule, applied, merge_into

__all__ = ["MergedModule", "Restoration", "applied", "merge_into"]

for _value in (MergedModule, Restoration, applied, merge_into):
    _value.__module__ = __name__
del _value
