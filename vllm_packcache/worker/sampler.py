"""What is decided after a pass over a canvas: which tokens of a frame become known, and when it is done.

The same step as `vllm_packcache.reference.masked_video.unmask`, for a batch and without asking the device anything: how
many tokens are unknown before a step is known beforehand, ties aside, and no others are looked at. The logits of so
many tokens over all visual ids would be a gigabyte, so they are made and used some rows at a time.

Source: Lumos-1, arXiv 2507.08801, and its public inference code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import CanvasRequest

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

LOGITS_AT_ONCE = 2**25
"""Numbers of one stream's logits that there are at a time: 128 MiB in float32."""


class Canvas:
    """The frame that a request is making. What is counted here is known without the device.

    Args:
        request: what is made.
        frame: its number.
        device: where its tokens are.

    Attributes:
        ids: int64, [F].
        frame: its number.
        step: passes done; as many as ``request.options.steps``: what remains is the commit.
        most_unknown: how many of its visual tokens are unknown, where ties left no fewer.
    """

    def __init__(self, request: CanvasRequest, frame: int, device: torch.device) -> None:
        grid = request.conditional.layout.frame.grid
        assert grid is not None
        self.request = request
        self._empty = torch.from_numpy(lumos.masked_frame(grid)).to(device)
        self._offsets = torch.from_numpy(lumos.visual_offsets(grid).copy()).to(device)
        self._begin(frame)

    def _begin(self, frame: int) -> None:
        self.frame, self.step = frame, 0
        self.ids = self._empty.clone()
        self.most_unknown = len(self._offsets)

    @property
    def commits(self) -> bool:
        """Whether the next pass is the commit."""
        return self.step == self.request.options.steps

    def unknown_offsets(self) -> Tensor:
        """Where in the frame its unknown tokens are, int64, [n]; and known ones, where ties left fewer unknown."""
        known = self.ids[self._offsets] != lumos.MASK
        self._asked = known.to(torch.uint8).argsort(stable=True)[: self.most_unknown]
        return self._offsets[self._asked]

    def choose(self, logits: Callable[[slice], Tensor], rows_at_once: int) -> None:
        """Do a step: draw every unknown token, mask the least confident ones again.

        Args:
            logits: float32 [rows, V] of a part of what `unknown_offsets` gave last.
            rows_at_once: how many to ask for at a time.
        """
        options, count, asked = self.request.options, len(self._offsets), self._asked
        device = self.ids.device
        noise = lumos.step_noise(options.seed, self.frame, self.step, count)
        uniform = async_tensor_h2d(noise.uniform, device=device)[asked]
        drawn = [
            draw(logits(part), uniform[part])
            for part in (slice(first, first + rows_at_once) for first in range(0, len(asked), rows_at_once))
        ]
        current = self.ids[self._offsets]
        unknown = current == lumos.MASK
        proposed, probability = current.clone(), torch.full((count,), torch.finfo(torch.float32).max, device=device)
        proposed[asked] = lumos.VISUAL_BEGIN + torch.cat([codes for codes, _ in drawn])
        probability[asked] = torch.cat([of_codes for _, of_codes in drawn])
        proposed = torch.where(unknown, proposed, current)
        probability = torch.where(unknown, probability, torch.finfo(torch.float32).max)
        if self.step < options.steps - 1:
            tau = lumos.temperature(options, self.frame - self.request.first_frame, self.step)
            gumbel = async_tensor_h2d(noise.gumbel, device=device)
            confidence = probability.clamp(min=lumos.LEAST_PROBABILITY).log() + tau * gumbel
            scheduled = lumos.still_masked(self.step, options.steps, count, count + 1)
            rank = (unknown.sum() - 1).clamp(min=1, max=scheduled)
            cut = confidence.sort().values.gather(0, rank[None])
            proposed = torch.where(confidence < cut, lumos.MASK, proposed)
            self.most_unknown = lumos.still_masked(self.step, options.steps, count, self.most_unknown)
        self.ids[self._offsets] = proposed
        self.step += 1

    def next_frame(self) -> None:
        """It has been committed."""
        self._begin(self.frame + 1)


