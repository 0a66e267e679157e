"""Where cached keys lie, and how they are rotated in place."""
