"""Measurements, run by hand: `python -m tests.benchmarks.NAME`, --help for the options.

Each prints what it measured, beside the goal and the machine. Ratios are of medians over
interleaved repetitions on one machine. Without data of yours they use synthetic CT.
"""
