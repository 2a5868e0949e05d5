"""Bytes that no client of ours would send, at every door: `python -m tests.fuzz`."""
