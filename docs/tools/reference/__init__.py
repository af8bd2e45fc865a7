"""Writes what the documents say of the command, its errors and its findings, from the code."""
