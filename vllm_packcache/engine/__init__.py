"""Scheduler side: the KV cache spec that carries the policy, and the manager that frees blocks by it."""
