"""Benchmark sets: their files, metrics with intervals, records on disk, and the paper's numbers."""
