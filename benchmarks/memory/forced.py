"""The likeliest tokens of a video, each after the true ones before it, under many policies at once.

Since the true tokens are known, so is what lives, before anything is computed. There is no cache that drops and turns:
keys and values of the whole video have a place each, and a frame is one pass that gathers those it may read. What a
token leaves in the deeper layers depends on what its frame could read, so policies that have kept the same up to a
frame share everything up to it; where they part, each overwrites the frames behind what they share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from benchmarks.training.llama import Llama, rotary_table, rotate
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.retention import Retention

Int64 = npt.NDArray[np.int64]

NOT_ASKED = -1
"""In place of a token that nobody asked for."""


@torch.inference_mode()
def likeliest(
    model: Llama, plans: Sequence[Plan], block_size: int, ids: Int64, asked: npt.NDArray[np.bool_]
) -> list[Int64]:
    """The most likely visual tokens of a video under each of ``plans``.

    Args:
        model: the model.
        plans: what the video keeps, and where the model sees it; one axis, and all of one layout.
        block_size: tokens of a KV-cache block.
        ids: of the condition and T whole frames.
        asked: which tokens are asked for, [T, F - 1]: the first token of a frame is none of the picture's.

    Returns:
        Of each plan its token ids, [T, F - 1], `NOT_ASKED` where nobody asked.
    """
    return _Video(model, plans, block_size, ids, asked).likeliest()


class _Video:
    """Keys and values of one video, and what is found about it: see `likeliest`."""

    def __init__(
        self, model: Llama, plans: Sequence[Plan], block_size: int, ids: Int64, asked: npt.NDArray[np.bool_]
    ) -> None:
        size = model.size
        self._model = model
        self._plans = plans
        self._layout = plans[0].layout
        self._retentions = [
            Retention(plan.layout, plan.policy, block_size, lambda start, stop: ids[start:stop]) for plan in plans
        ]
        self._ids = torch.from_numpy(ids)
        self._asked = asked
        self._found = [np.full(asked.shape, NOT_ASKED, dtype=np.int64) for _ in plans]
        self._cos, self._sin = (table[:, None] for table in rotary_table(size, 0, len(ids)))
        shape = (size.num_hidden_layers, len(ids), size.num_key_value_heads, size.head_dim)
        self._keys, self._values = torch.empty(shape), torch.empty(shape)

    def likeliest(self) -> list[Int64]:
        nothing = np.zeros(0, dtype=np.int64)
        self._pass(nothing, nothing, CONDITION, nothing)
        self._go_on(0, range(len(self._plans)))
        return self._found

    def _go_on(self, frame: int, numbers: Sequence[int]) -> None:
        """All frames from ``frame`` on, of plans that have shared everything before it."""
        if frame == len(self._asked):
            return
        parts = defaultdict(list)
        for number in numbers:
            past = self._retentions[number].past(frame)
            parts[past.tobytes(), self._plans[number].positions.window_start(frame)].append(number)
        for (_, window_start), sharing in parts.items():
            asked = np.flatnonzero(self._asked[frame])
            best = self._pass(*self._past(frame, window_start, self._retentions[sharing[0]]), frame, asked)
            for number in sharing:
                self._found[number][frame, asked] = best
            self._go_on(frame + 1, sharing)

    def _past(self, frame: int, window_start: int, retention: Retention) -> tuple[Int64, Int64]:
        """Tokens that live while ``frame`` is made, and by how much the window has left the first of them behind.

        Only distances count. Where the window slides, frames come nearer to the condition, and to what has outlived the
        window, and keep their distances to each other: the same as if only these moved, which are few.
        """
        size, blocks = retention.block_size, retention.past(frame)
        # The tag of a block of the condition is none of a frame: it stays as if it were of the first.
        tags = np.maximum(retention.blocks.tags(blocks), 0)
        behind = (window_start - tags) * self._layout.tokens_per_frame
        past = (blocks[:, None] * size + np.arange(size)).reshape(-1)
        tail = np.arange(retention.blocks.tail_start(frame) * size, self._layout.frame_start(frame))
        return np.concatenate([past, tail]), behind[behind > 0].repeat(size)

    def _pass(self, past: Int64, behind: Int64, frame: int, asked: Int64) -> Int64:
        """Keys and values of the tokens of ``frame``, which read those of ``past`` and one another.

        Args:
            past: tokens before the frame.
            behind: by how much the first of them are nearer than their indices say.
            frame: 0 or more, or `CONDITION`.
            asked: which of the frame's tokens are asked about.

        Returns:
            The most likely token after each of ``asked``.
        """
        start, stop = self._layout.frame_start(frame), self._layout.frame_start(frame + 1)
        own = slice(start, stop)
        live, turned = torch.from_numpy(np.concatenate([past, np.arange(start, stop)])), torch.from_numpy(behind)
        mask = torch.full((stop - start, len(live)), float("-inf")).triu(len(past) + 1)
        cos, sin = self._cos[own], self._sin[own]
        x = self._model.model.embed_tokens(self._ids[own])
        for number, layer in enumerate(self._model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            keys, values = self._keys[number], self._values[number]
            keys[own] = rotate(attention.k_proj(normed).view(keys[own].shape), cos, sin)
            values[own] = attention.v_proj(normed).view(values[own].shape)
            if number == len(self._model.layers) - 1:
                # Nobody reads what the last layer makes of the others.
                rows = torch.from_numpy(asked)
                x, normed, mask, cos, sin = (of_all[rows] for of_all in (x, normed, mask, cos, sin))
            queries = rotate(attention.q_proj(normed).unflatten(-1, (-1, keys.shape[-1])), cos, sin)
            read_keys = keys[live]
            moved = read_keys[: len(behind)]
            moved.copy_(rotate(moved, self._cos[turned], self._sin[turned]))
            q, k, v = (each.transpose(0, 1)[None] for each in (queries, read_keys, values[live]))
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0]
            x = x + attention.o_proj(read.transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        best: Int64 = self._model.logits(self._model.model.norm(x)).argmax(-1).numpy()
        return best
