"""Benchmarks: one file per operator and per system.

`python -m bench` times all contenders in turn and writes one table; `pytest bench/` times them one by one.
"""
