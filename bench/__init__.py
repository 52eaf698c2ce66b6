"""Benchmarks: ``python -m bench run | compare | plot``.

Ratios between variants that ran interleaved in one process are what counts; absolute times are kept
beside them. bench/floor.py says what the floor is, bench/memory.py what peak memory is.
"""
