"""What is decided after a pass over a canvas: which tokens of a frame become known, and when it is done.

The same step as `vllm_packcache.reference.masked_video.unmask`, for a batch and without asking the device anything: how
many tokens are unknown before a step is known beforehand, ties aside, and no others are looked at. The logits of so
many tokens over all visual ids would be a gigabyte, so they are made and used some rows at a time.

A pass that computes nothing (see `vllm_packcache.families.schedule`) is no step of the engine: it is done right after
the one whose hidden states it draws by. Where a pass leaves out the unconditional stream, the last hidden states of it
are kept: of the tokens that were unknown then, 33 MB of a frame at 384p with a width of 4,096 in bfloat16. Logits are
made of them anew, because those would be sixteen times as many numbers.

Source: Lumos-1, arXiv 2507.08801, and its public inference code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import CanvasRequest
from vllm_packcache.families.schedule import most_unknown, schedule

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

LOGITS_AT_ONCE = 2**25
"""Numbers of one stream's logits that there are at a time: 128 MiB in float32."""


class Asked(NamedTuple):
    """What the model is to compute of a canvas in one stream.

    Attributes:
        some: int64, [n], the tokens of the frame; None: all F.
        written: bool, [n], of which of them keys are written; None: of all. Where ties left fewer unknown than they
            might be, some are computed that are settled, and only to make up the number.
        chosen: int64, [m], by which of them tokens are chosen.
    """

    some: Tensor | None
    written: Tensor | None
    chosen: Tensor


@dataclass
class Seen:
    """What was computed last of a canvas in one stream.

    Attributes:
        numbers: int64, [m], the visual tokens by which tokens are chosen, by their number.
        masked: bool, [m]: which were mask tokens then; others make up the number.
        hidden: [m, hidden]; None: not computed yet, or not used again.
    """

    numbers: Tensor
    masked: Tensor
    hidden: Tensor | None = None


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
    """

    def __init__(self, request: CanvasRequest, frame: int, device: torch.device) -> None:
        self.request = request
        self._empty = torch.from_numpy(lumos.masked_frame(request.grid)).to(device)
        self._offsets = torch.from_numpy(lumos.visual_offsets(request.grid).copy()).to(device)
        self._passes = schedule(request.options, request.grid)
        self._unknown = most_unknown(request.options.steps, len(self._offsets))
        self._begin(frame)

    def _begin(self, frame: int) -> None:
        self.frame, self.step = frame, 0
        self.ids = self._empty.clone()
        self._seen: list[Seen | None] = [None, None]

    @property
    def commits(self) -> bool:
        """Whether the next pass is the commit."""
        return self.step == self.request.options.steps

    @property
    def _known(self) -> Tensor:
        return self.ids[self._offsets] != lumos.MASK

    def ask(self) -> list[Asked | None]:
        """What the next pass computes in each stream, the conditional one first; None: nothing. It is no commit."""
        return [self._ask(stream, rows) if rows else None for stream, rows in enumerate(self._passes[self.step].rows)]

    def _ask(self, stream: int, rows: int) -> Asked:
        known, last = self._known, self._seen[stream]
        if rows == len(self.ids):
            chosen = self._unknown_of(known)
            self._seen[stream] = Seen(chosen, ~known[chosen])
            return Asked(None, None, self._offsets[chosen])
        assert last is not None, "what a frame has of a stream first is whole"
        chosen = self._unknown_of(known[last.numbers])
        numbers = last.numbers[chosen]
        self._seen[stream] = Seen(numbers, ~known[numbers])
        return Asked(self._offsets[last.numbers], last.masked, chosen)

    def _unknown_of(self, known: Tensor) -> Tensor:
        """Where ``known`` [n] is False: as many indices as may be; where ties left fewer, some where it is True too.

        The sort is stable: whatever this is asked of, unknown tokens come in the frame's order.
        """
        return known.to(torch.uint8).argsort(stable=True)[: self._unknown[self.step]]

    def choose(self, hidden: Tensor, visual_logits: Callable[[Tensor], Tensor], rows_at_once: int) -> int:
        """Do the steps that a pass decides: its own, and those of the passes after it that compute nothing.

        Args:
            hidden: [n, hidden], of this canvas what `ask` asked for last, the conditional stream's first; then others'.
            visual_logits: from [m, hidden] to float32 [m, V].
            rows_at_once: how many to ask for at a time.

        Returns:
            How many hidden states were this canvas'.
        """
        computed, first = self._passes[self.step].rows, 0
        for seen, rows in zip(self._seen, computed, strict=True):
            if seen is not None and rows:
                seen.hidden = hidden[first : first + len(seen.numbers)]
                first += len(seen.numbers)
        while True:
            self._step(visual_logits, rows_at_once)
            if self.commits or self._passes[self.step].computed:
                break
        for stream, seen in enumerate(self._seen):
            if seen is not None and not self._uses_again(stream):
                seen.hidden = None
            elif seen is not None and seen.hidden is not None and computed[stream]:
                # Its own: what it is a part of is that of all requests of the engine's step.
                seen.hidden = seen.hidden.clone()
        return first

    def _uses_again(self, stream: int) -> bool:
        """Whether the next pass draws by what an earlier one computed of a stream."""
        return not self.commits and self._passes[self.step].guided and not self._passes[self.step].rows[stream]

    def _step(self, visual_logits: Callable[[Tensor], Tensor], rows_at_once: int) -> None:
        """Do a step: draw every unknown token, mask the least confident ones again."""
        options, count, device = self.request.options, len(self._offsets), self.ids.device
        guided, known = self._passes[self.step].guided, self._known
        states: list[Tensor] = []
        chosen: list[Tensor] = []
        numbers: list[Tensor] = []
        for seen in self._seen[: 2 if guided else 1]:
            assert seen is not None, "a stream that is drawn by has been asked for"
            assert seen.hidden is not None, "and has been computed"
            states.append(seen.hidden)
            chosen.append(self._unknown_of(known[seen.numbers]))
            numbers.append(seen.numbers)
        asked = numbers[0][chosen[0]]

        def logits(part: slice) -> Tensor:
            own, *others = (visual_logits(hidden[rows[part]]) for hidden, rows in zip(states, chosen, strict=True))
            return options.guidance * (own - others[0]) + others[0] if others else own

        noise = lumos.step_noise(options.seed, self.frame, self.step, count)
        uniform = async_tensor_h2d(noise.uniform, device=device)[asked]
        drawn = [
            draw(logits(part), uniform[part])
            for part in (slice(first, first + rows_at_once) for first in range(0, len(asked), rows_at_once))
        ]
        current, unknown = self.ids[self._offsets], ~known
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
            again = confidence < cut
            if not options.fresh:
                # There is nothing to draw a known token by.
                again &= unknown
            proposed = torch.where(again, lumos.MASK, proposed)
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
            first += canvas.choose(hidden[first:], self._model.visual_logits, self._rows_at_once)
        num_sampled, num_rejected = async_tensor_h2d(counts.numpy(), device=hidden.device)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
