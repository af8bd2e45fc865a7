"""Converting adapters from one format into another."""
