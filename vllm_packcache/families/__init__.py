"""What one must know of a model family: its ids, its grammar, how its frames are made. One file each, pure."""
