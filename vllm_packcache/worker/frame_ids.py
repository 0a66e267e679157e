"""Which ids may be sampled: a video's tokens have those that its frames' grammar allows.

vLLM has an interface for processors of logits on each of its runners. Both of ours derive a request's grammar from its
options, as everything else does, and know of every row which token of the sequence it is for: that is counted on the
host, also while steps are in flight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from vllm_packcache.config.server import ServerConfig, read_config
from vllm_packcache.core.grammar import VideoGrammar

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

FORBIDDEN = float("-inf")


def restrict(logits: Tensor, rows: Iterable[tuple[int, int, VideoGrammar]]) -> Tensor:
    """Forbid what may not stand where a row's token is.

    Whatever else forbids ids (a bias, bad words) leaves those that the grammar allows likelier than all others: of a
    place with one id, that is sampled.

    Args:
        logits: float32 [n, V], changed in place.
        rows: number of a row, index in the sequence of the token that is sampled from it, and the video's grammar.
    """
    asked = [(row, *grammar.allowed(token)) for row, token, grammar in rows]
    if not asked:
        return logits
    index, first, last = async_tensor_h2d(torch.tensor(asked), device=logits.device).unbind(1)
    own = logits[index].clamp_(min=torch.finfo(logits.dtype).min / 2**20)
    ids = torch.arange(logits.shape[1], device=logits.device)
    own.masked_fill_((ids < first[:, None]) | (ids > last[:, None]), FORBIDDEN)
    logits[index] = own
    return logits


def grammar_of(config: ServerConfig | None, params: SamplingParams, prompt_tokens: int) -> VideoGrammar | None:
    """The grammar of a request; None: its tokens may have any ids."""
    return None if config is None else config.grammar(params.extra_args, prompt_tokens)


class FrameIdsV1(LogitsProcessor):
    """For the V1 runner, which tells where in its batch a request is."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        self._config = read_config(vllm_config)
        self._videos: dict[int, tuple[VideoGrammar, int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Greedy sampling obeys too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """See vLLM's."""
        process_dict_updates(self._videos, batch_update, self._video)

    def _video(
        self, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> tuple[VideoGrammar, int, list[int]] | None:
        # Embeddings, of which the length is not told, are refused to a video with a grammar.
        grammar = None if prompt is None else grammar_of(self._config, params, len(prompt))
        return None if grammar is None or prompt is None else (grammar, len(prompt), output)

    def apply(self, logits: Tensor) -> Tensor:
        """See vLLM's. The list of a request's output grows, by placeholders where steps are in flight."""
        return restrict(
            logits, ((row, start + len(output), grammar) for row, (grammar, start, output) in self._videos.items())
        )


class FrameIdsV2(LogitsProcessorV2):
    """For the V2 runner, in which a request has a slot."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._config = read_config(vllm_config)
        self._states: Any = req_states
        self._videos: dict[int, VideoGrammar] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """See vLLM's."""
        grammar = grammar_of(self._config, sampling_params, int(self._states.prompt_len.np[req_idx]))
        self._videos.pop(req_idx, None)
        if grammar is not None:
            self._videos[req_idx] = grammar
        return grammar is not None

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """See vLLM's. Without drafts, which are refused, a request has one row."""
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        slots = enumerate(ctx.idx_mapping_np.tolist())
        return restrict(
            logits, ((row, lengths[row], self._videos[slot]) for row, slot in slots if slot in self._videos)
        )
