"""Merging adapters into checkpoints, and undoing, verifying and planning it."""
