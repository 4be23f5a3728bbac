"""Distributed training whose runs come back bit for bit: a run is a function of (recipe, seed, step)."""

__version__ = "0.1.0"
