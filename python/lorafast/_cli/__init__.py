"""The `lorafast` command."""
