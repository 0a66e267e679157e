"""A small world to play: rooms, things that are left in them, and a model that makes the next picture of an action."""
