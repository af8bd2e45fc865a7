"""Adapters made from adapters."""
