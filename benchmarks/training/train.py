"""Train the demo model on a CPU.

``python -m benchmarks.training.train --out DIR --minutes 40 --seed 0``

The learning rate and the length of the videos follow the clock, so any number of minutes is a whole schedule.
A run that was stopped goes on from ``DIR/checkpoint.pt``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.llama import Llama, LlamaSize, rotary_frequencies, save_pretrained
from benchmarks.training.loop import (
    CHANGED_WEIGHT,
    CORRUPT_RATE,
    CORRUPT_SHARE,
    EMERGING_WEIGHT,
    PHOTO_SHARE,
    SEEDS_PER_VIDEO,
    Clips,
    Run,
    Stage,
    from_command_line,
    longest,
    train_by_the_clock,
)
from vllm_packcache.demo.tokenizer import (
    CONDITION_TOKENS,
    FRAME_TOKENS,
    TRAINED_FRAMES,
    VideoTokenizer,
    save_tokenizer,
    video_ids,
)
from vllm_packcache.demo.world import PHOTO, World, make_world

# Short clips teach movement and the look of things soonest, as many fit in a step.  Only long ones have an object
# come out from behind a wide pillar, and only full ones have every distance of a 16-frame video.
STAGES = (
    Stage(0.12, (Clips(3, 6),)),
    Stage(0.4, (Clips(10, 2), Clips(3, 6))),
    Stage(1.0, (Clips(16, 1), Clips(3, 6), Clips(16, 1))),
)

assert longest(STAGES) == TRAINED_FRAMES


@dataclass(frozen=True)
class Batch:
    """``inputs`` int64 [B, T]; ``targets`` and ``weights`` [B, frames * 257] belong to the frames' tokens."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    changed: Tensor


def _changed(ids: np.ndarray, frames: int) -> np.ndarray:
    """Which tokens of the frames differ from the same place one frame before, bool [frames * 257]."""
    first = CONDITION_TOKENS
    changed = ids[first:] != ids[first - FRAME_TOKENS : -FRAME_TOKENS]
    changed[::FRAME_TOKENS] = False
    return changed


def _emerging(video: World, frames: int) -> np.ndarray:
    """Where parts of objects show that were behind the pillar one frame before, bool [frames * 257]."""
    emerging = np.zeros((frames, FRAME_TOKENS), bool)
    for k in range(1, frames + 1):
        emerging[k - 1, 1:] = video.emerging(k).reshape(-1)
    return emerging.reshape(-1)


def make_batch(tokenizer: VideoTokenizer, first_seed: int, clips: Clips, corrupt: bool) -> Batch:
    """Worlds of the ``2 * clips.batch`` seeds from ``first_seed`` on as a training batch.

    Half of the videos are the one of two worlds in which more comes out from behind the pillar.

    With ``corrupt``, some input tokens of some videos are replaced at random while the targets stay true, so
    that a mistake made in free generation is mended in the next frame and not copied for ever.
    """
    inputs, targets, weights, changes = [], [], [], []
    for seed in range(first_seed, first_seed + SEEDS_PER_VIDEO * clips.batch, SEEDS_PER_VIDEO):
        rng = np.random.default_rng((seed, 1))
        choice = [make_world(seed + i, PHOTO_SHARE) for i in range(rng.integers(1, 1 + SEEDS_PER_VIDEO))]
        video = max(choice, key=lambda world: _emerging(world, clips.frames).sum())
        ids = video_ids(tokenizer, video, clips.frames)
        changed = _changed(ids, clips.frames)
        weight = np.where(changed, CHANGED_WEIGHT, 1.0)
        weight[_emerging(video, clips.frames)] = EMERGING_WEIGHT
        if video.scene == PHOTO:
            # What an object hides in frame 0 of a photo cannot be known.
            behind = video.background + tokenizer.visual_offset
            cells = ids[CONDITION_TOKENS:].reshape(clips.frames, FRAME_TOKENS)[:, 1:]
            guess = video.unseen().reshape(-1) & (cells == behind.reshape(-1))
            weight.reshape(clips.frames, FRAME_TOKENS)[:, 1:][guess] = 0.0
        seen = ids[:-1].copy()
        if corrupt and rng.random() < CORRUPT_SHARE:
            wrong = rng.random(len(seen)) < CORRUPT_RATE
            wrong[: CONDITION_TOKENS + 1] = False
            wrong &= seen != tokenizer.frame_id
            seen[wrong] = rng.integers(tokenizer.visual_offset, tokenizer.vocab_size, wrong.sum())
        inputs.append(seen)
        targets.append(ids[CONDITION_TOKENS:])
        weights.append(weight)
        changes.append(changed)
    return Batch(
        torch.from_numpy(np.stack(inputs)),
        torch.from_numpy(np.stack(targets)),
        torch.from_numpy(np.stack(weights)).float(),
        torch.from_numpy(np.stack(changes)),
    )


