"""How alike the adapters of a fleet are: matrices, clusters, duplicates, lineages, trajectories."""
