"""Model classes that vLLM lacks. They know vLLM's layers; how their caches are managed is for engine and worker."""
