"""The report of all benchmarks: what is general of it."""
