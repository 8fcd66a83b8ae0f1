"""The built-in passes, one file each. The pipeline registry finds them by their decorator; nothing is listed here."""
