"""Checkpoints as their authors publish them, made into folders that vLLM loads."""
