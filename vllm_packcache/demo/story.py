"""The story of a demo in pictures: one video made with several caches, what each still holds, costs and loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from vllm_packcache.core.policies.base import Int64
from vllm_packcache.demo.scores import Sightings, sightings, wrong_frames
from vllm_packcache.demo.tokenizer import VideoTokenizer
from vllm_packcache.demo.world import PATCH, World
from vllm_packcache.media.pictures import Pixels
from vllm_packcache.tools.figures import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bools = npt.NDArray[np.bool_]

COLOURS = ("#5c6470", "#1f66d6", "#e0861a")
"""Of the caches, in their order."""
WRONG = "#e3001b"
"""Outline of a frame in which an object is wrong."""
LONGER = "#fff1cc"
"""Behind frames that the model was not trained to reach."""
BEYOND = "longer than trained on"
PALE = 0.16
"""How much is left of the colour of what a cache has dropped; the rest is white."""
SCALE = 4
"""Pixels of the written pictures for each pixel of the model's."""

MOST_COLUMNS = 11
"""Frames in a row of the picture: more are too small to be seen where a page shows it."""
LAST_FRAMES = 5
"""That are always among them: what is left of older frames fades here."""


@dataclass(frozen=True)
class Row:
    """The video that was made with one cache.

    Args:
        label: what the cache is called.
        keeps: what it keeps of the history, in a few words.
        codes: codewords of frames 1, 2, ..., int64 [T, 16, 16].
        held: the places that it still holds when the last frame is made, bool [T + 1, 16, 16]. The first are of the
            given picture.
        tokens: most that it held while each frame was made.
        seconds: a frame.
    """

    label: str
    keeps: str
    codes: Int64
    held: Bools
    tokens: Sequence[int]
    seconds: float


class Film(NamedTuple):
    """Frames beside others: of a cache, or the true ones, of which there is no row."""

    label: str
    about: str
    codes: Int64
    row: Row | None
    colour: str


@dataclass(frozen=True)
class Story:
    """One video made with several caches.

    Args:
        rows: of the full cache, of packcache, and any others.
        given: codewords of the picture that the video begins with, int64 [16, 16]; None: there is none.
        world: in which the true frames are known; None: there is none.
        trained: frames of the longest videos that the model was trained on.
        tokenizer: of the pictures.
    """

    rows: tuple[Row, ...]
    given: Int64 | None
    world: World | None
    trained: int
    tokenizer: VideoTokenizer

    @property
    def frames(self) -> int:
        """T, how many were made."""
        return len(self.rows[0].codes)

    @cached_property
    def truth(self) -> Int64 | None:
        """Codewords of the true frames, int64 [T, 16, 16]; None: nobody knows."""
        if self.world is None:
            return None
        return np.stack([self.world.frame_ids(k) for k in range(1, self.frames + 1)])

    def sightings(self, row: Row) -> Sightings | None:
        """What becomes of the objects in a row; None: nobody knows."""
        return None if self.world is None else sightings(self.world, row.codes)

    def films(self) -> Iterator[Film]:
        """The truth, where it is known, and what was made with each cache."""
        if self.truth is not None:
            yield Film("the truth", "how it should look", self.truth, None, "black")
        for row, colour in zip(self.rows, COLOURS, strict=True):
            yield Film(row.label, row.keeps, row.codes, row, colour)

    def wrong(self, film: Film) -> Bools:
        """In which of its frames an object is missing or out of place, bool [T]; none, where nobody knows."""
        if self.world is None:
            return np.zeros(self.frames, bool)
        return wrong_frames(self.world, film.codes)

    def objects(self, row: Row) -> tuple[int, int] | None:
        """How many sightings of objects are right, and how many there are; None: nobody knows."""
        found = self.sightings(row)
        return None if found is None else (int(found.right.sum()), int(found.visible.sum()))

    def pictures(self, codes: Int64) -> Pixels:
        """Frames as they are written, [T, H, W, 3]."""
        frames = self.tokenizer.decode_frames(codes + self.tokenizer.visual_offset)
        return frames.repeat(SCALE, axis=1).repeat(SCALE, axis=2)

    @property
    def sentence(self) -> str:
        """What is to be seen."""
        full, packed, *others = self.rows
        longer = self.frames - self.trained
        video = f"{self.frames} frames" + (f", {longer} more than the model was trained on" if longer > 0 else "")
        share = packed.tokens[-1] / full.tokens[-1]
        held = f"{video}: {packed.label} holds {share:.0%} of the full cache's tokens"
        if (own := self.objects(packed)) is None:
            return f"{held}."
        rest = ", ".join(f"{row.label}: {count[0]}" for row in (full, *others) if (count := self.objects(row)))
        return f"{held} and gets {own[0]} of {own[1]} objects right ({rest})."

    @property
    def columns(self) -> dict[int, str]:
        """Frames that are drawn, ascending, 0 being the given picture; and what happens in them, in a word."""
        first = [0] if self.given is not None else []
        room = MOST_COLUMNS - len(first)
        moments = dict(self._moments())
        last = range(self.frames, max(0, self.frames - LAST_FRAMES), -1)
        chosen = list(dict.fromkeys([*last, *moments]))[:room]
        others = [k for k in range(1, self.frames + 1) if k not in chosen]
        evenly = np.linspace(0, len(others) - 1, min(room - len(chosen), len(others))).round().astype(int)
        chosen += [others[index] for index in evenly]
        return {k: moments.get(k, "") for k in (*first, *sorted(chosen))}

    def _moments(self) -> Iterator[tuple[int, str]]:
        """Frames in which objects are hidden, as few as show each of these times, and in which they have returned.

        The later ones come first: they are what a cache forgets.
        """
        found = self.sightings(self.rows[0])
        if found is None:
            return
        times = []
        for hidden in found.hidden.T:
            edges = np.flatnonzero(np.diff(hidden, prepend=False, append=False))
            times += [range(start + 1, stop + 1) for start, stop in edges.reshape(-1, 2).tolist()]
        while times:
            last = max(times, key=lambda time: time.start)
            common = [time for time in times if last.start in time]
            yield (last.start + min(time.stop for time in common) - 1) // 2, "hidden"
            times = [time for time in times if time not in common]
        yield from ((int(k) + 1, "back") for k in np.flatnonzero(found.returned.any(1))[::-1])


