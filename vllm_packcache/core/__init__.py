"""What is decided, without vLLM and torch: layouts, blocks, policies, retention, positions, plans."""
