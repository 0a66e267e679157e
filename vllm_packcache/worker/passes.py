"""The model state of canvases (vLLM's Model Runner V2): frames that are made in passes, in two streams.

vLLM sees a frame as speculative tokens behind a request's last one. A pass in which tokens are chosen rejects all of
them, so nothing advances and the next pass writes over its keys; the commit accepts all of them. How many passes a
frame takes is known, so which pass a step is of is counted here, on the host: vLLM's own count of computed tokens runs
ahead where steps are scheduled before the ones in flight have been processed.

A guided request has two streams, which are rows of one batch: behind the rows that vLLM has scheduled come those of the
unconditional streams, with tokens, positions, slots and blocks of their own.

While a frame is made, what it sees of the past does not change. Its keys are rotated, its block table is compacted and
its positions are worked out once, with its first pass; all its passes read the same tensors.

Attention is causal in text alone. A token of text is an attention row of its own, and a picture is one: a row's queries
all see the same keys, so no mask is needed, and rows of different requests go together whatever they are of.

Where older frames are held in fewer bits, a picture that reads some is an attention call of its own, over a scratch
(`vllm_packcache.worker.history`); what leaves the newest place is encoded when the step has run that committed another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_packcache.config.server import CANVAS_OPTION, config_of
from vllm_packcache.core.forks import Forked
from vllm_packcache.core.layout import CONDITION
from vllm_packcache.core.plan import Plan, Stream
from vllm_packcache.core.positions import Int64
from vllm_packcache.core.retention import Decision, Retention
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import CanvasRequest
from vllm_packcache.worker.history.store import Encoded, History, Leaving, Past, Read, Turn
from vllm_packcache.worker.keys.layout import cached_keys, settle_scales
from vllm_packcache.worker.keys.rotation import KeyRotation, Rotary
from vllm_packcache.worker.sampler import Asked, Canvas, CanvasSampler

if TYPE_CHECKING:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup

_AXES = 3

NO_SLOT = -1
"""Keys of a token with this slot are written nowhere."""


class Picture(NamedTuple):
    """What all passes of one picture in one stream have in common.

    Attributes:
        blocks: int32, [live blocks]: what its tokens read, their own blocks at the end.
        seq_len: live tokens in them, and in what is encoded.
        positions: int64, [3, F].
        slots: int64, [F]: where its keys are written.
        past: the same as ``blocks``, and what of the past is encoded; None: nothing is.
        leaving: the frame that is to be encoded when this one is committed; None: none is.
    """

    blocks: Tensor
    seq_len: int
    positions: Tensor
    slots: Tensor
    past: Past | None
    leaving: Leaving | None


class Rows(NamedTuple):
    """Tokens of one request in one stream that a step computes, as attention rows.

    Attributes:
        ids: int64, [n].
        positions: int64, [3, n].
        slots: int64, [n].
        blocks: int32, [b]: those of the row that reads most.
        seq_lens: what each row reads, [rows].
        queries: tokens of each row.
        past: of a picture, see `Picture`.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    blocks: Tensor
    seq_lens: Int64
    queries: int
    past: Past | None = None

    @classmethod
    def of(cls, picture: Picture, ids: Tensor, asked: Asked | None = None) -> Rows:
        """The rows of a pass of ``picture``, with ids [F]: one, of all its tokens or of those that are asked for."""
        positions, slots = picture.positions, picture.slots
        if asked is not None and asked.some is not None:
            assert asked.written is not None, "of some it is said whose keys are written"
            ids, positions, slots = ids[asked.some], positions[:, asked.some], slots[asked.some]
            slots = torch.where(asked.written, slots, NO_SLOT)
        return cls(ids, positions, slots, picture.blocks, np.array([picture.seq_len]), len(ids), picture.past)


@dataclass
class StreamState:
    """One of a request's streams in the worker.

    Args:
        stream: what it is.
        retention: what it keeps, in blocks.
        group: its KV cache group.
    """

    stream: Stream
    retention: Retention
    group: int

    @property
    def start(self) -> int:
        """Tokens of the request before its first."""
        return self.stream.start

    @property
    def plan(self) -> Plan:
        """What it keeps."""
        return self.stream.plan


