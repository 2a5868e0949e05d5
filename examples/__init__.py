"""Clients in other languages, and what builds and runs them: `python -m examples`."""
