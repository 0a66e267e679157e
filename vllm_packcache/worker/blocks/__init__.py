"""What attention reads: block tables of live blocks only."""
