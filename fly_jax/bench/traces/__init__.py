"""Recorded traces of requests: one module a format, each an iterator over the rows of a file."""
