"""Clients in other languages and with other libraries, and what builds and runs them: `python -m examples`."""
