"""Files: small ones written whole, temporary directories, and paths that others may have spoilt."""
