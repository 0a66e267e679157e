"""Measurements: one command each, results as ratios of interleaved runs."""
