"""Where a model's attention goes, as ``vllm-packcache calibrate`` measures it."""
