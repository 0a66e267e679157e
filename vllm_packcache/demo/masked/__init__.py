"""A small model in Lumos-1's architecture on the toy world: text, guidance and frame-parallel masked decoding."""
