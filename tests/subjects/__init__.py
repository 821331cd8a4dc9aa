"""Parallel code that people already have, held as it is: see docs/what-is-already-there.md."""
