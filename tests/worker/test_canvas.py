"""A canvas, by what it asks for and what it makes of it: the same as a loop that knows every token. Ties are frequent.

Where tokens are as confident as the one that cuts, fewer are unknown than is known beforehand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.runner import needs_v2
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.policies import Full
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.families.lumos import MaskedOptions
from vllm_packcache.families.schedule import schedule
from vllm_packcache.reference.masked_video import unmask

pytestmark = needs_v2

GRID = (3, 4)
CODES = 5
LEVELS = (0.0, 1.0, 60.0)
"""Logits of the first code: of tokens that have the same one, all that is drawn is equally probable."""


class Logits:
    """Of every computation of a token in a stream others, from few numbers. Hidden states say which computation."""

    def __init__(self, seed: int) -> None:
        self._levels = np.random.default_rng(seed).integers(0, len(LEVELS), (64, 2, 19))

    def hidden(self, number: int, stream: int, offsets: torch.Tensor) -> torch.Tensor:
        """[n, 3] of tokens at ``offsets`` [n] of a frame in the pass of this number."""
        return torch.stack([torch.full_like(offsets, number), torch.full_like(offsets, stream), offsets], 1)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32, [n, V]."""
        logits = torch.zeros(len(hidden), CODES)
        logits[:, 0] = torch.tensor(LEVELS)[torch.from_numpy(self._levels)[tuple(hidden.T)]]
        return logits


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"guidance": 1},
        {"refresh": 4},
        {"reuse": 0.2},
        {"guidance_interval": 3},
        {"refresh": 3, "reuse": 0.15, "guidance_interval": 2, "guidance_from": 0.2, "guidance_until": 0.9},
    ],
    ids=str,
)
def test_rows_and_tokens_are_those_of_the_loop(changed, seed):
    from vllm_packcache.worker.sampler import Canvas

    # Noise of the confidence in some: with it a known token may be masked again where none is unknown.
    options = {"steps": 9, "guidance": 2, "seed": seed, "temperature": seed % 2, "reset_temperature": 1} | changed
    prompt = lumos.text_prompt([7], 2, 8)
    extra = {f"packcache_{name}": value for name, value in {"grid": list(GRID), "frames": 1, **options}.items()}
    request = LUMOS.request(ServerConfig(Full(), family=LUMOS), extra, prompt)
    canvas = Canvas(request, 0, torch.device("cpu"))
    offsets = torch.from_numpy(lumos.visual_offsets(GRID).copy())
    own, logits = request.options, Logits(seed)
    ids = torch.from_numpy(lumos.masked_frame(GRID))
    masked = [torch.zeros(19, dtype=torch.bool)] * 2
    states = [torch.zeros(19, 3, dtype=torch.int64) for _ in range(2)]
    fewer = 0

    for step, made in enumerate(schedule(own, GRID)):
        if made.computed:
            assert canvas.step == step
            given = []
            for stream, (asked, rows) in enumerate(zip(canvas.ask(), made.rows, strict=True)):
                if asked is None:
                    assert rows == 0
                    continue
                literal = torch.arange(19) if rows == 19 else masked[stream].nonzero()[:, 0]
                some = torch.arange(19) if asked.some is None else asked.some
                assert len(some) == rows
                fewer += rows - len(literal)
                written = some if asked.written is None else some[asked.written]
                assert sorted(written.tolist()) == literal.tolist()
                states[stream][literal] = logits.hidden(step, stream, literal)
                masked[stream] = ids == lumos.MASK
                given.append(logits.hidden(step, stream, some)[asked.chosen])
            hidden = torch.cat([*given, given[0]])
            assert canvas.choose(hidden, logits, 5) == len(hidden) - len(given[0])
        conditional, unconditional = (logits(of[offsets]) for of in states)
        if made.guided:
            conditional = own.guidance * (conditional - unconditional) + unconditional
        noise = lumos.step_noise(own.seed, 0, step, 12)
        tau = lumos.temperature(own, 0, step)
        ids[offsets] = unmask(conditional, ids[offsets], noise, step, own.steps, tau, forgets=own.fresh).ids
        following = [*schedule(own, GRID), made][step + 1]
        if following.computed or step == own.steps - 1:
            assert canvas.ids.tolist() == ids.tolist()
    assert canvas.commits
    assert all(seen is None or seen.hidden is None for seen in canvas._seen)
    assert fewer or "refresh" not in changed or seed % 2


def test_hidden_states_that_are_kept_are_a_canvas_own():
    """What they are a part of is as large as what all requests computed."""
    from vllm_packcache.worker.sampler import Canvas

    extra = {"packcache_grid": list(GRID), "packcache_steps": 4, "packcache_guidance_interval": 2}
    request = LUMOS.request(ServerConfig(Full(), family=LUMOS), extra, lumos.text_prompt([7], 2, 8))
    assert request.options == MaskedOptions(steps=4, guidance_interval=2)
    canvas, logits = Canvas(request, 0, torch.device("cpu")), Logits(0)
    asked = canvas.ask()
    hidden = torch.cat([logits.hidden(0, stream, own.chosen) for stream, own in enumerate(asked)])
    canvas.choose(torch.cat([hidden, hidden]), logits, 5)

    conditional, unconditional = canvas._seen
    assert conditional.hidden is None
    assert unconditional.hidden.tolist() == hidden[12:].tolist()
    assert unconditional.hidden.untyped_storage().nbytes() == hidden[12:].nbytes
