"""Serve autoregressive video models through vLLM with a KV cache that stays bounded."""
