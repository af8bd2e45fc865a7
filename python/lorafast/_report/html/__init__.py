"""Reports as HTML documents."""
