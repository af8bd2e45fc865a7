"""Fleets: what each of many adapters holds."""
