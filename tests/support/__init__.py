"""Makers of inputs, a float64 reference and comparisons, for the tests."""
