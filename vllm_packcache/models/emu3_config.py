"""The configuration of Emu3's checkpoints, without torch: every process of a server reads it."""

from __future__ import annotations

from transformers import LlamaConfig


class Emu3Config(LlamaConfig):
    """``config.json`` as BAAI publishes it: a Llama's, under a name that transformers does not know.

    Ids that a checkpoint names besides stay attributes. What it leaves out has the default of the published class.
    """

    model_type = "Emu3"

    vocab_size: int = 184_622
    intermediate_size: int = 14_336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 9216
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 151_643
    bos_token_id: int | None = 151_849
    eos_token_id: int | list[int] | None = 151_850
    default_theta = 1_000_000.0
