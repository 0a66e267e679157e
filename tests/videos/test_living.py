"""What lives of a video, as clients see it: of each stream by its own ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.retention import Retention
from vllm_packcache.videos.living import Living

TOKENS, BLOCK = 24, 8


@pytest.mark.parametrize("negative", [[7] * 9, [7] * 40], ids=["shorter", "longer"])
def test_a_second_stream_is_seen_by_its_own_ids(negative: list[int]) -> None:
    config = {"layout": {"tokens_per_frame": TOKENS}, "guidance": True, "selection": "changed", "window": 4}
    server = ServerConfig.parse("packcache", {**config, "history_frames": 1.5})
    prompt = list(range(20))
    options: dict[str, Any] = {"packcache_guidance": 3.0, "packcache_negative_prompt_ids": negative}
    made = server.request(options, prompt)
    assert made is not None
    random = np.random.default_rng(3)
    frames = random.integers(100, size=(6, TOKENS))
    # One block or two of a frame differ from the next one: which, only the right ids say.
    for frame in range(1, 6):
        frames[frame] = np.where(np.arange(TOKENS) // BLOCK == frame % 3, frames[frame], frames[frame - 1])
    living = Living(made, prompt, BLOCK)
    for number, ids in enumerate(frames.tolist()):
        said = living.add(ids)["streams"]
        for name, stream in zip(("conditional", "unconditional"), made.streams, strict=True):
            own = [*(stream.condition or prompt), *frames[: number + 1].ravel().tolist()]
            retention = Retention(
                stream.plan.layout, stream.plan.policy, BLOCK, lambda start, stop, own=own: np.array(own[start:stop])
            )
            # With that of the last token, which may begin one.
            lives = sorted({*retention.live_blocks(len(own) - 1).tolist(), (len(own) - 1) // BLOCK})
            assert said[name]["resident_blocks"] == len(lives)
            states = np.repeat(*np.array(said[name]["blocks"]).T)
            assert np.flatnonzero(states >= -1).tolist() == lives
