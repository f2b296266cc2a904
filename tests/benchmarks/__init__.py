"""Measurements, run by hand: `python -m tests.benchmarks.NAME`, --help for the options.

Each prints what it measured, beside the goal and the machine. Ratios are of medians, from runs that
take turns on the same machine. Without --data they make synthetic slices.
"""
