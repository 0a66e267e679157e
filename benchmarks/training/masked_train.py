"""Train the masked demo model on a CPU.

``python -m benchmarks.training.masked_train --out DIR --minutes 70 --seed 0``

As in `benchmarks.training.train`, the learning rate and the length of the videos follow the clock, and a run that was
stopped goes on from ``DIR/checkpoint.pt``.

Every frame of a video is in the sequence twice: partly masked, as it is while it is made, and as it is committed. So
one pass trains all frames, each seeing exactly what it sees when videos are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.loop import (
    PHOTO_SHARE,
    SEEDS_PER_VIDEO,
    Clips,
    Run,
    Stage,
    from_command_line,
    longest,
    train_by_the_clock,
)
from benchmarks.training.masked_bundle import save_bundle
from benchmarks.training.masked_model import Attention, Lumos, LumosSize, Pass
from vllm_packcache.core.layout import VideoLayout
from vllm_packcache.core.policies import Full, PackCache, Policy
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.demo.masked.bundle import TRAINED_FRAMES
from vllm_packcache.demo.masked.tokenizer import (
    FRAME,
    GRID_SHAPE,
    MAX_SECONDS,
    build_text_tokenizer,
    prompt,
    used_ids,
    world_frame,
)
from vllm_packcache.demo.world import (
    COLOURS,
    OBJECT_CELLS,
    PHOTO,
    PILLARS,
    SCENES,
    SHAPES,
    WIDTHS,
    World,
    make_world,
    palette,
)
from vllm_packcache.families import lumos

BLOCK_SIZE = 32
"""Tokens of a KV-cache block, by which policies drop history in training."""

TEXT_DROPPED = 0.12
"""Share of videos without a text: what the unconditional stream of guidance sees."""
IMAGE_DROPPED = 0.1
"""Share of videos without a conditioning image."""
ALL_MASKED = 0.35
"""Share of frames of which nothing is known: every frame begins so."""
CONFIDENT_FIRST = 0.5
"""Share of frames in which rows with objects stay masked longest: the most confident tokens come first."""
PUBLISHED_REMASK = 0.7
"""Share of a frame that is committed as mask tokens; in some videos it is less."""
REBASED = 0.35
"""Share of longer videos that begin later than their image says: what a re-based window looks like."""
GAP = 24
"""Most frames between the image and such a video."""
DIRECTION_FRAMES = 2
"""Frames of such a video that only show where things are and which way they go."""
CORRUPT_SHARE, CORRUPT_RATE = 0.5, 0.04
"""Share of videos with wrong tokens, and at most what share of theirs is wrong."""
LANE_WEIGHT = 6.0
"""Loss weight of the rows that objects move in; of all others it is 1, as they only have to be copied."""
DIRECTION_WEIGHT = 18.0
"""The same in the first frame after an image: which way things go, only the text says."""
POLICIES: tuple[Policy, ...] = (
    Full(),
    Full(),
    PackCache(history_frames=2, window=4, decay=0.5),
    PackCache(history_frames=3, window=8, decay=0.7),
)


STAGES = (
    Stage(0.08, (Clips(2, 4),)),
    Stage(0.4, (Clips(6, 2), Clips(3, 4))),
    Stage(1.0, (Clips(10, 1), Clips(1, 12), Clips(6, 2), Clips(3, 4))),
)

assert longest(STAGES) == TRAINED_FRAMES


@dataclass(frozen=True)
class Clip:
    """A video to learn: ``targets``, ``weights`` and ``changed`` [T, N] belong to its frames' visual tokens.

    ``targets`` are codes; a token that is not masked has weight 0.
    """

    sequence: Pass
    targets: Tensor
    weights: Tensor
    changed: Tensor


class Clipper:
    """Makes clips: all that is random about one follows from its seed.

    Args:
        model: whose embedding rows ids are translated to.
    """

    def __init__(self, model: Lumos) -> None:
        self._model = model
        self._text = build_text_tokenizer()
        self._offsets = lumos.visual_offsets(GRID_SHAPE)

    def clip(self, seed: int, frames: int) -> Clip:
        """The clip of a seed; it uses the world of this seed or of the next, in which more comes out of hiding."""
        rng = np.random.default_rng((seed, 2))
        with_image = rng.random() >= IMAGE_DROPPED
        gap = int(rng.integers(1, GAP)) if with_image and frames > 4 and rng.random() < REBASED else 0
        shown = range(gap + with_image, gap + with_image + frames)
        choice = [make_world(seed + i, PHOTO_SHARE) for i in range(rng.integers(1, 1 + SEEDS_PER_VIDEO))]
        video = max(choice, key=lambda world: sum(world.emerging(k).sum() for k in shown))

        text = prompt(video.prompt, int(rng.integers(1, MAX_SECONDS + 1)), self._text)
        if rng.random() < TEXT_DROPPED:
            text = text[-lumos.VIDEO_START_TOKENS :]
        image = world_frame(video, 0) if with_image else np.empty(0, np.int64)
        true = np.stack([world_frame(video, k) for k in shown])
        layout = VideoLayout(FRAME, len(text) + len(image), len(image))
        positions = Positions(layout, scale=lumos.MM_ROPE_SCALE)
        policy = POLICIES[rng.integers(len(POLICIES))]
        retention = Retention(layout, policy, BLOCK_SIZE)

        changed = np.stack([video.frame_ids(k) != video.frame_ids(max(k - 1, 0)) for k in shown]).reshape(frames, -1)
        lanes = _lanes(video).reshape(-1)
        unknown = np.stack([self._unknown(rng, lanes) for _ in shown])
        remask = PUBLISHED_REMASK if rng.random() < 0.65 else rng.uniform(0, PUBLISHED_REMASK)
        wrong_rate = rng.uniform(0, CORRUPT_RATE) if rng.random() < CORRUPT_SHARE else 0.0
        denoised = self._corrupted(rng, true, wrong_rate)
        denoised[:, self._offsets] = np.where(unknown, lumos.MASK, denoised[:, self._offsets])
        history = self._corrupted(rng, true[:-1], wrong_rate)
        committed = np.stack([lumos.committed(ids, remask) for ids in history]) if frames > 1 else history

        with_text = len(text) > lumos.VIDEO_START_TOKENS
        weights = unknown * self._weights(video, shown, with_text)
        rows = self._model.rows
        return Clip(
            Pass(
                rows(np.array(text)),
                rows(image),
                rows(committed),
                rows(denoised),
                torch.from_numpy(positions.of(np.arange(layout.frame_start(frames)), 0)),
                tuple(_seen(retention, layout, frame) for frame in range(frames)),
            ),
            torch.from_numpy(true[:, self._offsets] - lumos.VISUAL_BEGIN),
            torch.from_numpy(weights).float(),
            torch.from_numpy(changed & unknown),
        )

    def _unknown(self, rng: np.random.Generator, lanes: np.ndarray) -> np.ndarray:
        """Which visual tokens of a frame are masked, bool [N]."""
        tokens = len(lanes)
        if rng.random() < ALL_MASKED:
            return np.ones(tokens, bool)
        count = max(1, math.floor(tokens * math.cos(math.pi / 2 * rng.random())))
        order = rng.random(tokens)
        if rng.random() < CONFIDENT_FIRST:
            order -= lanes * rng.uniform(0, 1.5)
        unknown = np.zeros(tokens, bool)
        unknown[np.argsort(order)[:count]] = True
        return unknown

    def _corrupted(self, rng: np.random.Generator, frames: np.ndarray, rate: float) -> np.ndarray:
        """Frames with some wrong codes, so that a mistake is mended in the next frame and not copied for ever.

        Half of them are any codes, the others those of the same place in another frame.
        """
        frames = frames.copy()
        codes = frames[:, self._offsets]
        anything = lumos.VISUAL_BEGIN + rng.integers(self._model.codes, size=codes.shape)
        wrong = np.where(rng.random(codes.shape) < 0.5, anything, rng.permutation(codes))
        frames[:, self._offsets] = np.where(rng.random(codes.shape) < rate, wrong, codes)
        return frames

    def _weights(self, video: World, shown: range, with_text: bool) -> np.ndarray:
        """Loss weights of the tokens of the frames ``shown``, [T, N].

        They hang on where a token is, and not on what it turns out to be: tokens are drawn with the probabilities that
        the model gives them, which weights of the latter kind would falsify.
        """
        lanes = _lanes(video)
        weights = np.where(lanes, LANE_WEIGHT, np.ones((len(shown), *GRID_SHAPE)))
        if shown[0] == 1 and with_text:
            weights[0, lanes] = DIRECTION_WEIGHT
        if video.scene == PHOTO:
            # What an object hides in frame 0 of a photo cannot be known.
            behind = np.stack([video.frame_ids(k) == video.background for k in shown])
            weights[behind & video.unseen()] = 0.0
        if shown[0] > 1:
            weights[:DIRECTION_FRAMES] = 0.0
        return weights.reshape(len(shown), -1)


def _lanes(video: World) -> np.ndarray:
    """Rows that objects move in, bool [16, 16]."""
    lanes = np.zeros(GRID_SHAPE, bool)
    for thing in video.objects:
        lanes[thing.row : thing.row + OBJECT_CELLS] = True
    return lanes


def _seen(retention: Retention, layout: VideoLayout, frame: int) -> Tensor:
    """Tokens before ``frame`` that live while it is made, [m]."""
    start = layout.frame_start(frame)
    blocks = retention.live_blocks(start)
    tokens = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).ravel()
    return torch.from_numpy(tokens[tokens < start])


_CONTENT = 0.3
"""Weight of what a token is in heads that begin with where it is."""


class _Look(NamedTuple):
    """Where a head looks when training begins.

    Args:
        distance: from what it looks at, in positions on each axis.
        strength: with which each frequency of an axis says so: 0 for an axis that does not matter.
        content: weight of what tokens are, beside where they are.
    """

    distance: tuple[int, int, int]
    strength: tuple[float, float, float]
    content: float = _CONTENT


def _cell(back: int, columns: int) -> _Look:
    """So many frames back, so many columns to the right."""
    frame, _, column = lumos.MM_ROPE_SCALE
    return _Look((frame * back, 0, -column * columns), (3.0, 3.0, 4.0))


def _passed(*frames: int) -> list[_Look]:
    """Where that was, so many frames back, which moves to the right or to the left and is here now."""
    return [_cell(back, columns) for back in frames for columns in (-back, back)]


def _word(back: int) -> _Look:
    """So many words back."""
    return _Look((back, back, back), (4.0, 4.0, 4.0))


_STATIC = _Look((0, 0, 0), (0.0, 3.0, 4.0))
_AROUND = _Look((0, 0, 0), (3.0, 0.75, 1.0), content=0.6)

# A layer's other heads look for what they find. Finding "the same place in the last frame" among thousands of tokens is
# what training would spend most of its time on. What comes out from behind a pillar of w tokens was last seen w + 1
# frames earlier, as many columns away. "Right" is three words after a colour and two after a shape.
_LOOKS: tuple[list[_Look], ...] = (
    [_STATIC, *_passed(1), _word(2), _word(3), _AROUND],
    [_STATIC, *_passed(1), _AROUND],
    [_cell(1, 0), *_passed(6, 7)],
    [_AROUND, *_passed(8, 9)],
    [_STATIC, *_passed(1)],
)

# After these heads, one for each of these kinds of words, wherever they are: with words that mean nothing yet, nobody
# finds out that they matter.
_READ: tuple[tuple[tuple[str, ...], ...], ...] = (
    (),
    (("right", "left"), SCENES),
    (COLOURS,),
    (SHAPES,),
    (PILLARS, tuple(WIDTHS.values())),
)
_SLOW = 3
"""Pairs of channels that turn so slowly that a head can tell what a token is from anywhere in a picture."""
_READING_DISTANCE = 72
"""Positions between a text and the middle of a picture."""
_READING_STRENGTH = 8.0


@torch.no_grad()
def initialise(model: Lumos, generator: torch.Generator) -> None:
    """Random weights, except that the heads of ``_LOOKS`` begin with attention to a fixed place.

    The bias of a head's norm is a part of every query, or of every key, that no token changes: the same vector, turned
    by the rotary angle of a distance in the key's, makes scores that are highest there.
    """
    size = model.size
    torch.nn.init.normal_(model.model.embed_tokens.weight, generator=generator)
    # The embedding is the output layer too; small final states start near uniform.
    model.model.norm.weight.fill_(0.1)
    axes, frequencies = size.axes, size.frequencies
    for layer, looks, read in zip(model.layers, _LOOKS, _READ, strict=True):
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight *= 0.2
        query, key = layer.self_attn.q_norm, layer.self_attn.k_norm
        for head, look in enumerate(looks):
            amplitude = (torch.tensor(look.strength)[axes] * size.head_dim**0.5).sqrt()
            angle = frequencies * torch.tensor(look.distance)[axes]
            query.bias[head] = torch.cat([amplitude, torch.zeros_like(amplitude)])
            key.bias[head] = torch.cat([amplitude * angle.cos(), amplitude * angle.sin()])
            query.weight[head] = key.weight[head] = look.content
        for head, words in enumerate(read, start=len(looks)):
            _read(model, layer.self_attn, head, words)


def _read(model: Lumos, attention: Attention, head: int, words: Sequence[str]) -> None:
    """Let a head look for the tokens of ``words``: in its slow channels keys say how much like these they are."""
    size, tokenizer = model.size, build_text_tokenizer()
    rows = model.rows(np.array([tokenizer.token_to_id(word) for word in words]))
    alike = model.model.embed_tokens.weight[rows].mean(0)
    half = size.head_dim // 2
    slow = torch.arange(half - _SLOW, half)
    attention.k_proj.weight[head * size.head_dim + slow] = alike / alike.norm()
    angle = size.frequencies[slow] * _READING_DISTANCE
    attention.q_norm.bias[head, slow] = _READING_STRENGTH * angle.cos()
    attention.q_norm.bias[head, half + slow] = -_READING_STRENGTH * angle.sin()
    attention.q_norm.weight[head] = _CONTENT


def new_model() -> Lumos:
    """The model, untrained."""
    return Lumos(LumosSize(), used_ids(), len(palette().patches))


def train(run: Run) -> None:
    """Train, and write the bundle to ``run.out``."""
    model = new_model()
    initialise(model, torch.Generator().manual_seed(run.seed))
    clipper = Clipper(model)
    visual = torch.from_numpy(lumos.visual_offsets(GRID_SHAPE).copy())

    def compute(first_seed: int, clips: Clips, fraction: float) -> str:
        del fraction
        batch = [clipper.clip(first_seed + SEEDS_PER_VIDEO * i, clips.frames) for i in range(clips.batch)]
        total = sum(clip.weights.sum() for clip in batch)
        losses, right, changed = 0.0, [], []
        # Texts differ in length, so every video is a pass of its own.
        for clip in batch:
            learnt = clip.weights > 0
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.logits(model.hidden(clip.sequence)[:, visual][learnt])
            targets = clip.targets[learnt]
            loss = (F.cross_entropy(logits.float(), targets, reduction="none") * clip.weights[learnt]).sum() / total
            loss.backward()
            losses += loss.item()
            right.append(logits.argmax(-1) == targets)
            changed.append(clip.changed[learnt])
        hits = torch.cat(right).float()
        return f"loss {losses:.4f} accuracy {hits.mean():.4f} changed {hits[torch.cat(changed)].mean():.4f}"

    train_by_the_clock(
        model,
        matrices=lambda name: name.endswith("_proj.weight"),
        stages=STAGES,
        compute=compute,
        publish=lambda out: save_bundle(model, out),
        run=run,
    )


if __name__ == "__main__":
    train(from_command_line("Train the masked demo model on the toy world.", minutes=80.0))
