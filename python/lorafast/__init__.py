"""Merge LoRA adapters into safetensors checkpoints, and measure what adapters hold."""

from lorafast._core import __version__ as __version__
