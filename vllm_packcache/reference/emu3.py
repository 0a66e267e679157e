"""Emu3 and Emu3.5 in plain PyTorch: the Llama's loop, with norms of heads where the checkpoint has their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import Tensor

from vllm_packcache.families.checkpoint import read_config, require
from vllm_packcache.reference.decoder import read_weights
from vllm_packcache.reference.llama import LlamaConfig, LlamaReference

END_OF_LINE, END_OF_FRAME, END, IMAGE, IMAGE_BEGIN, IMAGE_END = 151846, 151847, 151850, 151851, 151852, 151853
PADDING = 151643
VISUAL = range(151854, 184622)
VISUAL_3_5 = range(151854, 282926)
STAR, DIGIT = 9, 15


class Emu3Reference(LlamaReference):
    """The oracle of a checkpoint as BAAI publishes it."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder with ``config.json`` and ``*.safetensors``.

        Raises:
            FileNotFoundError: one of the two is missing.
            ValueError: the checkpoint is no Emu3.
        """
        config = read_config(path)
        require({"model_type": (config.get("model_type"), "Emu3")})
        return cls(LlamaConfig.from_json({**config, "model_type": "llama"}), read_weights(path))

    def _head_norm(self, heads: Tensor, name: str) -> Tensor:
        return self._norm(heads, name) if f"{name}.weight" in self._weights else heads


def emu3_picture(tokens: Sequence[int], grid: tuple[int, int]) -> range:
    """Which ids may follow ``tokens``, whose first image token a picture of ``grid`` follows: Emu3's own loop."""
    rows, columns = grid
    made = len(tokens) - tokens.index(IMAGE)
    if made % (columns + 1) == 0:
        return one(END_OF_LINE)
    over = made - rows * (columns + 1)
    return VISUAL if over < 0 else one({1: END_OF_FRAME, 2: IMAGE_END, 3: END}.get(over, PADDING))


def emu3_5_picture(tokens: Sequence[int], grid: tuple[int, int]) -> range:
    """Which ids may follow ``tokens``: Emu3.5's own loop, where pictures of ``grid`` follow each other directly."""
    rows, columns = grid
    begun = last(tokens, IMAGE_BEGIN)
    if begun <= last(tokens, IMAGE_END):
        return one(IMAGE_BEGIN)
    head = [*size_ids(rows), STAR, *size_ids(columns), IMAGE]
    if len(tokens) - begun <= len(head):
        return one(head[len(tokens) - begun - 1])
    made = len(tokens) - last(tokens, IMAGE)
    if made == rows * (columns + 1):
        return one(IMAGE_END)
    return one(END_OF_LINE) if made % (columns + 1) == 0 else VISUAL_3_5


def univla_frames(tokens: Sequence[int], grid: tuple[int, int]) -> range:
    """Which ids may follow ``tokens``, where UniVLA's own loop draws a picture and appends the head of the next one."""
    rows, columns = grid
    between = [END_OF_FRAME, IMAGE_END, IMAGE_BEGIN, DIGIT + 1, STAR, *size_ids(rows), STAR, *size_ids(columns), IMAGE]
    over = len(tokens) - last(tokens, IMAGE) - 1 - rows * columns
    return VISUAL if over < 0 else one(between[over])


def size_ids(number: int) -> list[int]:
    """A number as a head states it: a token for each digit."""
    return [DIGIT + int(digit) for digit in str(number)]


def one(token: int) -> range:
    """This id and no other."""
    return range(token, token + 1)


def last(tokens: Sequence[int], token: int) -> int:
    """Where ``token`` stands last; -1: nowhere."""
    return max((place for place, own in enumerate(tokens) if own == token), default=-1)
