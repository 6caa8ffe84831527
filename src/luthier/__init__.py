"""Luthier: turns a general open-weight language model into a precise tool for one job, and proves it did."""

__version__ = "0.1.0"
