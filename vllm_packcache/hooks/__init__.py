"""The only room that installs into vLLM."""
