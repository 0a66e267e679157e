"""Lumos-1 for vLLM: the architecture of Chameleon with MM-RoPE, and a key-value cache for each of two streams.

Guidance needs every frame computed twice, with the request's text and without. Both streams are rows of one batch, so
that they share every weight that is read; only attention tells them apart, and each layer has a cache for either.

`vllm_packcache.reference.lumos` is the same model computed plainly. Nothing here is compiled: rows are thousands, and
what is not a matrix product is small beside the products.

Source: Lumos-1, arXiv 2507.08801, and its public inference code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, make_layers, maybe_prefix

from vllm_packcache.core.positions import Float64, Int64, mm_rope_axes
from vllm_packcache.families.lumos import HEAD_NORM_EPS, VISUAL_BEGIN, LumosConfig
from vllm_packcache.worker.history.store import History, Read

UNUSED_WEIGHTS = ("model.vqmodel.", "rotary_emb.inv_freq")
"""In the names of what a checkpoint may carry beside the model: Chameleon's image tokenizer, tables of old exports."""


class StreamAttention(Attention):
    """vLLM's attention over the cache of one of the two streams."""

    stream: ClassVar[int]
    reads: Sequence[Read] | None = None
    """How the rows of a step read, one after the other; None: all of them read the cache as it is."""
    history: History | None = None
    """Of the frames that are encoded."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the rows read, [n, heads x D], once their keys and values are written."""
        if self.reads is None:
            return super().forward(query, key, value, *args, **kwargs)
        unified_kv_cache_update(key, value, self.layer_name)
        output = torch.empty_like(query)
        for rows, metadata, past in self.reads:
            cache = self.kv_cache
            if past is not None:
                assert self.history is not None, "what is encoded has been encoded by somebody"
                cache = self.history.gather(self, past)
            own = (query[rows], key[rows], value[rows], cache, metadata[self.layer_name])
            self.impl.forward(self, *own, output=output[rows])
        return output.flatten(1)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """The spec of this stream's cache: streams must not come to share a group of caches."""
        from vllm_packcache.engine.spec import stream_spec

        return stream_spec(super().get_kv_cache_spec(vllm_config), vllm_config, self.stream)


class ConditionalAttention(StreamAttention):
    """The stream that sees the request's text."""

    stream = 0


class UnconditionalAttention(StreamAttention):
    """The stream that does not."""

    stream = 1


