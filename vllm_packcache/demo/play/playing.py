"""The bundled world as a server has it played: pictures of its frames, games to begin with, and keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_packcache.demo.play.pictures import HEIGHT, WIDTH, Picture, picture
from vllm_packcache.demo.play.world import make_world
from vllm_packcache.sessions.messages import Create, Sampling
from vllm_packcache.sessions.playing import Control, Opening, Play

FRAMES_PER_SECOND = 6.0
"""Faster, nobody would jump where they meant to."""

_HELD_OUT = 2**31
"""Training draws worlds with smaller seeds."""
GAMES = {"Noon": _HELD_OUT + 511, "Dusk": _HELD_OUT + 514, "Night": _HELD_OUT + 503}
"""Seeds of worlds by the room that they begin in."""


class Pictures:
    """See `vllm_packcache.media.processors.pictures.Pictures`; ids are not made of pictures."""

    size = (WIDTH, HEIGHT)

    def decode(self, ids: npt.NDArray[np.int64]) -> Picture:
        """The picture of a frame, uint8 [224, 288, 3]."""
        return picture(ids)


def play() -> Play:
    """See `vllm_packcache.sessions.playing`."""
    # What comes next is certain: nothing is drawn by lot.
    certain = Sampling(temperature=0)
    openings = [
        Opening(name=name, session=Create(ids=make_world(seed).condition_ids(), sampling=certain))
        for name, seed in GAMES.items()
    ]
    return Play(
        title="Three rooms",
        hint="Leave things behind, walk through a door, and come back.",
        openings=tuple(openings),
        controls=(
            Control(label="Left", keys=("ArrowLeft", "KeyA"), action={"move": "left"}),
            Control(label="Jump", keys=("ArrowUp", "KeyW", "Space"), action={"jump": 1}),
            Control(label="Right", keys=("ArrowRight", "KeyD"), action={"move": "right"}),
            # Down for two frames, it would be left and taken again.
            Control(label="Gem", keys=("Digit1",), action={"drop": "gem"}, once=True),
            Control(label="Flower", keys=("Digit2",), action={"drop": "flower"}, once=True),
            Control(label="Lantern", keys=("Digit3",), action={"drop": "lantern"}, once=True),
        ),
        frames_per_second=FRAMES_PER_SECOND,
    )
