"""What adapters hold: the analysis of one, the comparison of several, and findings."""
