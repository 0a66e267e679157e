"""Sentences, pictures and token ids of the masked demo model.

Special tokens, numbers and the place of visual ids are those of Lumos-1 (`vllm_packcache.families.lumos`); the words of
the prompts take the low ids, and visual code c is codeword c of the first demo model's codebook.
"""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from vllm_packcache.demo.tokenizer import WORDS
from vllm_packcache.demo.world import GRID, World, palette
from vllm_packcache.families import lumos

GRID_SHAPE = (GRID, GRID)
FRAME = lumos.frame_layout(GRID_SHAPE)
RATE = 4
"""Frames per second that prompts state: a second is then as long as a latent frame after the first one."""
MAX_SECONDS = 64
"""Longest duration that the model was shown."""

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def build_text_tokenizer() -> Tokenizer:
    """Words of the prompts as ids from 4 on.

    What Lumos-1 puts around a caption (`vllm_packcache.families.lumos.question`) is taken off: it is the same for every
    video.
    """
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*SPECIALS, *WORDS))}, unk_token="<unk>"))
    question = Regex(r"^generate a video with .* according to the following prompt:\s*")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(question, "")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]+"), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


def used_ids() -> np.ndarray:
    """Every id that the model can meet, ascending; the visual ones are the last. The other rows are zero."""
    words = np.arange(len(SPECIALS) + len(WORDS))
    numbers = lumos.NUMBER_ZERO + np.arange(MAX_SECONDS + 1)
    specials = [
        *(lumos.FRAME_END, lumos.FRAME_BEGIN, lumos.SEPARATOR, lumos.NEWLINE),
        *(lumos.MASK, lumos.VIDEO_BEGIN, lumos.VIDEO_END),
    ]
    visual = lumos.VISUAL_BEGIN + np.arange(len(palette().patches))
    return np.unique(np.concatenate([words, numbers, specials, visual]))


def prompt(text: str, seconds: int, tokenizer: Tokenizer) -> list[int]:
    """The prompt of text to video; the frame of a conditioning image may follow it.

    Args:
        text: what should happen.
        seconds: duration of the video: its latent frames after the first.
        tokenizer: of `build_text_tokenizer`.
    """
    return lumos.text_prompt(tokenizer.encode(text, add_special_tokens=False).ids, seconds, RATE)


def world_frame(video: World, k: int) -> np.ndarray:
    """Ids of frame ``k`` of a world with its special tokens, int64 [276]."""
    return lumos.frame_of_codes(video.frame_ids(k))
