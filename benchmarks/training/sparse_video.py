"""Videos of the demo model under any policy that keeps where they begin: many at once, computed where somebody asks.

What lives while a frame is made is asked of the same core as in the engine. `tests/benchmarks/test_sparse.py` compares
with the reference, which computes everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.training.live import live_tokens, retention_of
from benchmarks.training.llama import Llama
from benchmarks.training.sparse import LOOKS, Asked, hidden, learn_words
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.retention import Retention, some_tokens
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, FRAME_TOKENS, TEXT_TOKENS, VideoTokenizer
from vllm_packcache.reference.guided import combined

Int64 = npt.NDArray[np.int64]

Bool = npt.NDArray[np.bool_]

NOT_ASKED = -1
"""In place of a token that nobody asked for."""


def is_computable(plan: Plan, block_size: int, frames: int) -> bool:
    """Whether the whole text lives, which heads were trained with, and nothing is where heads look wrongly.

    Args:
        plan: of a video.
        block_size: tokens of a KV-cache block.
        frames: of the video.
    """
    window = plan.positions.window
    # What outlives the window stays at the place of its oldest frame.
    if plan.policy.outlives_window and (window is None or (window - 1) * FRAME_TOKENS <= max(LOOKS)):
        return False
    retention = Retention(plan.layout, plan.policy, block_size, some_tokens)
    return all(live_tokens(retention, frame)[: 1 + TEXT_TOKENS].all() for frame in range(frames))


class LivePast:
    """A `sparse.Past` of one frame of V videos.

    Args:
        plan: of all of them.
        retentions: what each keeps, or one for all.
        videos: V.
        frame: the frame that is made.
    """

    def __init__(self, plan: Plan, retentions: Sequence[Retention], videos: int, frame: int) -> None:
        live = np.stack([live_tokens(retention, frame) for retention in retentions])
        self._live = torch.from_numpy(live).expand(videos, -1)
        self._slide = plan.positions.window_start(frame) * FRAME_TOKENS

    def slide(self, rows: Asked) -> Tensor:
        """As `sparse.Past`."""
        return torch.full_like(rows.place, self._slide)

    def there(self, rows: Asked, at: Tensor) -> Tensor:
        """As `sparse.Past`."""
        return self._live[rows.video[:, None], at]

    def words(self) -> Tensor:
        """As `sparse.Past`."""
        return self._live[:, 1 : 1 + TEXT_TOKENS]


def _retentions(plan: Plan, block_size: int, ids: Int64) -> list[Retention]:
    """What each video keeps; one for all, where that does not hang on what they show."""
    if plan.policy.reads_tokens:
        return [retention_of(plan, block_size, own) for own in ids]
    return [retention_of(plan, block_size, ids[0])]


@torch.inference_mode()
def generate(
    model: Llama,
    tokenizer: VideoTokenizer,
    plan: Plan,
    block_size: int,
    prompts: Int64,
    frames: int,
    scale: float = 1.0,
) -> Int64:
    """Greedy videos of V prompts, or guided ones: each then has a stream without the words beside it.

    Args:
        model: the model.
        tokenizer: of the ids.
        plan: of every video; see `is_computable`.
        block_size: tokens of a KV-cache block.
        prompts: conditions, [V, C].
        frames: T.
        scale: of guidance; 1: none.

    Returns:
        Token ids, [V, T, F].
    """
    videos, stop = len(prompts), CONDITION_TOKENS + frames * FRAME_TOKENS
    conditions = prompts if scale == 1 else np.concatenate([prompts, without_words(tokenizer, prompts)])
    # Second streams are videos of their own, behind the first ones: conditions have one length, so one plan fits both.
    streams = len(conditions) // videos
    ids = np.zeros((len(conditions), stop), dtype=np.int64)
    ids[:, :CONDITION_TOKENS] = conditions
    shown, every = torch.from_numpy(ids), torch.arange(len(ids))
    known = learn_words(model, tokenizer, shown)
    retentions = _retentions(plan, block_size, ids)
    first = CONDITION_TOKENS
    for frame in range(frames):
        past = LivePast(plan, retentions, len(ids), frame)
        start = plan.layout.frame_start(frame)
        # The last token of a frame says what the next one begins with.
        for place in range(first, min(stop, start + FRAME_TOKENS + 1)):
            asked = Asked(every, torch.full_like(every, place))
            logits = model.logits(hidden(model, tokenizer, shown, past, asked, known))
            if streams > 1:
                own, without = logits.split(videos)
                logits = combined(own, without, scale)
            shown[:, place] = logits.argmax(-1).repeat(streams)
        first = start + FRAME_TOKENS + 1
    return ids[:videos, CONDITION_TOKENS:].reshape(videos, frames, FRAME_TOKENS)


def without_words(tokenizer: VideoTokenizer, prompts: Int64) -> Int64:
    """The same conditions with an empty text, [..., C]: what a tenth of the model's training had."""
    dropped = prompts.copy()
    dropped[..., 1 : 1 + TEXT_TOKENS] = tokenizer.pad_id
    return dropped


@torch.inference_mode()
def likeliest(model: Llama, tokenizer: VideoTokenizer, plan: Plan, block_size: int, ids: Int64, asked: Bool) -> Int64:
    """The most likely visual tokens of V videos, each after the true ones before it.

    Args:
        model: the model.
        tokenizer: of the ids.
        plan: of every video; see `is_computable`.
        block_size: tokens of a KV-cache block.
        ids: of the conditions and T whole frames, [V, C + T F].
        asked: which tokens are asked for, [V, T, F - 1]: the first token of a frame is none of the picture's.

    Returns:
        Token ids, [V, T, F - 1], `NOT_ASKED` where nobody asked.
    """
    found = np.full(asked.shape, NOT_ASKED, dtype=np.int64)
    shown = torch.from_numpy(ids)
    known = learn_words(model, tokenizer, shown)
    retentions = _retentions(plan, block_size, ids)
    for frame in range(asked.shape[1]):
        video, token = asked[:, frame].nonzero()
        if len(video):
            past = LivePast(plan, retentions, len(ids), frame)
            place = plan.layout.frame_start(frame) + 1 + token
            wanted = Asked(torch.from_numpy(video), torch.from_numpy(place))
            said = model.logits(hidden(model, tokenizer, shown, past, wanted, known)).argmax(-1)
            found[video, frame, token] = said.numpy()
    return found
