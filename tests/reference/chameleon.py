"""Lumos-1's loop once more, another way: layers of transformers' Chameleon, no cache, everything anew in every pass.

The whole sequence is computed from scratch for every pass of every frame: what has been committed, as it was committed,
and the frame being made. Who sees what, and where, is stated for the queries of each picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, ChameleonConfig
from transformers.models.chameleon import modeling_chameleon as chameleon

from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import Plan
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import Retention
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions

MM_ROPE = {0: (0, 1, 2, 3), 1: (4, 5, 8, 9, 12, 13), 2: (6, 7, 10, 11, 14, 15)}
"""Channels, modulo 16, that turn with time, height and width."""
ONE_AXIS = {0: tuple(range(16)), 1: (), 2: ()}


class Segment(NamedTuple):
    """The queries ``[first, last)``: where they see all T tokens, [3, T], and which, bool [last - first, T]."""

    first: int
    last: int
    at: torch.Tensor
    seen: torch.Tensor


class Chameleon:
    """The decoder layers of transformers on a checkpoint's weights."""

    def __init__(self, folder: Path, channels: dict[int, tuple[int, ...]] = MM_ROPE) -> None:
        options = json.loads((folder / "config.json").read_text())
        rope = {"rope_type": "default", "rope_theta": options["rope_theta"]}
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("rms_norm_eps", "swin_norm", "model_parallel_size", "vocab_size")
        config = ChameleonConfig(**{name: options[name] for name in names}, rope_parameters=rope)
        config._attn_implementation = "stated"
        weights = load_file(folder / "model.safetensors")
        kind = chameleon.ChameleonSwinDecoderLayer if config.swin_norm else chameleon.ChameleonDecoderLayer
        self.layers = [kind(config, layer).eval() for layer in range(config.num_hidden_layers)]
        for number, layer in enumerate(self.layers):
            prefix = f"model.layers.{number}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                for part in ("weight", "bias"):
                    key = f"self_attn.{name}_norm.{part}"
                    own[key] = own[key].repeat_interleave(heads // config.model_parallel_size, 0)
            layer.load_state_dict(own)
        self.norm = chameleon.ChameleonRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm.load_state_dict({"weight": weights["model.norm.weight"]})
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)[lumos.VISUAL_BEGIN :]
        self.config = config
        head_dim = config.hidden_size // config.num_attention_heads
        channel = np.arange(head_dim)
        self.theta = torch.tensor(options["rope_theta"] ** (-2 * (channel % (head_dim // 2)) / head_dim))
        self.axis = torch.tensor([next(axis for axis, own in channels.items() if c % 16 in own) for c in channel])

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], segments: list[Segment]) -> torch.Tensor:
        """Logits of the visual ids at all T tokens, [T, V]."""
        hidden = self.embedding[torch.tensor(ids)][None]
        nothing = (torch.ones(1, len(ids), 1), torch.zeros(1, len(ids), 1))
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=nothing, segments=segments, model=self)[0]
        return self.norm(hidden)[0] @ self.head.T

    def turn(self, heads: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[H, n, D] turned to [3, n]."""
        angles = at.T.double()[:, self.axis] * self.theta
        cos, sin = angles.cos().float(), angles.sin().float()
        return heads * cos + chameleon.rotate_half(heads) * sin


def stated(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    model: Chameleon = options["model"]
    groups = module.num_key_value_groups
    read = []
    for first, last, at, seen in options["segments"]:
        queries = model.turn(query[0, :, first:last], at[:, first:last])
        keys = model.turn(key[0], at).repeat_interleave(groups, 0)
        scores = queries @ keys.transpose(1, 2) * options["scaling"]
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        read.append(weights @ value[0].repeat_interleave(groups, 0))
    return torch.cat(read, 1).transpose(0, 1)[None], None


AttentionInterface.register("stated", stated)


@dataclass(frozen=True)
class Variant:
    """What a loop may do that the published one does not."""

    causal_commit: bool = False
    masked_image: bool = False
    unconditional_text: bool = False


PUBLISHED = Variant()


class BruteForce:
    """The loop for one request. A pass that computes anything computes whole frames; what is drawn by is kept."""

    def __init__(
        self,
        model: Chameleon,
        prompt: Sequence[int],
        plan: Plan,
        options: MaskedOptions,
        block_size: int,
        variant: Variant = PUBLISHED,
    ) -> None:
        self.model, self.options, self.block_size, self.variant = model, options, block_size, variant
        self.grid = plan.layout.frame.grid
        begin = 0 if variant.unconditional_text else list(prompt).index(9004)
        self.streams = [(plan, list(prompt))]
        if options.guidance != 1:
            layout = plan.layout if variant.unconditional_text else lumos.unconditional_layout(plan.layout)
            other = Plan(layout, plan.policy, Positions(layout, plan.positions.window, plan.positions.scale))
            self.streams.append((other, list(prompt)[begin:]))
        if variant.masked_image:
            for stream, (video, ids) in enumerate(self.streams):
                first = video.layout.condition_tokens - video.layout.condition_image_tokens
                image = ids[first : first + video.layout.tokens_per_frame]
                ids[first : first + len(image)] = lumos.committed(np.array(image), options.remask).tolist()
                self.streams[stream] = (video, ids)
        # Where not everything is computed anew, a known token stays known.
        self.published = (options.reuse, options.guidance_interval) == (0, 1)
        self.first = (len(prompt) - plan.layout.condition_tokens) // plan.layout.tokens_per_frame

    def generate(self, frames: int) -> list[list[int]]:
        made = []
        for frame in range(self.first, self.first + frames):
            ids = lumos.masked_frame(self.grid).tolist()
            tau = self.options.temperature
            self.kept: list[torch.Tensor | None] = [None, None]
            self.computed = self.unknown = self.first_guided = 0
            for step in range(self.options.steps):
                ratio = (step + 1) / self.options.steps
                tau *= 1 - ratio
                quiet = frame > self.first and not self.options.reset_temperature
                ids = self.step(frame, step, ids, 0.0 if quiet else tau)
            made.append(ids)
            for stream, (_, history) in enumerate(self.streams):
                content = list(ids)
                if stream == 1 and not self.options.share_history:
                    content = [9003 if token >= 65536 else token for token in content]
                for index in lumos.remasked(len(ids) - 4, self.options.remask).tolist():
                    content[3 + index] = 9003
                history += content
        return made

    def step(self, frame: int, step: int, ids: list[int], tau: float) -> list[int]:
        """Token after token, in the words of the published code."""
        visual = [place for place, token in enumerate(ids) if token == 9003 or token >= 65536]
        self.look(step, ids, visual)
        logits, unconditional = self.kept
        if self.guides(step):
            logits = unconditional + self.options.guidance * (logits - unconditional)
        probabilities = logits.softmax(-1).tolist()
        noise = lumos.step_noise(self.options.seed, frame, step, len(visual))
        proposed, confidence, known = list(ids), [], 0
        for number, place in enumerate(visual):
            gumbel = tau * float(noise.gumbel[number])
            if ids[place] != 9003:
                confidence.append(math.log(torch.finfo(torch.float32).max) + gumbel)
                known += 1
                continue
            target, code = noise.uniform[number] * math.fsum(probabilities[number]), 0
            total = probabilities[number][0]
            while total <= target:
                code += 1
                total += probabilities[number][code]
            proposed[place] = 65536 + code
            confidence.append(math.log(max(probabilities[number][code], 1e-20)) + gumbel)
        if step < self.options.steps - 1:
            scheduled = int((len(visual) * published_schedule(step, self.options.steps)).floor())
            cut = sorted(confidence)[max(1, min(len(visual) - known - 1, scheduled))]
            for number, place in enumerate(visual):
                if confidence[number] < cut and (self.published or ids[place] == 9003):
                    proposed[place] = 9003
        return proposed

    def look(self, step: int, ids: list[int], visual: list[int]) -> None:
        """Compute anew what this step is to see anew, of whole frames."""
        unknown = ids.count(9003)
        starts = self.guides(step) and self.kept[1] is None
        if step and not starts and (self.unknown - unknown) / len(visual) < self.options.reuse:
            return
        self.unknown = unknown
        self.kept[0] = self.frame_logits(0, ids)[visual]
        if starts:
            self.first_guided = self.computed
        if self.guides(step) and (self.computed - self.first_guided) % self.options.guidance_interval == 0:
            self.kept[1] = self.frame_logits(1, ids)[visual]
        self.computed += 1

    def guides(self, step: int) -> bool:
        options = self.options
        inside = options.guidance_from * options.steps <= step < options.guidance_until * options.steps
        return len(self.streams) > 1 and inside

    def frame_logits(self, stream: int, ids: list[int]) -> torch.Tensor:
        """Logits at the tokens of the frame being made, [F, V]."""
        plan, history = self.streams[stream]
        return self.model.logits(history + ids, self.segments(plan, len(history) + len(ids)))[-len(ids) :]

    def segments(self, plan: Plan, length: int) -> list[Segment]:
        layout, retention = plan.layout, Retention(plan.layout, plan.policy, self.block_size)
        tokens, size = np.arange(length), self.block_size
        text = layout.condition_tokens - layout.condition_image_tokens
        found = [Segment(0, text, self.at(plan, tokens, CONDITION), causal(0, text, length))]
        for first in range(text, length, layout.tokens_per_frame):
            last = first + layout.tokens_per_frame
            frame = layout.frame_of(first)
            seen = tokens < last
            if frame != CONDITION:
                live = np.isin(tokens // size, retention.past(frame)) | (tokens // size >= first // size)
                seen &= live
            rows = torch.from_numpy(seen).expand(last - first, -1)
            if self.variant.causal_commit and last < length:
                rows = rows & causal(first, last, length)
            found.append(Segment(first, last, self.at(plan, tokens, frame), rows))
        return found

    def at(self, plan: Plan, tokens: np.ndarray, frame: int) -> torch.Tensor:
        """Positions while ``frame`` is made; a frame's tokens in a block of the condition stay where they were made."""
        layout, positions = plan.layout, plan.positions
        at = positions.of(tokens, positions.window_start(frame))
        for token in tokens[layout.condition_tokens :]:
            if token // self.block_size * self.block_size < layout.condition_tokens:
                made = positions.window_start(layout.frame_of(token))
                at[:, token] = positions.of(tokens[token : token + 1], made)[:, 0]
        return torch.from_numpy(at)


def published_schedule(step: int, steps: int) -> torch.Tensor:
    """The share that stays masked, with the operations of the published code: on a CPU, in float32."""
    return torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)


def causal(first: int, last: int, length: int) -> torch.Tensor:
    return torch.arange(length)[None] <= torch.arange(first, last)[:, None]
