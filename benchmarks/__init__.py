"""Measurements, each a program: `python -m benchmarks` lists them."""