def draw(story: Story, path: Path) -> None:
    """Write the story as one PNG.

    Raises:
        OSError: the file cannot be written.
    """
    figure = new_figure(14.6, 8.6 if story.world else 7.4)
    rows = len(story.rows) + (story.world is not None)
    films, chart = figure.subplots(2, 1, height_ratios=[rows * 1.13 + 0.95, 1.9])
    # Lines of about the same length.
    lines = -(-len(story.sentence) // 88)
    figure.suptitle(fill(story.sentence, len(story.sentence) // lines + 9), fontsize=19, fontweight="bold")
    _draw_films(story, films)
    _draw_tokens(story, chart)
    save(figure, path)


def _draw_films(story: Story, axes: Axes) -> None:
    """A row of frames for the truth and for each cache. The unit is the side of a frame."""
    pitch = 1.09
    left = {k: number * pitch for number, k in enumerate(story.columns)}
    right = len(left) * pitch
    films = list(story.films())
    bottom = len(films) * pitch
    _draw_head(story, axes, left, right, bottom)
    for number, film in enumerate(films):
        _draw_film(story, film, axes, left, right, number * pitch)
    words = "bright: still in the cache when the last frame is made     pale: dropped"
    if story.world is not None:
        words += "     red: an object is missing or out of place"
    axes.text(right / 2, bottom + 0.08, words, ha="center", va="top", fontsize=14)
    axes.set(xlim=(-2.0, right + 1.75), ylim=(bottom + 0.4, -1.0), aspect="equal")
    axes.axis("off")


def _draw_head(story: Story, axes: Axes, left: Mapping[int, float], right: float, bottom: float) -> None:
    """What stands above the rows, and behind them where the video is longer than what the model knows."""
    from matplotlib.patches import Rectangle

    axes.text(-0.15, -0.36, "frame", ha="right", va="bottom", fontsize=14)
    for k, x in left.items():
        axes.text(x + 0.5, -0.36, f"{k}" if k else "given", ha="center", va="bottom", fontsize=14)
        axes.text(x + 0.5, -0.08, story.columns[k], ha="center", va="bottom", fontsize=13, color="#555555")
    what = "tokens held, time" + ("" if story.world is None else ",\nobjects right")
    axes.text(right + 0.08, -0.08, what, va="bottom", fontsize=13, color="#555555")
    longer = [x for k, x in left.items() if k > story.trained]
    if longer:
        start = longer[0] - 0.045
        axes.add_patch(Rectangle((start, -0.7), right - 0.045 - start, bottom + 0.7, color=LONGER, zorder=0))
        middle = (start + right - 0.045) / 2
        axes.text(middle, -0.77, BEYOND, ha="center", va="bottom", fontsize=13)


def _draw_film(story: Story, film: Film, axes: Axes, left: Mapping[int, float], right: float, top: float) -> None:
    from matplotlib.patches import Rectangle

    name, about, codes, row, colour = film
    axes.text(-0.15, top + 0.42, name, ha="right", va="bottom", fontsize=17, fontweight="bold", color=colour)
    axes.text(-0.15, top + 0.46, fill(about, 22), ha="right", va="top", fontsize=13, color="#444444")
    pictures, wrong = story.pictures(codes), story.wrong(film)
    if story.given is not None:
        pictures, wrong = np.concatenate([story.pictures(story.given[None]), pictures]), np.append(False, wrong)
    for k, x in left.items():
        index = k - (story.given is None)
        picture = pictures[index] if row is None else faded(pictures[index], row.held[k])
        axes.imshow(picture, extent=(x, x + 1, top + 1, top), interpolation="antialiased", zorder=1)
        if wrong[index]:
            axes.add_patch(Rectangle((x, top), 1, 1, fill=False, edgecolor=WRONG, linewidth=4, zorder=2))
    if row is not None:
        numbers = [f"{row.tokens[-1]:,} tokens", f"{row.seconds:.2f} s a frame"]
        if count := story.objects(row):
            numbers.append(f"{count[0]} of {count[1]} right")
        text = "\n".join(numbers)
        axes.text(right + 0.08, top + 0.5, text, va="center", fontsize=14, color=colour, linespacing=1.3)


def faded(picture: Pixels, held: Bools) -> Pixels:
    """A picture [H, W, 3] that is pale where a cache does not hold its tokens, bool [16, 16]."""
    side = PATCH * SCALE
    bright = held.repeat(side, 0).repeat(side, 1)[..., None]
    return np.where(bright, picture, 255 - (255 - picture.astype(float)) * PALE).astype(np.uint8)


def _draw_tokens(story: Story, axes: Axes) -> None:
    """What each cache held while each frame was made."""
    frames = range(1, story.frames + 1)
    for row, colour in zip(story.rows, COLOURS, strict=True):
        axes.plot(frames, row.tokens, color=colour, linewidth=3.5, label=row.label)
    end = story.frames + 0.5
    top = 1.2 * max(max(row.tokens) for row in story.rows)
    if story.frames > story.trained:
        axes.axvspan(story.trained + 0.5, end, color=LONGER, zorder=0)
        middle = (story.trained + 0.5 + end) / 2
        axes.text(middle, 0.98 * top, BEYOND, ha="center", va="top", fontsize=13)
    axes.set(xlim=(0.5, end), ylim=(0, top), xticks=frames)
    axes.set_xlabel("frame being made", fontsize=14)
    axes.set_ylabel("tokens held", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=14, frameon=False)


def animate(story: Story) -> Pixels:
    """The same as a video, [T, H, W, 3]: all rows side by side, with what each holds at that moment."""
    gap, head, foot = 16, 44, 96
    films = [(*film, story.pictures(film.codes), story.wrong(film)) for film in story.films()]
    side = films[0][-2].shape[1]
    most = max(max(row.tokens) for row in story.rows)
    size = (len(films) * (side + gap) + gap, head + side + foot)
    sheets = []
    for k in range(story.frames):
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        for number, (name, _, _, row, colour, pictures, wrong) in enumerate(films):
            left = gap + number * (side + gap)
            pen.text((left + side / 2, 20), name, fill=colour, font_size=24, anchor="mm")
            sheet.paste(Image.fromarray(pictures[k]), (left, head))
            if wrong[k]:
                pen.rectangle((left - 6, head - 6, left + side + 5, head + side + 5), outline=WRONG, width=6)
            if row is None:
                continue
            below = head + side + 12
            pen.rectangle((left, below, left + side * row.tokens[k] / most, below + 12), fill=colour)
            pen.text((left, below + 18), f"{row.tokens[k]:,} tokens held", fill=colour, font_size=20)
        words = f"frame {k + 1} of {story.frames}"
        if k >= story.trained:
            words += f": longer than the {story.trained} that the model was trained on"
        pen.text((size[0] / 2, size[1] - 20), words, fill="black", font_size=20, anchor="mm")
        sheets.append(np.asarray(sheet))
    return np.stack(sheets)
