"""Fleets: many adapters at once, what each holds and which of them are alike."""
