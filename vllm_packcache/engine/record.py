"""What has become of one video: kept by the scheduler, written to the log in one line when the video ends.

The line is for people and, from its first brace on, JSON for programs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vllm_packcache.core.layout import CONDITION, VideoLayout

PHASES = ("fill", "pack", "slide")
"""Of a video: nothing has been dropped; frames shrink; more frames have been made than the window holds."""

MOST_PEAKS = 64
"""Numbers that a record keeps of how much was held; of a longer video each stands for several frames."""


@dataclass(slots=True)
class VideoRecord:
    """One video request, however often it was preempted.

    Args:
        layout: the video.
        block_size: tokens of a KV-cache block.
        prompt_tokens: of the request: what lies behind them is made.
        computed: tokens, those of steps in flight included.
        phase: one of `PHASES`.
        held_blocks: what it holds, by KV cache group.
        held: the same in all of them.
        peak_blocks: that it has held at once, in all KV cache groups.
        peaks: the same while frames were made; the condition is no frame.
        frames_per_peak: for so many frames each of them stands.
        freed_blocks: blocks that the policy has freed.
        frames: that have been made; given ones are not.
        seconds: that they took.
        forgotten_frames: of a session, by which ``layout`` begins later than its video.
    """

    layout: VideoLayout
    block_size: int
    prompt_tokens: int
    computed: int = 0
    phase: str = PHASES[0]
    held_blocks: dict[int, int] = field(default_factory=dict)
    held: int = 0
    peak_blocks: int = 0
    peaks: list[int] = field(default_factory=list)
    frames_per_peak: int = 1
    freed_blocks: int = 0
    frames: int = 0
    seconds: float = 0.0
    forgotten_frames: int = 0
    _making: int = CONDITION
    _began: float | None = None

    @property
    def logical_tokens(self) -> int:
        """Tokens that have been computed, dropped and forgotten ones included."""
        return self.computed + self._forgotten_tokens

    @property
    def _forgotten_tokens(self) -> int:
        return self.forgotten_frames * self.layout.tokens_per_frame

    def hold(self, group: int, blocks: int, frame: int) -> None:
        """It holds ``blocks`` blocks in a KV cache group now, while ``frame`` is computed."""
        held = self.held = self.held + blocks - self.held_blocks.get(group, 0)
        self.held_blocks[group] = blocks
        self.peak_blocks = max(self.peak_blocks, held)
        if frame == CONDITION:
            return
        frame += self.forgotten_frames
        while frame // self.frames_per_peak >= MOST_PEAKS:
            self.peaks = [max(self.peaks[i : i + 2]) for i in range(0, len(self.peaks), 2)]
            self.frames_per_peak *= 2
        index = frame // self.frames_per_peak
        # A step may compute several given frames; so much was held for each of them.
        self.peaks += [held] * (index + 1 - len(self.peaks))
        self.peaks[index] = max(self.peaks[index], held)

    def free(self, group: int, blocks: int) -> None:
        """The policy has freed ``blocks`` blocks of a KV cache group."""
        self.held_blocks[group] -= blocks
        self.held -= blocks
        self.freed_blocks += blocks

    def let_go(self, group: int) -> None:
        """It holds nothing in a KV cache group any more: it ended, or was preempted."""
        self.held -= self.held_blocks.pop(group, 0)

    def compute(self, tokens: int, frame: int, now: float) -> list[float]:
        """Its first ``tokens`` tokens have been computed, or are in this step, and ``frame`` is being computed.

        A frame ends when the next one is begun.

        Returns:
            Seconds of every frame that has ended.
        """
        self.computed = tokens
        if self._began is None:
            if tokens >= self.prompt_tokens:
                self._began, self._making = now, self.layout.frame_of(self.prompt_tokens)
            return []
        return self._end_frames(frame, now)

    def pause(self, now: float) -> list[float]:
        """A turn of a session has ended, and with it the frame being made; how long the next one waits is no matter.

        Returns:
            Seconds of the frame.
        """
        if self._began is None:
            return []
        seconds = self._end_frames(self._making + 1, now)
        self._began = None
        return seconds

    def resume(self, prompt_tokens: int) -> None:
        """Another turn of a session begins, in which tokens behind so many are made."""
        self.prompt_tokens, self._began = prompt_tokens, None

    def end(self, tokens: int, now: float) -> list[float]:
        """The request has ended with ``tokens`` tokens; the last frame has ended if it is whole.

        Returns:
            Seconds of every frame that has ended.
        """
        return [] if self._began is None else self._end_frames(self.layout.frame_of(tokens), now)

    def _end_frames(self, frame: int, now: float) -> list[float]:
        assert self._began is not None
        ended = frame - self._making
        # A preempted video is computed again up to the frame that it was at.
        if ended <= 0:
            return []
        seconds = (now - self._began) / ended
        self.frames += ended
        self.seconds += now - self._began
        self._making, self._began = frame, now
        return [seconds] * ended

    def line(self, request_id: str, reason: str, tokens: int, preemptions: int) -> str:
        """What is logged when the request has ended.

        Args:
            request_id: the engine's own.
            reason: why it ended.
            tokens: of the request, dropped ones included.
            preemptions: of the request.
        """
        tokens += self._forgotten_tokens
        each = f", {self.seconds / self.frames:.3g} s each" if self.frames else ""
        peak = self.peak_blocks * self.block_size
        said = {
            "request_id": request_id,
            "reason": reason,
            "frames": self.frames,
            "seconds_per_frame": round(self.seconds / self.frames, 6) if self.frames else None,
            "tokens": tokens,
            "peak_tokens": peak,
            "peak_tokens_by_frame": [blocks * self.block_size for blocks in self.peaks],
            "frames_per_peak": self.frames_per_peak,
            "freed_blocks": self.freed_blocks,
            "preemptions": preemptions,
        }
        return (
            f"Video {request_id} ended ({reason}): {self.frames} frames made{each}, {tokens} tokens, of which at most "
            f"{peak} were held (in whole blocks), {preemptions} preemptions {json.dumps(said)}"
        )


def read_line(line: str, request_id: str) -> dict[str, Any] | None:
    """The JSON of a line of the log; None: it is not of a video of this request.

    Args:
        line: of the log.
        request_id: as an answer has it; the engine appends to it.
    """
    _, found, rest = line.partition(f"Video {request_id}")
    if not found or "{" not in rest:
        return None
    return json.JSONDecoder().raw_decode(rest, rest.index("{"))[0]