class Drawn(NamedTuple):
    """A token drawn for each row.

    Attributes:
        codes: int64, [n].
        probabilities: float32, [n]: theirs.
    """

    codes: Tensor
    probabilities: Tensor


def draw(logits: Tensor, uniform: Tensor) -> Drawn:
    """Draw a visual code for each row; see `vllm_packcache.families.lumos.StepNoise`.

    Args:
        logits: float32, [n, V].
        uniform: float64, [n].
    """
    probabilities = logits.softmax(-1)
    sums = probabilities.double().cumsum(-1)
    targets = uniform[:, None] * sums[:, -1:]
    codes = torch.searchsorted(sums, targets, right=True).clamp(max=logits.shape[1] - 1)
    return Drawn(codes[:, 0], probabilities.gather(1, codes)[:, 0])


class CanvasSampler:
    """What vLLM calls after each pass, in place of its sampler.

    Args:
        model: has ``visual_logits``.
        canvases_of: the canvases of a step, by their index in its batch; None: the step is one to profile memory with.
        visual_codes: V.
    """

    # The runner counts tokens for penalties where there is something to count in.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(
        self, model: Any, canvases_of: Callable[[InputBatch], dict[int, Canvas] | None], visual_codes: int
    ) -> None:
        self._model = model
        self._canvases_of = canvases_of
        self._rows_at_once = max(1, LOGITS_AT_ONCE // visual_codes)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """The model state knows it."""

    def apply_staged_writes(self) -> None:
        """There are none."""

    def __call__(self, hidden: Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Choose tokens of the frames that are being made; emit those that were committed.

        Args:
            hidden: [n, hidden], those that the model state asked for: of each canvas the conditional stream's, then the
                unconditional one's.
            input_batch: the step.
        """
        canvases = self._canvases_of(input_batch)
        if canvases is None:
            # What there is most of at a time.
            logits = [self._model.visual_logits(hidden[:1].expand(self._rows_at_once, -1)) for _ in range(2)]
            draw(logits[0], torch.zeros(len(logits[0]), dtype=torch.float64, device=hidden.device))
            canvases = {}
        counts = torch.zeros((2, input_batch.num_reqs), dtype=torch.int32)
        emitted = {index: canvas.ids for index, canvas in canvases.items() if canvas.commits}
        width = max((len(ids) for ids in emitted.values()), default=1)
        tokens = torch.zeros(input_batch.num_reqs, width, dtype=torch.int64, device=hidden.device)
        first = 0
        for index, canvas in canvases.items():
            if canvas.commits:
                tokens[index, : len(canvas.ids)] = canvas.ids
                counts[0, index] = len(canvas.ids)
                canvas.next_frame()
                continue
            # What was scheduled is computed again in the next pass.
            counts[1, index] = len(canvas.ids)
            first = self._choose(canvas, hidden, first)
        num_sampled, num_rejected = async_tensor_h2d(counts.numpy(), device=hidden.device)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _choose(self, canvas: Canvas, hidden: Tensor, first: int) -> int:
        """A step of ``canvas`` by the hidden states from ``first`` on; where the next canvas' begin."""
        count, options = canvas.most_unknown, canvas.request.options
        conditional = hidden[first : first + count]
        if not options.guided:
            canvas.choose(lambda part: self._model.visual_logits(conditional[part]), self._rows_at_once)
            return first + count
        unconditional = hidden[first + count : first + 2 * count]

        def guided(part: slice) -> Tensor:
            without = self._model.visual_logits(unconditional[part])
            return options.guidance * (self._model.visual_logits(conditional[part]) - without) + without

        canvas.choose(guided, self._rows_at_once)
        return first + 2 * count
