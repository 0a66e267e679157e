"""A Llama whose positions have three axes, for vLLM: text is at its index on all of them."""

from __future__ import annotations

import torch
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llama import LlamaForCausalLM


class MRopeLlamaForCausalLM(LlamaForCausalLM, SupportsMRoPE):
    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[torch.Tensor, int]:
        return torch.arange(len(input_tokens)).expand(3, -1), 0
