"""Tokenizers of masked models (Lumos-1), from local files: of text and of video."""
