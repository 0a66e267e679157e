"""What it costs to turn rounded keys again and again: a key is turned for W slides or so, and then it goes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import block_sizes, layouts, packcaches, quick
from vllm_packcache.core.layout import CONDITION, FrameLayout, VideoLayout
from vllm_packcache.core.positions import Positions, mm_rope_axes, slide_angles
from vllm_packcache.core.retention import Retention

WINDOW = 16
FREQUENCIES = 10_000.0 ** (-np.arange(64) / 64)
UNIT_ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

VIDEOS = {
    "one axis": Positions(VideoLayout(FrameLayout(257), 288), WINDOW),
    "three axes": Positions(VideoLayout(FrameLayout.from_grid((8, 30), 3, 1, 1), 40), WINDOW, (4, 8, 8)),
}


def turned(keys: Tensor, angles: np.ndarray) -> Tensor:
    """Pairs of channels [n, D/2, 2] in float32, turned by ``angles`` [n, D/2]."""
    cos, sin = (torch.from_numpy(function(angles)).float() for function in (np.cos, np.sin))
    left, right = keys.float().unbind(-1)
    return torch.stack([left * cos - right * sin, right * cos + left * sin], dim=-1)


@pytest.mark.parametrize("positions", VIDEOS.values(), ids=VIDEOS.keys())
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
def test_rounding_adds_up_to_no_more_than_its_bound(dtype, positions):
    """Turning keeps lengths and so errors; storing adds at most u |pair|: after n slides (1 + u)^(n + 1) - 1."""
    unit = UNIT_ROUNDOFF[dtype]
    axis_of = mm_rope_axes(64) if positions.axes == 3 else np.zeros(64, dtype=np.int64)
    tokens = np.arange(positions.layout.frame_start(WINDOW), positions.layout.frame_start(WINDOW + 1))
    keys = torch.randn(len(tokens), 64, 2, generator=torch.Generator().manual_seed(0))
    lengths = keys.norm(dim=-1)
    per_slide = slide_angles(positions, FREQUENCIES, axis_of)[positions.slide_kinds(tokens)]

    def truth(window_start: int) -> Tensor:
        return turned(keys, positions.of(tokens, window_start)[axis_of].T * FREQUENCIES)

    # Pairs that stay; those that turn by about a rounding off a quarter turn, and so are rounded alike each time.
    stays = torch.from_numpy(per_slide == 0)
    off_quarter = np.abs(per_slide - np.round(per_slide / (np.pi / 2)) * (np.pi / 2))
    slow = torch.from_numpy(off_quarter < 16 * unit) & ~stays
    stored = truth(0).to(dtype)
    first = (stored.float() - truth(0)).norm(dim=-1) / lengths
    typical = first.square().mean().sqrt()
    assert unit / 4 < typical < unit
    for slides in range(WINDOW + 1):
        if slides:
            stored = turned(stored, per_slide).to(dtype)
        errors = (stored.float() - truth(slides)).norm(dim=-1) / lengths
        # Beside the roundings of storing: those of float32 arithmetic, and half's fixed steps near zero.
        bound = (1 + unit) ** (slides + 1) - 1 + (slides + 1) * (2**-21 + 2**-24 / lengths)
        assert (errors <= bound).all()
        assert torch.equal(errors[stays], first[stays])
        # Elsewhere roundings are independent, so what really happens grows with the root of their number.
        root = (slides + 1) ** 0.5 * typical
        assert 0.85 * root < errors[~stays & ~slow].square().mean().sqrt() < 1.15 * root
        if slow.any():
            assert errors[slow].square().mean().sqrt() < (slides + 1.2) * typical


@quick
@given(layout=layouts(), policy=packcaches(), block_size=block_sizes, frame=st.integers(0, 12))
def test_a_key_is_turned_for_as_many_slides_as_the_window_has_frames(layout, policy, block_size, frame):
    """And once more for each frame that its block reaches into: the block goes with the newest of them."""
    positions = Positions(layout, policy.window)
    retention = Retention(layout, policy, block_size)
    for block in {layout.frame_start(frame) // block_size, (layout.frame_start(frame + 1) - 1) // block_size}:
        tag = retention.blocks.tag(block)
        if tag == CONDITION:
            continue
        # A frame's blocks are turned where it slides; the frame that is made is at its place already.
        lives = [
            later for later in range(frame + 1, tag + policy.window + 3) if block in retention.history_blocks(later)
        ]
        slides = sum(positions.slides(layout.frame_start(later)) for later in lives)
        assert slides <= policy.window + tag - frame
