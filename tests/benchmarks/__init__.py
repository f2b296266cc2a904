"""Measurements, run by hand: `python -m tests.benchmarks.NAME`, --help for the options.

Ratios are of medians over interleaved repetitions. Without data of yours they use synthetic CT.
"""
