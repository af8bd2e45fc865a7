"""Similarity of adapters: matrices, clusters, duplicates, lineages, trajectories."""
