"""What lives of a video, as clients see it: of each stream by its own ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.encoded import retention_of
from vllm_packcache.core.retention import Retention
from vllm_packcache.families import LUMOS, lumos
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


def test_an_encoded_frame_counts_as_the_blocks_that_it_lives_in() -> None:
    layout = {"grid": [8, 8], "frame_start_tokens": 3, "row_end_tokens": 1, "frame_end_tokens": 1}
    config = {"layout": layout, "window": 4, "history_frames": 4, "selection": "spatial"}
    server = ServerConfig.parse("packcache", config | {"precision": {"history": "int4"}}, family=LUMOS)
    encoding = server.encoding(2, 64, BLOCK * 2 * 2 * 64 * 4)
    prompt = lumos.text_prompt([], 6, 4)
    made = server.request({"packcache_frames": 6, "packcache_seed": 1}, prompt)
    assert made is not None
    as_written, encoded = Living(made, prompt, BLOCK), Living(made, prompt, BLOCK, encoding)
    retentions = [retention_of(own.plan.layout, own.plan.policy, BLOCK, encoding) for own in made.streams]
    for number in range(6):
        plain, said = (living.add([0] * 76) for living in (as_written, encoded))
        last = [own.layout.frame_start(number + 1) - 1 for own in retentions]
        lives = [
            {*own.live_blocks(token).tolist(), token // BLOCK} for own, token in zip(retentions, last, strict=True)
        ]
        assert said["resident_blocks"] == sum(map(len, lives))
        assert said["full_tokens"] == plain["full_tokens"]
        freed = plain["resident_blocks"] - said["resident_blocks"]
        assert plain["resident_tokens"] - said["resident_tokens"] == freed * BLOCK
        # Two frames have to be there before one is older than the newest.
        assert (freed > 0) == (number >= 2)
