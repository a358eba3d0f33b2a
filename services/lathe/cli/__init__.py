"""The `lathe` command."""
