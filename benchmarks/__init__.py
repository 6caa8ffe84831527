"""Measurements beside other tools, each one command: `python -m benchmarks.NAME`."""
