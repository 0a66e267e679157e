"""Pictures and text of what a configuration keeps: which blocks live while each frame is made, and at which positions.

Everything shown is asked of `Retention` and `Positions`, the same objects that scheduler and worker obey. Of a video
that is made masked (`vllm_packcache.families.lumos`) both streams are shown, and so are those of a guided causal one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from vllm_packcache import families
from vllm_packcache.config.errors import ConfigError, shown_path
from vllm_packcache.config.formats import check_masked, check_turned
from vllm_packcache.config.guidance import GuidanceConfig
from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig
from vllm_packcache.core.encoded import EncodedRetention, Encoding, retention_of
from vllm_packcache.core.layout import CONDITION, VideoLayout
from vllm_packcache.core.positions import TIME, Int64, Positions
from vllm_packcache.core.retention import Retention, check_policy
from vllm_packcache.core.view import DROPPED, IN_CONDITION, NOT_YET, FrameTokens, FrameView, view_of
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.tools.figures import new_figure, save
from vllm_packcache.tools.sequences import example_frames, lookup, read_video
from vllm_packcache.tools.storage import Storage, shown_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAMES, MOST_FRAMES = 12, 1000
"""Drawn where nobody says how many, and at most."""

MOST_NEGATIVE = 2**20
"""Tokens of a second stream's condition: more than any model's sequences have."""

TEXT_TOKENS = 32
"""Tokens of text assumed before the conditioning image, where nobody says how many there are."""

OLDEST_SHADE = 5
"""Frames at this temporal distance or more share a colour."""


@dataclass(frozen=True, slots=True)
class Overview:
    """What is known of a whole video once every frame has been looked at.

    Args:
        tokens: live and full tokens of every frame.
        blocks: how many live while each frame is made.
        retained: `FrameView.retained` of every frame.
        condition_stops: how far into the condition anything lives while each frame is made, in tokens.
        oldest: the largest temporal distance of a live block.
        first_dropping: the first frame during which anything is gone; None: nothing is ever dropped.
    """

    tokens: list[FrameTokens]
    blocks: list[int]
    retained: list[Int64]
    condition_stops: list[int]
    oldest: int
    first_dropping: int | None


@dataclass(frozen=True)
class Explanation:
    """A configuration applied to a video of ``frames`` frames.

    Args:
        title: what the configuration is called.
        retention: the decisions.
        positions: where the model sees what is kept.
        frames: how many frames to show.
        unconditional: the same video in the other stream; None: there is none, and frames are made token by token.
        masked: whether frames are made in passes.
        example: whether what is kept depends on what is seen, and that is an example.
        storage: what is stored of a token; None: nobody says of which model.
        encoding: how much room older frames take in a layer; None: as much as when they were new.
    """

    title: str
    retention: Retention
    positions: Positions
    frames: int
    unconditional: Explanation | None = None
    masked: bool = False
    example: bool = False
    storage: Storage | None = None
    encoding: Encoding | None = None

    @property
    def streams(self) -> dict[str, Explanation]:
        """The sequences that make the video, by name."""
        if self.unconditional is None:
            return {"": self}
        return {"conditional stream": self, "unconditional stream": self.unconditional}

    @property
    def passes_summary(self) -> list[str]:
        """How a frame is made in two streams and what that reads, in sentences; none, where there is one."""
        if self.unconditional is None:
            return []
        last, other = (stream.overview.tokens[-1] for stream in self.streams.values())
        if not self.masked:
            live, whole = last.live + other.live, last.full + other.full
            blocks = [stream.overview.blocks[-1] for stream in self.streams.values()]
            return [
                "Every token is sampled from the logits of both streams, and fed to both.",
                f"At the end of frame {last.frame} attention reads {last.live:,} + {other.live:,} = {live:,} keys in "
                f"{blocks[0]:,} + {blocks[1]:,} = {sum(blocks):,} blocks; with the full cache {last.full:,} + "
                f"{other.full:,} = {whole:,} keys: {100 * live / whole:.0f} %.",
            ]
        options = MaskedOptions()
        passes = options.steps + 1
        read, full = (passes * (own + others) for own, others in zip(last[1:], other[1:], strict=True))
        return [
            f"A frame is made in {options.steps} + 1 passes of both streams: {options.steps} choose its tokens, the "
            f"last commits it with {100 * options.remask:.0f} % of its content masked again. All of them read the same "
            "history, compacted once when the frame begins, and the whole frame.",
            f"To make frame {last.frame}, attention reads {passes} x ({last.live:,} + {other.live:,}) = {read:,} keys; "
            f"with the full cache {passes} x ({last.full:,} + {other.full:,}) = {full:,}: {100 * read / full:.0f} %.",
        ]

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole video with nothing dropped."""
        return -(-self.retention.layout.frame_start(self.frames) // self.retention.block_size)

    @property
    def options(self) -> str:
        """The policy's options and the mode of positions in a line."""
        policy = self.retention.policy
        values = dataclasses.asdict(policy).items()
        pairs = [f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in values]
        mode = "absolute" if self.positions.window is None else "rebase"
        return ", ".join([*pairs, f"positions {mode}"])

    @property
    def shape(self) -> str:
        """The video in a line."""
        layout = self.retention.layout
        return (
            f"condition {layout.condition_tokens:,} tokens, "
            f"{self.frames} frames of {layout.tokens_per_frame:,} tokens, "
            f"{self.num_blocks:,} blocks of {self.retention.block_size}"
        )

    @property
    def summary(self) -> str:
        """What the policy achieves, in a sentence."""
        first, last = self.overview.first_dropping, self.overview.tokens[-1]
        if first is None:
            return f"Nothing is dropped in these {self.frames} frames."
        return (
            f"Blocks are dropped from frame {first} on; frame {last.frame} reads {last.live:,} of "
            f"{last.full:,} tokens, {last.percent:.0f} % of the full cache."
        )

    @property
    def positions_summary(self) -> str:
        """How high positions get, in a sentence."""
        bound, one_axis = self.positions_bound, self.positions.axes == 1
        if self.positions.window is not None:
            return f"Positions stay {bound}{'' if one_axis else ','} however long the video gets."
        bound = bound.removeprefix("below ") if one_axis else f"{bound},"
        return f"Positions grow with the video: {bound} after {self.frames} frames."

    @property
    def positions_bound(self) -> str:
        """What the positions of these frames lie below, in a few words."""
        window = self.positions.window
        # The frame with the highest positions: while the window fills, or the last one.
        highest = self.frames - 1 if window is None else window
        limit = self.positions.limit(self.retention.layout.frame_start(highest + 1))
        if self.positions.axes == 1:
            return f"below {limit:,}"
        times = int(self.seen_at(np.array([highest]), highest)[0]) + 1
        return f"below {times:,} in time (t), below {limit:,} on all axes"

    def seen_at(self, frames: Int64, made: int) -> Int64:
        """Where the model sees each of ``frames`` while frame ``made`` is made.

        That is the position of the frame's first token, or, with three axes, of its first visual token in time.
        """
        layout = self.retention.layout
        first = layout.frame_start(0)
        if self.positions.axes == 3:
            first += layout.frame.frame_start_tokens
        window_start = self.positions.window_start(made)
        # What outlives the window stays at the place of its oldest frame.
        tokens = first + np.maximum(frames, window_start) * layout.tokens_per_frame
        return self.positions.of(tokens, window_start)[TIME]

    @cached_property
    def overview(self) -> Overview:
        """All frames in numbers. Views are not kept: those of a long video would fill the memory."""
        tokens = []
        retained = []
        condition_stops = []
        blocks = []
        oldest = 0
        first_dropping = None
        for view in self.views():
            tokens.append(view.tokens)
            retained.append(view.retained)
            condition = np.flatnonzero(view.states == IN_CONDITION)
            condition_stop = int(condition[-1] + 1) * self.retention.block_size if len(condition) else 0
            condition_stops.append(min(condition_stop, self.retention.layout.condition_tokens))
            blocks.append(int(np.count_nonzero(view.states >= IN_CONDITION)))
            oldest = max(oldest, int(view.states.max()))
            if first_dropping is None and np.any(view.states == DROPPED):
                first_dropping = view.tokens.frame
        return Overview(tokens, blocks, retained, condition_stops, oldest, first_dropping)

    def bytes_of(self, blocks: int) -> int:
        """Of so many blocks in all layers: blocks are held whole. Only where `storage` is known."""
        assert self.storage is not None
        return blocks * self.retention.block_size * self.storage.token_bytes

    @property
    def bytes_summary(self) -> list[str]:
        """What the video takes at most in its streams, and what it would without a policy; none: it is not known."""
        if self.storage is None:
            return []
        streams = self.streams.values()
        held = [sum(blocks) for blocks in zip(*(stream.overview.blocks for stream in streams), strict=True)]
        most = max(held)
        whole = sum(stream.num_blocks for stream in streams)
        full, stock = self.bytes_of(whole), whole * self.retention.block_size * self.storage.own_token_bytes
        frame = self.retention.layout.tokens_per_frame * self.storage.token_bytes
        condition = sum(stream.retention.layout.condition_tokens for stream in streams) * self.storage.token_bytes
        both = " in both streams" if self.unconditional is not None else ""
        own = self.storage.dtype
        other = "" if full == stock else f"; in {own} {shown_bytes(stock)}: {100 * self.bytes_of(most) / stock:.0f} %"
        return [
            self.storage.sentence,
            f"The condition takes {shown_bytes(condition)}{both}, a whole frame {shown_bytes(frame)}"
            f"{' in each' if both else ''}.{self._encoded_words}",
            f"Blocks are held whole: at most {most:,}{both}, {shown_bytes(self.bytes_of(most))}. The full cache takes "
            f"{shown_bytes(full)}: {100 * most / whole:.0f} %{other}.",
        ]

    @property
    def _encoded_words(self) -> str:
        if self.encoding is None or self.storage is None:
            return ""
        blocks = self.retention.layout.tokens_per_frame // self.retention.block_size
        held = self.encoding.held_blocks(blocks, self.retention.block_size)
        return (
            f" One that is older than the newest is all read, and takes {shown_bytes(self.bytes_of(held))} in {held} "
            f"of its {blocks} whole blocks ({self.encoding.packing.format}); the others are dropped."
        )

    def view(self, frame: int) -> FrameView:
        """What lives while ``frame`` is made."""
        return view_of(self.retention, frame, self.num_blocks)

    def views(self) -> Iterator[FrameView]:
        """`view` of every frame."""
        return map(self.view, range(self.frames))


def explain(
    source: str,
    policy: str,
    *,
    frames: int | None = None,
    condition_tokens: int | None = None,
    negative_tokens: int | None = None,
    block_size: int = 16,
    sequence: Path | None = None,
    stored: Storage | None = None,
) -> Explanation:
    """Apply a configuration to a video, as a server would.

    Args:
        source: name of a preset, a file or JSON text.
        policy: name of a policy.
        frames: frames of the video; by default as many as ``sequence`` has, or `FRAMES`.
        condition_tokens: tokens before frame 0; by default what ``sequence`` says, or a short text and the conditioning
            image.
        negative_tokens: of the condition of a guided causal video's second stream; by default what the configuration
            says of videos that it guides; None: there is no second stream.
        block_size: tokens of a KV-cache block.
        sequence: file with the video's token ids, for a policy that reads them, and only for such; by default an
            example, `example_frames`.
        stored: what is stored of a token, to know bytes; None: bytes are not shown.

    Raises:
        ConfigError: the configuration is wrong or has no layout, a number is impossible, or the file has no such video.
    """
    config = ServerConfig.parse(policy, source)
    if config.layout is None:
        raise ConfigError("there is nothing to draw: the configuration has no layout, so give it a grid")
    if block_size < 1:
        raise ConfigError(f"block size must be 1 or more, not {block_size}")
    if frames is not None and frames < 1:
        raise ConfigError(f"frames must be 1 or more, not {frames}")
    image_tokens = config.layout.condition_image_tokens
    frame = config.layout.frame_layout()
    ids, seen, example = None, "", config.policy.reads_tokens and sequence is None
    if sequence is not None and config.policy.reads_tokens:
        ids, condition_tokens = _ids(sequence, condition_tokens, TEXT_TOKENS + image_tokens)
        frames = _frames_of(ids, condition_tokens, frame.tokens_per_frame, frames)
        seen = f" for {sequence.name}"
    elif example:
        seen = " for an example video"
    elif sequence is not None:
        raise ConfigError(
            f"--sequence is for policies that look at tokens, such as packcache with selection: changed; what "
            f"{config.name} keeps here does not depend on them: leave it out"
        )
    frames = FRAMES if frames is None else frames
    if condition_tokens is None:
        condition_tokens = TEXT_TOKENS + image_tokens
    elif condition_tokens < image_tokens:
        # As for a request: a prompt shorter than the server's usual image has none.
        image_tokens = 0
    family = families.describing(frame, config.layout.axis_scale)
    masked = family.role == "canvas"
    encoding = None
    if config.precision.encodes:
        if not masked:
            raise ConfigError("precision is for models that make whole frames: leave it out")
        if stored is None:
            raise ConfigError(
                "precision: how many blocks an older frame takes depends on the model: give --model, or --layers, "
                "--kv-heads and --head-size"
            )
        encoding = config.encoding(stored.shape.kv_heads, stored.shape.head_size, block_size * stored.layer_bytes)
    if stored is not None:
        if masked:
            check_masked(stored.format.name)
        if config.positions == "rebase":
            check_turned(stored.format.name)
    least = image_tokens + family.least_text_tokens
    if family.least_text_tokens and condition_tokens < least:
        raise ConfigError(
            f"condition tokens must be {least} or more, not {condition_tokens}: so many has a prompt of this model "
            "without any words"
        )
    if negative_tokens is not None:
        if family.role != "causal" or config.layout.axis_scale is not None:
            raise ConfigError(
                "--negative-tokens is for models that make one token after the other, at positions of one axis: leave "
                "it out"
            )
        if not 1 <= negative_tokens <= MOST_NEGATIVE:
            raise ConfigError(f"--negative-tokens must lie between 1 and {MOST_NEGATIVE:,}, not {negative_tokens}")
        if condition_tokens == 0:
            raise ConfigError("--negative-tokens needs a condition, and this video has none: raise --condition-tokens")
    name = "JSON" if source.lstrip().startswith("{") else Path(source).name
    title = f"{name}: {config.name}{seen}"

    def explanation(layout: VideoLayout, unconditional: Explanation | None = None) -> Explanation:
        positions = config.positions_of(layout, config.policy)
        tokens = None if ids is None else lookup(_behind(ids, condition_tokens, layout.condition_tokens))
        retention = retention_of(layout, config.policy, block_size, encoding, tokens)
        if isinstance(retention, EncodedRetention):
            retention.check()
        check_policy(retention, frames)
        return Explanation(title, retention, positions, frames, unconditional, masked, example, stored, encoding)

    try:
        layout = VideoLayout(frame, condition_tokens, image_tokens)
        if example:
            ids = np.concatenate([np.zeros(condition_tokens, dtype=np.int64), example_frames(frame, frames)])
        second = family.other_layouts(layout) or _guided_layout(config, layout, negative_tokens)
        return explanation(layout, *map(explanation, second))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _guided_layout(config: ServerConfig, layout: VideoLayout, negative_tokens: int | None) -> tuple[VideoLayout, ...]:
    """A guided video in its second stream, as a server would have it; nothing, where there is none."""
    guidance = config.guidance
    options: dict[str, Any] = {"condition_image_tokens": layout.condition_image_tokens}
    if negative_tokens is not None:
        options |= {"guidance": 2, "negative_prompt_ids": [0] * negative_tokens}
    elif guidance is None or guidance.scale == 1 or guidance.negative_prompt_ids is None:
        return ()
    guiding = dataclasses.replace(config, guidance=guidance or GuidanceConfig())
    said = {f"{REQUEST_PREFIX}{name}": value for name, value in options.items()}
    made = guiding.request(said, layout.condition_tokens)
    assert made is not None
    return tuple(stream.plan.layout for stream in made.streams[1:])


def _behind(ids: Int64, condition_tokens: int, own: int) -> Int64:
    """Ids of a stream whose condition has ``own`` tokens: it ends as the video's does, with the same picture."""
    missing = max(0, own - condition_tokens)
    return np.concatenate([np.zeros(missing, dtype=np.int64), ids[max(0, condition_tokens - own) :]])


def _ids(path: Path, condition_tokens: int | None, usual: int) -> tuple[Int64, int]:
    """Token ids of the video to draw, and how many of them are condition.

    Raises:
        ConfigError: there is no file, or none of a video, or it has another condition than was asked for.
    """
    try:
        video = read_video(path, usual if condition_tokens is None else condition_tokens)
    except ConfigError as error:
        raise ConfigError(f"--sequence: {error}") from None
    if condition_tokens not in (None, video.condition_tokens):
        raise ConfigError(
            f"--condition-tokens is {condition_tokens}, and {shown_path(path)} says that its video has "
            f"{video.condition_tokens}: leave the option out"
        )
    return np.array(video.token_ids, dtype=np.int64), video.condition_tokens


def _frames_of(ids: Int64, condition_tokens: int, tokens_per_frame: int, frames: int | None) -> int:
    """How many frames of a video are drawn: ``frames``, or all that it has.

    Raises:
        ConfigError: it has not so many; the last one drawn need not be finished.
    """
    whole = (len(ids) - condition_tokens) // tokens_per_frame
    if whole >= 1 and (frames is None or frames <= whole + 1):
        return min(whole, MOST_FRAMES) if frames is None else frames
    wanted = "a whole frame" if frames is None or whole < 1 else f"{frames - 1} whole frames"
    raise ConfigError(
        f"--sequence: {len(ids)} token ids, of which {condition_tokens} are condition, must have {wanted} of "
        f"{tokens_per_frame}, not {max(0, whole)}: give a longer video or fewer --frames"
    )


# -- text ----------------------------------------------------------------------------------------------------

_TEXT_STYLES = {
    DROPPED: "bright_black",
    IN_CONDITION: "yellow",
    0: "bold red",
    1: "bright_blue",
    2: "cyan",
    3: "green",
    4: "magenta",
    OLDEST_SHADE: "white",
}
_MIN_COLUMNS = 16
"""Blocks have at least so many characters: with less beside positions, those get a line of their own."""
_ENOUGH_COLUMNS = 24
"""Positions have what is left over by so many characters for blocks, up to a third of the terminal."""


def _character(state: int) -> str:
    if state == NOT_YET:
        return " "
    if state == DROPPED:
        return "·"
    if state == IN_CONDITION:
        return "C"
    if state == 0:
        return "#"
    return str(state) if state < 10 else "+"


def _shown_states(view: FrameView, columns: int) -> list[int]:
    """One state a character.

    Of a thinned frame as large a share of characters is live as of its blocks, so that what is seen does not
    depend on the width; a frame of which anything lives is never shown as gone.
    """
    if len(view.states) <= columns:
        return [int(state) for state in view.states]
    edges = np.linspace(0, len(view.states), columns + 1).astype(int)
    shown = [DROPPED] * columns
    owner_of = [int(view.owners[(start + stop) // 2]) for start, stop in pairwise(edges)]
    first = 0
    while first < columns:
        last = first
        while last < columns and owner_of[last] == owner_of[first]:
            last += 1
        _show_segment(view, edges, range(first, last), shown)
        first = last
    return shown


def _show_segment(view: FrameView, edges: npt.NDArray[np.int64], columns: range, shown: list[int]) -> None:
    """Fill in the characters of one frame (or of the condition)."""
    owner = view.owners[(edges[columns.start] + edges[columns.start + 1]) // 2]
    state = IN_CONDITION if owner == CONDITION else int(view.tokens.frame - owner)
    due = 0.5
    any_live = False
    for column in columns:
        cell = slice(edges[column], edges[column + 1])
        # A character on the border belongs to one of two frames, and the other's blocks do not count.
        states = view.states[cell][view.owners[cell] == owner]
        states = states[states != NOT_YET]
        if len(states) == 0:
            shown[column] = NOT_YET
            continue
        live = int(np.count_nonzero(states != DROPPED))
        any_live = any_live or live > 0
        due += live / len(states)
        if due >= 1:
            shown[column] = state
            due -= 1
    if any_live and all(shown[column] != state for column in columns):
        shown[columns[len(columns) // 2]] = state


def _style(state: int) -> str:
    return _TEXT_STYLES.get(min(state, OLDEST_SHADE), "")


def _position_words(explanation: Explanation, made: int) -> list[str]:
    """Positions of the frames retained while ``made`` is made."""
    return [f"{position:,}" for position in explanation.seen_at(explanation.overview.retained[made], made).tolist()]


def _positions_line(explanation: Explanation, made: int, width: int) -> Text:
    """`_position_words`, each in the colour of its frame's blocks: all, or the first and the last ones that fit."""
    words = _position_words(explanation, made)
    styles = [_style(made - frame) for frame in explanation.overview.retained[made].tolist()]
    if len(" ".join(words)) > width:
        room = width - len(f"{words[0]} … {words[-1]}")
        start = len(words) - 1
        while start > 1 and len(words[start - 1]) < room:
            start -= 1
            room -= len(words[start]) + 1
        words[1:start] = ["…"]
        styles[1:start] = [""]
    return Text(" ").join(map(Text, words, styles))


def _positions_width(explanation: Explanation, name: str, room: int, most: int) -> int | None:
    """Characters for a column ``name`` beside the blocks, out of ``room`` for both; None: there are not enough."""
    rows = [_position_words(explanation, made) for made in range(explanation.frames)]
    longest = max(len(" ".join(words)) for words in rows)
    range_width = max(len(f"{words[0]} … {words[-1]}") for words in rows)
    shortest = max(len(name), min(longest, range_width))
    if room - shortest < min(_MIN_COLUMNS, explanation.num_blocks):
        return None
    left_over = room - min(_ENOUGH_COLUMNS, explanation.num_blocks)
    return max(shortest, min(longest, most, left_over))


def print_text(explanation: Explanation, console: Console) -> None:
    """Print one line a frame, one character a block (or a group of blocks where the terminal is narrow)."""
    console.print(Text(f"{explanation.title} ({explanation.options})", style="bold"))
    for name, stream in explanation.streams.items():
        if name:
            console.print()
            console.print(Text(name.capitalize(), style="bold"))
        _print_stream(stream, console)
    yours = ["What is kept depends on what is seen: --sequence FILE draws it for a video of yours."]
    for sentence in [*explanation.passes_summary, *explanation.bytes_summary, *(yours if explanation.example else ())]:
        console.print()
        console.print(Text(sentence))


def _print_stream(explanation: Explanation, console: Console) -> None:
    layout = explanation.retention.layout
    number_width = len(str(explanation.frames - 1))
    tokens_width = len(f"{layout.frame_start(explanation.frames):,}")
    held = (
        []
        if explanation.storage is None
        else [shown_bytes(explanation.bytes_of(own)) for own in explanation.overview.blocks]
    )
    # "frame ", number, " │", the blocks, "│ ", tokens, " of full"
    room = console.width - (6 + number_width + 2 + 2 + tokens_width + 8)
    bytes_width = max(map(len, held), default=-2) + 2
    if room - bytes_width < min(_MIN_COLUMNS, explanation.num_blocks):
        # What is held at most is said below.
        held, bytes_width = [], 0
    room -= bytes_width
    name, meaning = "positions", "where the model sees each retained frame's first token"
    if explanation.positions.axes == 3:
        name, meaning = "times (t)", "time axis of each retained frame's first visual token"
    width = _positions_width(explanation, name, room - 2, console.width // 3)
    beside = width is not None
    if width is not None:
        room -= 2 + width
    else:
        width = console.width - (6 + number_width + 2)
    columns = min(explanation.num_blocks, max(_MIN_COLUMNS, room))
    per_character = explanation.num_blocks / columns
    console.print(Text(explanation.shape))
    console.print(_text_legend(explanation, per_character))
    console.print(Text(f"{name}{'' if beside else ', below each row'}: {meaning}, oldest first"))
    console.print()
    words = "blocks, first to last" if columns > 24 else "blocks"
    head = Text(f"{'':{6 + number_width}} ┌{words:─<{columns}.{columns}}┐ ")
    head.append(f"{'live':>{tokens_width}} of full{'held' if held else '':>{bytes_width}}")
    if beside:
        head.append(f"  {name}")
    console.print(head, no_wrap=True, overflow="crop")
    for view in explanation.views():
        made = view.tokens.frame
        line = Text(f"frame {made:>{number_width}} │")
        for state in _shown_states(view, columns):
            line.append(_character(state), _style(state))
        line.append(f"│ {view.tokens.live:>{tokens_width},} {view.tokens.percent:>4.0f} %")
        line.append(f"{held[made] if held else '':>{bytes_width}}")
        if beside:
            line.append("   ")
        else:
            console.print(line, no_wrap=True, overflow="crop")
            line = Text(" " * (console.width - width))
        line.append_text(_positions_line(explanation, made, width))
        console.print(line, no_wrap=True, overflow="crop")
    console.print()
    console.print(Text(explanation.summary))
    console.print(Text(explanation.positions_summary))


def _text_legend(explanation: Explanation, per_character: float) -> Text:
    oldest = explanation.overview.oldest
    entries = [(IN_CONDITION, "condition"), (0, "frame being made")]
    if oldest >= 1:
        entries.append((1, "previous frame"))
    if oldest >= 2:
        entries.append((2, "the one before that, and so on" if oldest > 2 else "the one before that"))
    if explanation.overview.first_dropping is not None:
        entries.append((DROPPED, "dropped"))
    legend = Text()
    for state, meaning in entries:
        legend.append(_character(state), _TEXT_STYLES[state])
        legend.append(f" {meaning}   ")
    if per_character > 1:
        legend.append(f"(a character stands for {per_character:.1f} blocks)")
    legend.rstrip()
    return legend


# -- picture -------------------------------------------------------------------------------------------------

_COLOURS = {
    NOT_YET: "#ffffff",
    DROPPED: "#e4e4e4",
    IN_CONDITION: "#e69f00",
    0: "#c8102e",
    1: "#08306b",
    2: "#2171b5",
    3: "#4a9fc9",
    4: "#5bb8a5",
    OLDEST_SHADE: "#7fbf5a",
}
_HALF_DROPPED = "#82aacc"
"""How a frame 2 back looks with half of its blocks dropped."""
_MAX_SINGLE_BLOCKS = 600
"""Up to so many blocks each one is drawn. More are averaged in groups, so a thinned frame looks paler."""
_MIN_GROUP = 8
"""Blocks of the smallest group: smaller ones would draw the order of dropping as a false pattern."""
_GRID_BLOCKS = 96
"""Up to so many blocks each one is outlined."""
_LABELLED_FRAMES = 32
"""Up to so many frames each one is labelled."""
_OUTLINED_FRAMES = 64
"""Up to so many frames each one is outlined."""


def draw(explanation: Explanation, path: Path) -> None:
    """Write a PNG or SVG, a row a frame: live blocks, positions of their frames, live tokens beside the full cache.

    Both streams of a video that has two are drawn, one below the other.

    Raises:
        OSError: the file cannot be written.
    """
    row_height = 0.32 if explanation.frames <= _LABELLED_FRAMES else 10 / explanation.frames
    streams = explanation.streams
    height = 0.9 + (2.1 + row_height * max(explanation.frames, 4)) * len(streams)
    figure = new_figure(16, height)
    rows = figure.subplots(len(streams), 3, squeeze=False, sharey=True, width_ratios=[3.2, 1.2, 1])
    for (name, stream), (blocks, positions, tokens) in zip(streams.items(), rows, strict=True):
        _draw_blocks(stream, blocks)
        _draw_positions(stream, positions)
        _draw_tokens(stream, tokens)
        shape = f"{name.capitalize()}: {stream.shape}" if name else stream.shape
        blocks.set_title(f"{shape}\n{stream.summary}", fontsize=10)
        if name:
            blocks.set_ylabel(f"frame being made,\n{name}")
    _draw_words(explanation, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _pixels(explanation: Explanation) -> npt.NDArray[np.float64]:
    """RGB [frames, columns, 3]: the mean colour of the `_group` of blocks behind each column."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(_COLOURS[state]) for state in range(NOT_YET, OLDEST_SHADE + 1)])
    edges = np.arange(0, explanation.num_blocks, _group(explanation))
    sizes = np.diff(edges, append=explanation.num_blocks)
    rows = []
    for view in explanation.views():
        colours = palette[np.minimum(view.states, OLDEST_SHADE) - NOT_YET]
        rows.append(np.add.reduceat(colours, edges, axis=0) / sizes[:, None])
    return np.stack(rows)


def _group(explanation: Explanation) -> int:
    """Blocks of a column. Groups of other sizes than powers of two would draw the order of dropping as stripes."""
    if explanation.num_blocks <= _MAX_SINGLE_BLOCKS:
        return 1
    group = _MIN_GROUP
    while explanation.num_blocks > group * _MAX_SINGLE_BLOCKS:
        group *= 2
    return group


def _draw_blocks(explanation: Explanation, axes: Axes) -> None:
    num_blocks, frames = explanation.num_blocks, explanation.frames
    pixels = _pixels(explanation)
    # The last group may be shorter; what it has too much is cut off below.
    extent = (0, _group(explanation) * pixels.shape[1], frames - 0.5, -0.5)
    axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=extent)
    if frames <= _OUTLINED_FRAMES:
        for row in range(1, frames):
            axes.axhline(row - 0.5, color="white", linewidth=min(2.0, 40 / frames))
    if num_blocks <= _GRID_BLOCKS:
        for block in range(1, num_blocks):
            axes.axvline(block, color="white", linewidth=0.6)
    first_blocks = [explanation.retention.blocks.frame_blocks(frame).start for frame in range(frames)]
    if frames <= _OUTLINED_FRAMES:
        for start in first_blocks:
            axes.axvline(start, color="#555555", linewidth=0.5, alpha=0.6)
    names = ["condition", *(f"frame {frame}" for frame in range(frames))]
    # Names that would run into each other are left out; the first always stays.
    wide_enough = num_blocks / 10
    top = axes.secondary_xaxis("top")
    ticks: list[tuple[float, str]] = []
    for name, start, stop in zip(names, [0, *first_blocks], [*first_blocks, num_blocks], strict=True):
        middle = (start + stop) / 2
        if stop > start and (not ticks or middle - ticks[-1][0] >= wide_enough):
            ticks.append((middle, name))
    top.set_xticks([middle for middle, _ in ticks], [name for _, name in ticks], fontsize=9)
    top.tick_params(length=0)
    axes.set_xlabel(f"block of the sequence ({explanation.retention.block_size} tokens each), first to last")
    axes.set_ylabel("frame being made")
    if frames <= _LABELLED_FRAMES:
        axes.set_yticks(range(frames))
    axes.set_xlim(0, num_blocks)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _position_bars(explanation: Explanation, made: int) -> Iterator[tuple[int, int, int]]:
    """State, first position and the one behind the last of what is retained while ``made`` is made."""
    retained = explanation.overview.retained[made]
    scale = explanation.positions.scale
    condition_stop = int(explanation.seen_at(np.array([0]), 0)[0])
    if scale and explanation.retention.layout.condition_image_tokens:
        # An image in the condition is one moment, as any other frame is.
        condition_stop -= scale[TIME] - 1
    condition_stop = min(explanation.overview.condition_stops[made], condition_stop)
    if condition_stop:
        yield IN_CONDITION, 0, condition_stop
    starts = explanation.seen_at(retained, made)
    # Not where the next frame is seen: several are at the place of the window's oldest, where some outlive the window.
    following = starts + (scale[TIME] if scale else explanation.retention.layout.tokens_per_frame)
    shades = np.minimum(made - retained, OLDEST_SHADE)
    # Neighbours of one colour are one bar: a full cache retains as many frames as the video has.
    first = np.flatnonzero((np.diff(shades, prepend=-1) != 0) | (np.append(-1, following[:-1]) != starts))
    last = np.append(first[1:], len(retained)) - 1
    stops = starts + 1 if scale else following
    yield from zip(shades[first].tolist(), starts[first].tolist(), stops[last].tolist(), strict=True)


def _draw_positions(explanation: Explanation, axes: Axes) -> None:
    outlined = explanation.frames <= _OUTLINED_FRAMES
    height = 0.8 if outlined else 1.0
    for made in range(explanation.frames):
        states, starts, stops = zip(*_position_bars(explanation, made), strict=True)
        axes.broken_barh(
            [(start, stop - start) for start, stop in zip(starts, stops, strict=True)],
            (made - height / 2, height),
            facecolors=[_COLOURS[state] for state in states],
            edgecolor="white" if outlined else "none",
            linewidth=0.5 if outlined else 0,
            antialiased=outlined,
        )
    scale = explanation.positions.scale
    axes.set_title(f"positions that the model sees:\n{explanation.positions_bound}", fontsize=10)
    axes.set_xlabel(f"position in time (t); frames are {scale[TIME]} apart" if scale else "position")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_tokens(explanation: Explanation, axes: Axes) -> None:
    tokens, stored = explanation.overview.tokens, explanation.storage
    frames, live, full = zip(*tokens, strict=True)
    height = 0.8 if len(tokens) <= _OUTLINED_FRAMES else 1.0
    axes.barh(frames, full, height=height, color="#dddddd", label="full cache")
    axes.barh(frames, live, height=height, color="#3b6ea5", label="live")
    if len(tokens) <= _LABELLED_FRAMES:
        for row in tokens:
            axes.annotate(
                f"{row.percent:.0f} %",
                (row.full, row.frame),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_xlim(0, max(full) * 1.18)
    title, unit = "tokens in the cache\n", "tokens"
    if stored is not None:
        most, whole = (
            explanation.bytes_of(count) for count in (max(explanation.overview.blocks), explanation.num_blocks)
        )
        title = f"tokens in the cache: at most\n{shown_bytes(most)}, full cache {shown_bytes(whole)}"
        unit = f"tokens, of {shown_bytes(stored.token_bytes)} each"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=8, frameon=False)


def _draw_words(explanation: Explanation, figure: Figure) -> None:
    from matplotlib.patches import Patch

    overview = explanation.overview
    entries = [(_COLOURS[IN_CONDITION], "condition (text, image)"), (_COLOURS[0], "frame being made")]
    for distance in range(1, min(overview.oldest, OLDEST_SHADE) + 1):
        more = " or more" if distance == OLDEST_SHADE else ""
        name = "previous frame" if distance == 1 else f"{distance}{more} frames back"
        entries.append((_COLOURS[distance], name))
    if overview.first_dropping is not None:
        if explanation.num_blocks > _MAX_SINGLE_BLOCKS:
            entries.append((_HALF_DROPPED, "paler: thinned"))
        entries.append((_COLOURS[DROPPED], "dropped"))
    patches = [Patch(facecolor=colour, edgecolor="#999999", label=label) for colour, label in entries]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9, frameon=False)
    lines = [
        f"{explanation.title} ({explanation.options})",
        *explanation.passes_summary[1:],
        *explanation.bytes_summary,
    ]
    figure.suptitle("\n".join(lines), fontsize=11)
