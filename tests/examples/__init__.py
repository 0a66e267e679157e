"""What is in `examples/` runs as it stands."""