@dataclass
class CanvasState:
    """A request in the worker.

    Args:
        request: what it makes.
        streams: the conditional one first.
        tokens: of its prompt, and of the frames that it had made when it was preempted.
        canvas: the frame being made.
        pictures: of ``entered``, one for each stream.
        entered: the frame that the pictures are of.
        slot: of the request in block tables.
        shared_tokens: at its beginning, which another one of its request has computed for it.
    """

    request: CanvasRequest
    streams: list[StreamState]
    tokens: Int64
    canvas: Canvas
    pictures: list[Picture] = field(default_factory=list)
    entered: int = CONDITION
    slot: int = 0
    shared_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """A step.

    Args:
        vllm: vLLM's own description of it.
        rows: of every stream that any request has, by KV cache group, in batch order.
        canvases: those of which tokens are chosen or that are committed, by their index in vLLM's batch.
        chosen: which hidden states tokens are chosen by, [n].
    """

    vllm: InputBatch
    rows: list[list[Rows]]
    canvases: dict[int, Canvas]
    chosen: Tensor


class CanvasModelState(ModelState):
    """See the module."""

    # A frame is all that a step adds: no token follows the speculative ones.
    num_new_sampled_tokens_per_step = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = config_of(self)
        assert config is not None, "a family of canvases is always on"
        self._config = config
        self._videos: dict[str, CanvasState | None] = {}
        self._history = self._new_history()
        # By KV cache group, what is to be encoded when the step has run.
        self._left: list[tuple[int, Leaving]] = []
        self._batch: Batch | None = None
        self._nothing = torch.empty(0, dtype=torch.int64, device=self.device)

    def _new_history(self) -> History | None:
        """Of frames that are encoded; None: none are."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        spec = next(layer for layer in layers if hasattr(layer, "stream")).get_kv_cache_spec(self.vllm_config)
        encoding = spec.encoding
        if encoding is None:
            return None
        layout, policy = spec.usual_layout.shortest_condition(), self._config.policy
        most = Retention(layout, policy, spec.block_size).most_blocks()
        blocks = -(-self.max_model_len // spec.block_size) if most is None else most
        return History(encoding.packing, spec.block_size, self.model.rotate, blocks * encoding.page_bytes)

    def custom_sampler(self, sampler: Any) -> tuple[CanvasSampler, None]:
        """See `vllm_packcache.worker.sampler`."""
        del sampler
        visual_codes = self.model_config.get_vocab_size() - lumos.VISUAL_BEGIN
        return CanvasSampler(self.model, self._canvases_of, visual_codes), None

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Learn which KV cache group is which stream's."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups = kv_cache_config.kv_cache_groups
        streams = [getattr(group.kv_cache_spec, "stream", None) for group in groups]
        if sorted(streams, key=str) != [0, 1]:
            raise RuntimeError(f"a family of canvases has a KV cache group for each stream, not {len(groups)} groups")
        self._groups = (streams.index(0), streams.index(1))
        self._specs = [group.kv_cache_spec for group in groups]
        self._block_size = self._specs[0].block_size
        self._block_tables = block_tables
        layers = self.vllm_config.compilation_config.static_forward_context
        self._layers = [[layers[name] for name in group.layer_names] for group in groups]
        for layer in chain.from_iterable(self._layers):
            settle_scales(layer)
        if self._config.positions == "rebase":
            for layer in chain.from_iterable(self._layers):
                cached_keys(layer)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request comes, or comes back after a preemption."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        if params is None or CANVAS_OPTION not in (params.extra_args or {}):
            # vLLM warms up with requests of its own, which nothing checks. What they compute is of no use.
            self._videos[new_req_data.req_id] = None
            return
        request = self._config.request(params.extra_args, new_req_data.prompt_token_ids)
        assert isinstance(request, CanvasRequest), "every request of such a model is one"
        layout = request.conditional.layout
        streams = [
            StreamState(own, self._specs[group].retention_of(own.plan.layout, own.plan.policy), group)
            for own, group in zip(request.streams, self._groups, strict=False)
        ]
        tokens = np.array(new_req_data.prefill_token_ids, dtype=np.int64)
        frame = (len(tokens) - layout.condition_tokens) // layout.tokens_per_frame
        self._videos[new_req_data.req_id] = CanvasState(
            request, streams, tokens, Canvas(request, frame, self.device), slot=req_index
        )

    def hear(self, told: Mapping[str, Sequence[Decision]]) -> None:
        """What lives of videos whose policy reads tokens; all of them have been added."""
        for name, decisions in told.items():
            video = self._videos[name]
            assert video is not None, "only what a video keeps is told"
            for number, stream in enumerate(video.streams):
                stream.retention.tell([decision for decision in decisions if decision.stream == number])

    def hear_forks(self, told: Mapping[str, Forked]) -> None:
        """What videos of one request have in common; all of them have been added, and blocks copied."""
        for name, (tokens, replaced) in told.items():
            video = self._videos[name]
            assert video is not None, "only a video has forks"
            video.shared_tokens = tokens or video.shared_tokens
            for number, start, blocks in replaced:
                self._block_tables.block_tables[self._groups[number]].stage_write(video.slot, start, blocks)

    def remove_request(self, req_id: str) -> None:
        """It ended, or was preempted."""
        super().remove_request(req_id)
        self._videos.pop(req_id, None)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: Tensor,
    ) -> None:
        """Put together what a step computes; cached keys move where a window slides."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)
        rows: list[list[Rows]] = [[], []]
        canvases: dict[int, Canvas] = {}
        # By group, which of its rows tokens are chosen by, and how many rows it has so far.
        chosen: list[tuple[int, Tensor]] = []
        counts = [0, 0]
        for index, name in enumerate(input_batch.req_ids):
            video = self._videos[name]
            blocks = [table[index] for table in block_tables]
            first, start = (
                int(own[index]) for own in (input_batch.query_start_loc_np, input_batch.num_computed_tokens_np)
            )
            count = int(input_batch.num_scheduled_tokens[index])
            if video is None:
                ids = input_batch.input_ids[first : first + count]
                computed = iter([(self._groups[0], self._unplanned(ids, start, blocks[self._groups[0]]))])
            elif input_batch.num_draft_tokens_per_req[index] > 0:
                canvas = canvases[index] = video.canvas
                asked = [None, None] if canvas.commits else canvas.ask()
                chosen += [
                    (group, counts[group] + own.chosen)
                    for group, own in zip(self._groups, asked, strict=True)
                    if own is not None
                ]
                computed = self._canvas_rows(video, count, blocks, asked)
            elif start < video.shared_tokens:
                computed = self._no_rows(video)
            elif start < video.request.text_tokens:
                computed = self._text_rows(video, start, start + count, blocks)
            else:
                computed = self._given_rows(video, start, start + count, blocks)
            for group, own in computed:
                rows[group].append(own)
                counts[group] += len(own.ids)
        # The unconditional streams' rows come behind all others.
        places = [own + (counts[self._groups[0]] if group == self._groups[1] else 0) for group, own in chosen]
        self._batch = Batch(input_batch, rows, canvases, torch.cat(places) if places else self._nothing)

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """The step has run: frames are encoded that it made older ones.

        Before the next step, in which blocks that encoding frees may be another request's.
        """
        super().postprocess_state(*args, **kwargs)
        self._encode_what_left()

    def prepare_inputs_embeds(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """What the model computes: the conditional streams' rows, then the unconditional ones'."""
        del req_states
        batch = self._own(input_batch)
        if batch is None:
            return self.prepare_dummy_inputs(input_batch.num_reqs, input_batch.num_tokens_after_padding)
        # The runner hands the hidden states of these rows to the sampler.
        input_batch.logits_indices = batch.chosen
        both = [own for group in self._groups for own in batch.rows[group]]
        return {
            "input_ids": torch.cat([rows.ids for rows in both]),
            "positions": torch.cat([rows.positions for rows in both], dim=1),
            "conditional_rows": sum(len(rows.ids) for rows in batch.rows[self._groups[0]]),
        }

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """As many rows as a step has when all its requests are guided."""
        del num_reqs
        if self._history is not None:
            # While memory is profiled, so that it is counted.
            self._history.reserve(self._history.usual_bytes, self.device)
        return {
            "input_ids": torch.zeros(2 * num_tokens, dtype=torch.int64, device=self.device),
            "positions": torch.zeros(_AXES, 2 * num_tokens, dtype=torch.int64, device=self.device),
            "conditional_rows": num_tokens,
        }

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention metadata of both streams, each of its own rows."""
        del cudagraph_mode, for_capture, ubatch_idx
        batch = self._own(input_batch)
        if batch is None:
            return build_attn_metadata(
                attn_groups=attn_groups,
                num_reqs=input_batch.num_reqs,
                num_tokens=input_batch.num_tokens,
                query_start_loc_gpu=input_batch.query_start_loc[: input_batch.num_reqs + 1],
                query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np[: input_batch.num_reqs + 1]),
                max_query_len=int(input_batch.num_scheduled_tokens.max()),
                seq_lens=input_batch.seq_lens,
                max_seq_len=self.max_model_len,
                block_tables=block_tables,
                slot_mappings=slot_mappings,
                kv_cache_config=kv_cache_config,
                causal=False,
            )
        metadata: dict[str, Any] = {}
        for group, rows in enumerate(batch.rows):
            for layer in self._layers[group]:
                layer.reads = None
            if not rows:
                continue
            slots = torch.cat([own.slots for own in rows])
            # The layers write their keys where the runner's mapping says, which counts the tokens of one stream.
            slot_mappings[group].fill_(NO_SLOT)
            slot_mappings[group, : len(slots)] = slots
            attend = partial(self._attention, group=group, attn_groups=attn_groups, kv_cache_config=kv_cache_config)
            if all(own.past is None for own in rows):
                metadata |= attend(rows, slot_mappings=slot_mappings[:, : len(slots)])
                continue
            reads = []
            first = 0
            for together in _read_together(rows):
                some = slice(first, first + sum(len(own.ids) for own in together))
                reads.append(Read(some, attend(together, slot_mappings=slot_mappings[:, some]), together[0].past))
                first = some.stop
            for layer in self._layers[group]:
                layer.reads = reads
                layer.history = self._history
            metadata |= reads[0].metadata
        return metadata

    def _attention(
        self,
        rows: Sequence[Rows],
        group: int,
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, Any]:
        """Metadata of the layers of one KV cache group."""
        lengths = np.concatenate([own.seq_lens for own in rows]).astype(np.int32)
        queries = np.concatenate([np.full(len(own.seq_lens), own.queries) for own in rows])
        starts = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(queries, out=starts[1:])
        tables = [own.blocks if own.past is None else self._scratch_table(own.past) for own in rows]
        table = torch.zeros(len(lengths), max(map(len, tables)), dtype=torch.int32, device=self.device)
        first = 0
        for own, blocks in zip(rows, tables, strict=True):
            table[first : first + len(own.seq_lens), : len(blocks)] = blocks
            first += len(own.seq_lens)
        return build_attn_metadata(
            attn_groups=[own if index == group else [] for index, own in enumerate(attn_groups)],
            num_reqs=len(lengths),
            num_tokens=slot_mappings.shape[1],
            query_start_loc_gpu=async_tensor_h2d(starts, device=self.device),
            query_start_loc_cpu=torch.from_numpy(starts),
            max_query_len=int(queries.max()),
            seq_lens=async_tensor_h2d(lengths, device=self.device),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            max_seq_len=int(lengths.max()),
            block_tables=[table] * len(attn_groups),
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            causal=False,
        )

    def _scratch_table(self, past: Past) -> Tensor:
        return torch.arange(past.blocks, dtype=torch.int32, device=self.device)

    def _encode_what_left(self) -> None:
        """Encode the frames behind which this step has committed another one."""
        left, self._left = self._left, []
        for group, frame in left:
            assert self._history is not None, "nothing leaves where nothing is encoded"
            self._history.encode(self._layers[group], frame)

    def _canvases_of(self, input_batch: InputBatch) -> dict[int, Canvas] | None:
        """The canvases of a step; None: it is one that vLLM profiles memory with."""
        batch = self._own(input_batch)
        return None if batch is None else batch.canvases

    def _own(self, input_batch: InputBatch) -> Batch | None:
        """The step, if it is the one that was put together last; None: vLLM runs no requests, but profiles memory."""
        return self._batch if self._batch is not None and self._batch.vllm is input_batch else None

    def _unplanned(self, ids: Tensor, start: int, blocks: Tensor) -> Rows:
        """A request of vLLM's own."""
        stop = start + len(ids)
        tokens = torch.arange(start, stop, device=self.device)
        live = blocks[: -(-stop // self._block_size)]
        return Rows(
            ids.long(),
            tokens.expand(_AXES, -1),
            self._slots(tokens, blocks),
            live,
            np.array([stop]),
            len(ids),
        )

    def _no_rows(self, video: CanvasState) -> Iterator[tuple[int, Rows]]:
        """Nothing is computed: a row that reads and writes the null block, because a step without rows is none."""
        nothing = torch.zeros(1, dtype=torch.int64, device=self.device)
        for stream in video.streams:
            yield stream.group, Rows(nothing, nothing.expand(_AXES, -1), nothing, nothing.int(), np.array([1]), 1)

    def _text_rows(
        self, video: CanvasState, start: int, stop: int, blocks: Sequence[Tensor]
    ) -> Iterator[tuple[int, Rows]]:
        """Tokens ``[start, stop)`` of a request, all of them text: a row each."""
        for stream in video.streams:
            own = np.arange(max(start - stream.start, 0), stop - stream.start)
            if not len(own):
                continue
            table = blocks[stream.group]
            self._clean(stream, int(own[0]), int(own[-1]) + 1, table)
            tokens = async_tensor_h2d(own, device=self.device)
            ids = async_tensor_h2d(video.tokens[stream.start + own[0] : stop], device=self.device)
            at = async_tensor_h2d(stream.plan.positions.of(own, 0), device=self.device)
            live = table[: -(-(own[-1] + 1) // self._block_size)]
            yield stream.group, Rows(ids, at, self._slots(tokens, table), live, own + 1, 1)

    def _given_rows(
        self, video: CanvasState, start: int, stop: int, blocks: Sequence[Tensor]
    ) -> Iterator[tuple[int, Rows]]:
        """A picture that is there already: given with the prompt, or made before a preemption."""
        layout = video.request.conditional.layout
        frame = layout.frame_of(start)
        if stop - start != layout.tokens_per_frame or (start - video.request.text_tokens) % layout.tokens_per_frame:
            raise RuntimeError(f"tokens {start} to {stop} of a request are no picture: the scheduler cut one")
        ids = async_tensor_h2d(video.tokens[start:stop], device=self.device)
        made = frame >= video.request.first_frame
        for index, stream in enumerate(video.streams):
            picture = self._picture(stream, start - stream.start, frame, blocks[stream.group])
            shown = committed(ids, video.request, conditional=index == 0) if made else ids
            self._leave(stream, picture)
            yield stream.group, Rows.of(picture, shown)

    def _canvas_rows(
        self, video: CanvasState, count: int, blocks: Sequence[Tensor], asked: Sequence[Asked | None]
    ) -> Iterator[tuple[int, Rows]]:
        """A pass of the frame that is being made.

        Args:
            video: whose.
            count: tokens that vLLM has scheduled of it: a frame, however many of them are computed.
            blocks: int32, its block table in each group.
            asked: what is computed in each stream; the commit asks nothing, and computes all.
        """
        canvas, layout = video.canvas, video.request.conditional.layout
        if count != layout.tokens_per_frame:
            raise RuntimeError(f"{count} tokens of a frame of {layout.tokens_per_frame}: the scheduler cut it")
        if video.entered != canvas.frame:
            start = layout.frame_start(canvas.frame)
            video.pictures = [
                self._picture(stream, start - stream.start, canvas.frame, blocks[stream.group])
                for stream in video.streams
            ]
            video.entered = canvas.frame
        for index, (stream, picture) in enumerate(zip(video.streams, video.pictures, strict=True)):
            if canvas.commits:
                ids = committed(canvas.ids, video.request, conditional=index == 0)
                self._leave(stream, picture)
                yield stream.group, Rows.of(picture, ids)
            elif (own := asked[index]) is not None:
                yield stream.group, Rows.of(picture, canvas.ids, own)

    def _leave(self, stream: StreamState, picture: Picture) -> None:
        """Note what is to be encoded when this step has committed ``picture``."""
        if picture.leaving is not None:
            self._left.append((stream.group, picture.leaving))

    def _picture(self, stream: StreamState, start: int, frame: int, blocks: Tensor) -> Picture:
        """Enter a picture: the window slides if it does, and what is read of the past is put together.

        Args:
            stream: whose.
            start: its first token in the stream.
            frame: its number, or `CONDITION` of a conditioning image.
            blocks: int32, the request's block table in the stream's group.
        """
        positions, layout = stream.plan.positions, stream.plan.layout
        stop = start + layout.tokens_per_frame
        self._clean(stream, start, stop, blocks)
        past, first = np.empty(0, dtype=np.int64), 0
        if frame != CONDITION:
            past, first = stream.retention.plain(frame), stream.retention.blocks.tail_start(frame)
            if positions.slides(start):
                self._rotations[stream.group].slide(stream.retention, positions, start, blocks)
        logical = np.concatenate([past, np.arange(first, -(-stop // self._block_size))])
        tokens = np.arange(start, stop)
        read = blocks[async_tensor_h2d(logical, device=self.device)]
        encoded = [
            Encoded(self._of(blocks, unit.held), len(unit.blocks), self._turn(stream, frame, unit.blocks))
            for unit in stream.retention.units(frame)
        ]
        leaving, unit = None, stream.retention.leaving(frame)
        if unit is not None:
            turn = self._turn(stream, frame, unit.blocks)
            leaving = Leaving(self._of(blocks, unit.blocks), len(unit.held), turn)
        live = len(past) + sum(unit.blocks for unit in encoded)
        return Picture(
            read,
            live * self._block_size + stop - first * self._block_size,
            async_tensor_h2d(positions.of(tokens, positions.window_start(frame)), device=self.device),
            self._slots(async_tensor_h2d(tokens, device=self.device), blocks),
            Past(read[: len(past)].long(), encoded, read[len(past) :].long()) if encoded else None,
            leaving,
        )

    def _clean(self, stream: StreamState, start: int, stop: int, blocks: Tensor) -> None:
        """Where a run of tokens ends within a block that it begins, clear the block: kernels read it to its end.

        What they read behind the last token counts nothing, but has to be a number. Blocks in which frames were encoded
        hold any bytes.
        """
        last = stop // self._block_size
        if self._history is not None and stop % self._block_size and last * self._block_size >= start:
            self._history.clear(self._layers[stream.group], blocks[last].long())

    def _of(self, blocks: Tensor, logical: range) -> Tensor:
        """Ids of a run of logical blocks, int64."""
        return blocks[logical.start : logical.stop].long()

    def _turn(self, stream: StreamState, frame: int, logical: range) -> Turn:
        """Of the positions that the tokens of some blocks have while ``frame`` is made."""
        positions = stream.plan.positions
        tokens = np.arange(logical.start * self._block_size, logical.stop * self._block_size)
        at = positions.of(tokens, positions.window_start(frame))
        return self.model.turn(async_tensor_h2d(at, device=self.device))

    def _slots(self, tokens: Tensor, blocks: Tensor) -> Tensor:
        return blocks[tokens // self._block_size].long() * self._block_size + tokens % self._block_size

    @cached_property
    def _rotations(self) -> list[KeyRotation]:
        """Of the layers of each KV cache group."""
        frequencies, axis_of = self.model.rotary
        pairs = np.arange(len(frequencies))
        rotary = Rotary(frequencies, axis_of, pairs, pairs + len(pairs))
        return [KeyRotation.of(rotary, map(cached_keys, layers)) for layers in self._layers]


def _read_together(rows: Sequence[Rows]) -> Iterator[list[Rows]]:
    """``rows`` in runs of one attention call each: a scratch has what one picture reads."""
    for encoded, own in groupby(rows, lambda own: own.past is not None):
        if encoded:
            yield from ([alone] for alone in own)
        else:
            yield list(own)


def committed(ids: Tensor, request: CanvasRequest, *, conditional: bool) -> Tensor:
    """The ids that a stream commits of a frame that was made, [F]; see `vllm_packcache.families.lumos.committed`."""
    options = request.options
    ids = ids.clone()
    if not conditional and not options.share_history:
        ids[_on_device(request.grid, None, ids.device)] = lumos.MASK
    ids[_on_device(request.grid, options.remask, ids.device)] = lumos.MASK
    return ids


@lru_cache(maxsize=64)
def _on_device(grid: lumos.Grid, remask: float | None, device: torch.device) -> Tensor:
    """Offsets in a frame that are committed as mask tokens; without a share, those of visual tokens."""
    if remask is None:
        return torch.from_numpy(lumos.visual_offsets(grid).copy()).to(device)
    tokens = lumos.frame_layout(grid).tokens_per_frame
    return torch.from_numpy(lumos.committed_offsets(tokens, remask).copy()).to(device)
