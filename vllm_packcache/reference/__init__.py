"""The whole method in plain PyTorch: slow, obvious, and what every fast path is compared with."""

from vllm_packcache.reference.llama import Generation, LlamaReference
from vllm_packcache.reference.models import make_random_llama
from vllm_packcache.reference.visibility import positions, visibility

__all__ = ["Generation", "LlamaReference", "make_random_llama", "positions", "visibility"]
