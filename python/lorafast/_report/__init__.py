"""Views of results: Markdown, HTML, plots, tables and JSON."""