class MMRotary(nn.Module):
    """The angles of MM-RoPE: channel j of a head turns with channel j + D/2, as in GPT-NeoX, by an angle of its own.

    The angle of pair j is ``position[axis_of[j]] * frequencies[j]`` with frequencies ``theta^(-2j/D)``, worked out in
    float32 as the published code does. Sources: RoFormer, arXiv 2104.09864; Lumos-1, arXiv 2507.08801.

    Args:
        head_dim: D.
        theta: base of the frequencies.

    Attributes:
        frequencies: [D/2], the float32 numbers that keys turn with.
        axis_of: [D/2], the axis of a position (t, h, w) that each pair turns with.
    """

    _table: Tensor
    _axes: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        # On the CPU whatever the model's device is: there a power of float32 is rounded as the reference rounds it.
        halves = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        table = (theta ** (-halves / head_dim)).numpy()
        self.frequencies: Float64 = table.astype(np.float64)
        self.axis_of: Int64 = mm_rope_axes(head_dim // 2)
        self.register_buffer("_table", torch.tensor(table), persistent=False)
        self.register_buffer("_axes", torch.tensor(self.axis_of), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `rotate`, float32 [n, 1, D/2], of the positions [3, n]."""
        angles = (positions.T.float()[:, self._axes] * self._table)[:, None]
        return angles.cos(), angles.sin()


def rotate(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn heads [n, heads, D] by the angles of `MMRotary`."""
    cos, sin = turn
    left, right = heads.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class _Heads(NamedTuple):
    """Of a checkpoint's ``total`` heads a rank has ``own`` from ``first`` on, and keeps them from row ``at`` on."""

    total: int
    first: int
    own: int
    at: int


class HeadNorm(nn.Module):
    """LayerNorm of every query and key head for itself, in float32.

    A checkpoint has one weight and one bias for each of the ranks it was trained on, [ranks, D], each for a run of
    heads. Here every head of this rank has its own. Source: Chameleon, arXiv 2405.09818.

    Args:
        qkv: the projection whose heads these are: it says which of them this rank has.
    """

    def __init__(self, qkv: QKVParallelLinear) -> None:
        super().__init__()
        heads, kv_heads = qkv.num_heads, qkv.num_kv_heads
        self._heads = {
            "q": _Heads(qkv.total_num_heads, qkv.tp_rank * heads, heads, 0),
            "k": _Heads(qkv.total_num_kv_heads, qkv.tp_rank // qkv.num_kv_head_replicas * kv_heads, kv_heads, heads),
        }
        shape = heads + kv_heads, qkv.head_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)

    def forward(self, heads: Tensor) -> Tensor:
        """Norm queries and keys, [n, heads, D] with all query heads first; the result is float32."""
        return layer_norm(heads.float(), heads.shape[-1:], eps=HEAD_NORM_EPS) * self.weight + self.bias

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Give every head what its run has; whether of queries or keys is noted on the tensor, as for vLLM's linears.

        Raises:
            ValueError: a tensor has another shape.
        """
        for name, tensor in weights:
            kind = getattr(tensor, "shard_id", "")
            total, first, own, at = self._heads[kind]
            head_dim = self.weight.shape[1]
            if tensor.dim() != 2 or tensor.shape[1] != head_dim or total % len(tensor):
                raise ValueError(
                    f"{kind}_norm.{name} has shape {tuple(tensor.shape)}: it must be [ranks, {head_dim}], "
                    f"and the ranks must divide the {total} heads"
                )
            rows = tensor.repeat_interleave(total // len(tensor), 0)[first : first + own]
            self.get_parameter(name).data[at : at + own] = rows
            yield name


class LumosAttention(nn.Module):
    """Attention of a layer: the projections are shared, the caches are not."""

    def __init__(self, config: LumosConfig, hidden_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            config.head_dim,
            config.heads,
            config.kv_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.o_proj = RowParallelLinear(
            config.heads * config.head_dim,
            hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.qk_norm = HeadNorm(self.qkv_proj)
        self._heads, self._kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        attention = {
            "num_heads": self._heads,
            "head_size": config.head_dim,
            "scale": config.head_dim**-0.5,
            "num_kv_heads": self._kv_heads,
            "cache_config": vllm_config.cache_config,
            "quant_config": quant,
        }
        self.attn = ConditionalAttention(**attention, prefix=f"{prefix}.attn")
        self.unconditional_attn = UnconditionalAttention(**attention, prefix=f"{prefix}.unconditional_attn")

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], conditional_rows: int) -> Tensor:
        """What the rows [n, hidden] read, each from its stream's cache."""
        heads, kv_heads = self._heads, self._kv_heads
        qkv = self.qkv_proj(hidden).unflatten(-1, (heads + 2 * kv_heads, -1))
        qk, values = qkv.split((heads + kv_heads, kv_heads), 1)
        queries, keys = rotate(self.qk_norm(qk), turn).to(hidden.dtype).split((heads, kv_heads), 1)
        streams = zip(
            (self.attn, self.unconditional_attn),
            *(rows.tensor_split([conditional_rows]) for rows in (queries, keys, values)),
            strict=True,
        )
        read = [attend(*rows) for attend, *rows in streams if len(rows[0])]
        return self.o_proj(read[0] if len(read) == 1 else torch.cat(read))


class LumosLayer(nn.Module):
    """A decoder layer. With ``swin_norm`` what attention and MLP give is normed, not what they get."""

    def __init__(self, config: LumosConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        sizes = vllm_config.model_config.hf_config
        self._swin_norm = config.swin_norm
        self.self_attn = LumosAttention(config, sizes.hidden_size, vllm_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            sizes.hidden_size, sizes.intermediate_size, "silu", vllm_config.quant_config, prefix=f"{prefix}.mlp"
        )
        self.input_layernorm = RMSNorm(sizes.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], conditional_rows: int) -> Tensor:
        """The residual stream [n, hidden] after this layer."""
        attention = partial(self.self_attn, turn=turn, conditional_rows=conditional_rows)
        for norm, part in ((self.input_layernorm, attention), (self.post_attention_layernorm, self.mlp)):
            hidden = hidden + (norm(part(hidden)) if self._swin_norm else part(norm(hidden)))
        return hidden


class LumosModel(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: LumosConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        sizes = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(sizes.vocab_size, sizes.hidden_size)
        self.rotary = MMRotary(config.head_dim, config.rope_theta)
        _, _, self.layers = make_layers(
            config.layers, lambda prefix: LumosLayer(config, vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(sizes.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, positions: Tensor, conditional_rows: int) -> Tensor:
        """Hidden states [n, hidden] after the last norm, of embeddings [n, hidden]."""
        turn = self.rotary(positions)
        for layer in self.layers:
            hidden = layer(hidden, turn, conditional_rows)
        return self.norm(hidden)


class LumosForConditionalGeneration(nn.Module, SupportsQuant):
    """Lumos-1, by the names under which checkpoints are published.

    Args:
        vllm_config: of the server; ``hf_config`` is the checkpoint's ``config.json``.
        prefix: of the modules' names.

    Raises:
        ValueError: the checkpoint is no Lumos-1.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".q_norm": (".qk_norm", "q"),
            ".k_norm": (".qk_norm", "k"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.config = hf_config
        self._lumos = LumosConfig.from_json(hf_config.to_dict())
        self.model = LumosModel(self._lumos, vllm_config, maybe_prefix(prefix, "model"))
        # Only the visual rows of the head: no other id is ever drawn, and so each of several ranks has its share of the
        # work (shards of the whole vocabulary would leave the first half of the ranks idle). Embedding and head are not
        # quantised: what guidance amplifies should not be rounded more than it is.
        self.lm_head = ParallelLMHead(self._lumos.visual_codes, hf_config.hidden_size)

    @staticmethod
    def get_model_state_cls() -> type:
        """The state that vLLM's V2 runner keeps for the requests of this model."""
        from vllm_packcache.worker.passes import CanvasModelState

        return CanvasModelState

    @property
    def rotary(self) -> tuple[Float64, Int64]:
        """How keys are rotated: ``frequencies`` and ``axis_of`` of `MMRotary`, whose docstring says what pairs are."""
        return self.model.rotary.frequencies, self.model.rotary.axis_of

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """By what keys at ``positions`` [3, n] are turned: cosines and sines for `rotate`."""
        return self.model.rotary(positions)

    rotate = staticmethod(rotate)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [n, hidden] of ids [n]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        *,
        conditional_rows: int | None = None,
    ) -> Tensor:
        """Compute tokens of both streams and write their keys and values to the streams' caches.

        Args:
            input_ids: [n].
            positions: int64 [3, n]: t, h, w.
            intermediate_tensors: of pipeline parallelism, which this model does not support.
            inputs_embeds: [n, hidden], instead of ``input_ids``.
            conditional_rows: so many rows from the first on are of the conditional stream, the others of the
                unconditional one; None: all are conditional.

        Returns:
            [n, hidden], after the last norm: for `visual_logits`.
        """
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(hidden, positions, len(hidden) if conditional_rows is None else conditional_rows)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Hands the hidden states through: the sampler asks for `visual_logits`, some rows at a time.

        All 129,536 columns for every row of a frame would be 2.1 GB for each stream.
        """
        return hidden_states

    def visual_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the visual ids in ascending order, float32 [n, V], the same on every rank.

        The product is not rounded to the model's type: guidance enlarges the difference of two of these many times.

        Args:
            hidden: [n, hidden] of `forward`.
        """
        weight = self.lm_head.weight
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        else:
            logits = linear(hidden.float(), weight.float())
        if self.lm_head.tp_size > 1:
            logits = tensor_model_parallel_all_gather(logits)
        return logits[:, : self._lumos.visual_codes]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their published names.

        Returns:
            Names of the parameters that were loaded.

        Raises:
            ValueError: a tensor is missing, or is not of this model.
        """
        expected = self._published_names()
        seen: set[str] = set()
        loaded = AutoWeightsLoader(self).load_weights(self._own(weights, expected, seen), mapper=self.hf_to_vllm_mapper)
        # Quantised layers have tensors of other names; of those vLLM's loader keeps account.
        if self.quant_config is None and (missing := sorted(expected - seen)):
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}: it is incomplete or no Lumos-1")
        return loaded

    def _own(
        self, weights: Iterable[tuple[str, Tensor]], expected: set[str], seen: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are loaded, by published names; notes in ``seen`` what there was."""
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        for name, tensor in weights:
            if any(part in name for part in UNUSED_WEIGHTS):
                continue
            # vLLM's loader would pass over a bias that no layer of the model has.
            if self.quant_config is None and name not in expected | {head}:
                raise ValueError(f"the checkpoint has a tensor {name}, which Lumos-1 does not: it is no Lumos-1")
            seen.add(name)
            if name == (embedding if self._lumos.tied else head):
                yield head, tensor[VISUAL_BEGIN:]
            if name != head:
                yield name, tensor

    def _published_names(self) -> set[str]:
        """What a checkpoint that is not quantised must have. A tied one may have the output layer too."""
        projections = [f"self_attn.{part}_proj" for part in "qkvo"] + [
            f"mlp.{part}_proj" for part in ("gate", "up", "down")
        ]
        norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
        parts = [f"{part}.weight" for part in projections + norms] + [f"self_attn.{part}_norm.bias" for part in "qk"]
        layers = {f"model.layers.{layer}.{part}" for layer in range(self._lumos.layers) for part in parts}
        whole = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if self._lumos.tied else {"lm_head.weight"})
        return layers | whole
