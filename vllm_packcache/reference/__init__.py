"""The whole method in plain PyTorch: slow, obvious, and what every fast path is compared with."""

from vllm_packcache.reference.emu3 import Emu3Reference
from vllm_packcache.reference.guided import GuidedVideo, generate_guided
from vllm_packcache.reference.llama import Generation, LlamaReference
from vllm_packcache.reference.lumos import LumosReference
from vllm_packcache.reference.masked_video import MaskedGeneration, MaskedVideo, generate_masked
from vllm_packcache.reference.models import make_random_emu3, make_random_llama, make_random_lumos
from vllm_packcache.reference.quantised import QuantisedLumosReference, QuantisedReference
from vllm_packcache.reference.visibility import frame_visibility, positions, visibility

__all__ = [
    "Emu3Reference",
    "Generation",
    "GuidedVideo",
    "LlamaReference",
    "LumosReference",
    "MaskedGeneration",
    "MaskedVideo",
    "QuantisedLumosReference",
    "QuantisedReference",
    "frame_visibility",
    "generate_guided",
    "generate_masked",
    "make_random_emu3",
    "make_random_llama",
    "make_random_lumos",
    "positions",
    "visibility",
]
