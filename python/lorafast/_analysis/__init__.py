"""Analyses of one adapter, comparisons of several, and findings."""
