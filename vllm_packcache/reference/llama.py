"""A Llama that keeps its whole history and applies the method as masks and positions.

One request at a time, float32, on the CPU. Keys are stored un-rotated and rotated whenever they are read, so
that a position may depend on the frame being made. Nothing is evicted, compacted or paged: a dropped token
is one that a mask hides. Keys and values are computed once, from hidden states that saw what was visible
then; later evictions do not change them, exactly as in a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vllm_packcache.core.layout import CONDITION, Segment
from vllm_packcache.core.plan import Plan
from vllm_packcache.families.checkpoint import DecoderConfig, read_config, require, rope_of
from vllm_packcache.reference.decoder import Decoder, read_weights
from vllm_packcache.reference.visibility import Live, positions, seen, visibility


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """The part of a checkpoint's ``config.json`` that the computation needs.

    Args:
        rope_sections: how many of the D/2 frequencies turn with each axis of a position; empty: there is one axis.
        rope_interleaved: the axes take turns, the first taking what is left over; otherwise each has a run.
    """

    rope_sections: tuple[int, ...]
    rope_interleaved: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face ``config.json``, as transformers 5 or an earlier version writes it.

        Raises:
            ValueError: the checkpoint is no plain Llama.
        """
        require(
            {
                "model_type": (config.get("model_type"), "llama"),
                "hidden_act": (config.get("hidden_act", "silu"), "silu"),
                "attention_bias": (config.get("attention_bias", False), False),
                "mlp_bias": (config.get("mlp_bias", False), False),
            }
        )
        rope = rope_of(config)
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=rope["rope_theta"],
            rope_sections=tuple(rope.get("mrope_section", ())),
            rope_interleaved=rope.get("mrope_interleaved", False),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
        )


@dataclass(frozen=True)
class Generation:
    """What one greedy request produced.

    Args:
        token_ids: n generated tokens.
        logits: float32, [n, vocabulary]: the logits of which each token is the argmax.
    """

    token_ids: list[int]
    logits: Tensor

    @property
    def gaps(self) -> Tensor:
        """[n], by how much the best logit exceeds the second: a tie that rounding may turn is near 0."""
        best = self.logits.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]


class LlamaReference(Decoder):
    """The oracle: a Llama checkpoint, computed plainly.

    Args:
        config: the checkpoint's shape.
        weights: its tensors by their Hugging Face names; they are converted to float32.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__(config, weights, _axis_of(config))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder with ``config.json`` and ``*.safetensors``.

        Raises:
            FileNotFoundError: one of the two is missing.
            ValueError: the checkpoint is no plain Llama.
        """
        return cls(LlamaConfig.from_json(read_config(path)), read_weights(path))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], plan: Plan | None = None, block_size: int = 32) -> Tensor:
        """Logits of every position of a given sequence of T tokens (teacher forcing).

        Args:
            token_ids: T tokens, condition first.
            plan: layout and policy of the request; None: the whole cache is kept.
            block_size: tokens of a KV-cache block; without a plan it does not matter.

        Returns:
            float32, [T, vocabulary].

        Raises:
            ValueError: there are no tokens.
        """
        if not token_ids:
            raise ValueError("token_ids must hold at least one token")
        mask = visibility(plan, block_size, len(token_ids), token_ids)
        return self._forward(token_ids, 0, self.new_cache(len(token_ids)), mask, plan, block_size)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        plan: Plan | None = None,
        block_size: int = 32,
        allowed: Callable[[Sequence[int]], range] | None = None,
    ) -> Generation:
        """Generate greedily, token by token; no token ends the sequence early.

        Args:
            prompt_ids: the prompt: the condition, and any given frames.
            max_tokens: n, tokens to generate.
            plan: layout and policy of the request; None: the whole cache is kept.
            block_size: tokens of a KV-cache block; without a plan it does not matter.
            allowed: from all tokens so far to the ids that the next one may have; None: any.

        Raises:
            ValueError: the prompt is empty or ``max_tokens`` is below 1.
        """
        if not prompt_ids or max_tokens < 1:
            raise ValueError("prompt_ids must hold at least one token and max_tokens be at least 1")
        # The last generated token is never read.
        length = len(prompt_ids) + max_tokens - 1
        cache = self.new_cache(length)
        tokens = list(prompt_ids)
        by_tokens = plan is not None and plan.policy.reads_tokens
        mask = visibility(None if by_tokens else plan, block_size, length)
        live = Live(plan, block_size, tokens) if plan is not None and by_tokens else None
        logits = []
        for index in range(length):
            if live is not None:
                # What lives while a frame is made depends on the frames before it.
                mask[index] = seen(live, block_size, index, length)
            step = self._forward(tokens[index : index + 1], index, cache, mask, plan, block_size)
            if index >= len(prompt_ids) - 1:
                if allowed is not None:
                    may = allowed(tokens)
                    step[:, : may.start] = step[:, may.stop :] = float("-inf")
                logits.append(step)
                tokens.append(int(step.argmax()))
        return Generation(tokens[len(prompt_ids) :], torch.cat(logits))

    @torch.inference_mode()
    def unrotated_keys(self, token_ids: Sequence[int], plan: Plan | None = None, block_size: int = 32) -> Tensor:
        """Keys of a given sequence of T tokens before rotation: arguments as for `logits`.

        Returns:
            float32, [layers, T, G, D].
        """
        cache = self.new_cache(len(token_ids))
        mask = visibility(plan, block_size, len(token_ids), token_ids)
        self._forward(token_ids, 0, cache, mask, plan, block_size)
        return cache[:, 0]

    def _forward(
        self,
        token_ids: Sequence[int],
        start: int,
        cache: Tensor,
        mask: Tensor,
        plan: Plan | None,
        block_size: int,
    ) -> Tensor:
        """Compute the tokens ``[start, start + n)``, write their keys and values to ``cache``.

        Returns:
            float32, [n, vocabulary].
        """
        stop = start + len(token_ids)
        segments = [Segment(CONDITION, start, stop)]
        if plan is not None:
            segments = list(plan.layout.segments(start, stop))

        def attend(queries: Tensor, cached: Tensor) -> Tensor:
            # The frame decides about positions: one attention for the queries of each.
            read = []
            for frame, first, last in segments:
                at = positions(plan, block_size, len(mask), frame)
                # Nothing later than the last query is visible, or computed yet.
                read.append(
                    self.attention(
                        queries[first - start : last - start],
                        at[:, first:last],
                        cached[:, :last],
                        at[:, :last],
                        mask[first:last, :last],
                    )
                )
            return torch.cat(read)

        return self.output(self.hidden_states(token_ids, start, cache, attend))


def _axis_of(config: LlamaConfig) -> Tensor:
    """The axis that each of the D/2 frequencies turns with, [D/2]."""
    axis_of = torch.zeros(config.head_dim // 2, dtype=torch.int64)
    start = 0
    for axis, section in enumerate(config.rope_sections):
        if config.rope_interleaved:
            axis_of[axis : 3 * section : 3] = axis
        else:
            axis_of[start : start + section] = axis
        start += section
    return axis_of