def _source(frames_back: int, columns: int) -> int:
    """How far back the token lies that is ``columns`` right of the next token, some frames earlier."""
    return frames_back * FRAME_TOKENS - 1 - columns


# Where some attention heads always look.  Finding "the same place in the last frame" among thousands of tokens
# is what training would spend most of its time on; with that given it only learns what to do with it.  The
# heads see the last frames, the row above, and where an object that comes out from behind a pillar of 5 to 8
# tokens went in.  Heads not listed are free.
_LOOKS = (
    (_source(1, 0), _source(1, -1), _source(1, 1), _source(2, -2), _source(2, 2), 15, _source(5, -5), _source(5, 5)),
    (_source(6, -6), _source(6, 6), _source(7, -7), _source(7, 7), _source(2, 0), _source(4, 0)),
    (_source(8, -8), _source(8, 8), _source(3, 0)),
    (),
)
_LOOK_SHARPNESS = (12.0, 11.0, 10.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
_CONSTANT = 24.0
# What the norm leaves of the constant at the input of each layer: early in training it is more, never much less.
_CONSTANT_SEEN = (12.0, 5.0, 5.0, 5.0)


@torch.no_grad()
def initialise(model: Llama, generator: torch.Generator) -> None:
    """Random weights, except that the heads of ``_LOOKS`` attend to a fixed distance.

    Embedding dimension 0 is the same constant for every token, and nothing writes to it.  Through it a query is
    a fixed vector and a key the same vector turned by the rotary angle of the distance: their product peaks
    there.  Gradients are masked so that training leaves all of this as it is.
    """
    size = model.size

    def hold(parameter: Tensor, kept: tuple[slice | int, ...]) -> None:
        mask = torch.ones_like(parameter)
        mask[kept] = 0
        parameter.register_hook(lambda gradient: gradient * mask)

    embedding = model.model.embed_tokens.weight
    torch.nn.init.normal_(embedding, generator=generator)
    # Equal lengths, so that the constant is as large in one token as in another after the norm.
    embedding *= size.hidden_size**0.5 / embedding.norm(dim=1, keepdim=True)
    embedding[:, 0] = _CONSTANT
    hold(embedding, (slice(None), 0))
    # The embedding is the output layer too; small final states start near uniform.
    model.model.norm.weight.fill_(0.1)
    model.model.norm.weight[0] = 0
    hold(model.model.norm.weight, (0,))
    half = size.head_dim // 2
    strength = torch.zeros(half)
    strength[: len(_LOOK_SHARPNESS)] = torch.tensor(_LOOK_SHARPNESS)
    for layer, distances, seen in zip(model.layers, _LOOKS, _CONSTANT_SEEN, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        inner = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for module in (*inner, attention.o_proj, mlp.down_proj):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
        for module in (attention.o_proj, mlp.down_proj):
            module.weight *= 0.2
            module.weight[0] = 0
            hold(module.weight, (0,))
        hold(layer.input_layernorm.weight, (0,))
        query, key = attention.q_proj.weight, attention.k_proj.weight
        looking = len(distances) * size.head_dim
        for projection in (query, key):
            projection[:looking] = 0
            hold(projection, (slice(0, looking),))
        amplitude = (strength * size.head_dim**0.5).sqrt() / seen
        for head, distance in enumerate(distances):
            angle = rotary_frequencies(size) * distance
            rows = slice(head * size.head_dim, (head + 1) * size.head_dim)
            query[rows, 0] = torch.cat([amplitude, torch.zeros(half)])
            key[rows, 0] = torch.cat([amplitude * angle.cos(), amplitude * angle.sin()])


def train(run: Run) -> None:
    """Train, and write the model to ``run.out``."""
    run.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(run.out)
    tokenizer = VideoTokenizer(run.out)
    special_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    model = Llama(LlamaSize(vocab_size=tokenizer.vocab_size))
    initialise(model, torch.Generator().manual_seed(run.seed))

    def compute(first_seed: int, clips: Clips, fraction: float) -> str:
        batch = make_batch(tokenizer, first_seed, clips, corrupt=fraction > STAGES[0].until)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.hidden(batch.inputs)[:, CONDITION_TOKENS - 1 :]
            logits = model.logits(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
        loss = (losses * batch.weights.flatten()).sum() / batch.weights.sum()
        loss.backward()
        right = (logits.argmax(-1) == batch.targets) | (batch.weights == 0)
        return (
            f"loss {loss.item():.4f} accuracy {right.float().mean():.4f} "
            f"changed {right[batch.changed].float().mean():.4f}"
        )

    train_by_the_clock(
        model,
        matrices=lambda name: name.endswith("_proj.weight"),
        stages=STAGES,
        compute=compute,
        publish=lambda out: save_pretrained(model, out, special_ids),
        run=run,
    )


if __name__ == "__main__":
    train(from_command_line("Train the demo video model on the toy world.", minutes=40.0))
