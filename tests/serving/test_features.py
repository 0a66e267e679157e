"""What else vLLM offers, beside a policy: each with a video of which frames are dropped, against the reference."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.margins import CarefulReference, steady
from tests.serving import test_frame_ids as frame_ids
from tests.serving.conftest import PAPERS, prompt, run, sampling
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.reference.decoder import read_weights
from vllm_packcache.reference.models import make_random_llama

CONDITION, FRAME = 70, 40
VIDEO = {"tokens_per_frame": FRAME, "condition_tokens": CONDITION}
GIVEN = CONDITION + 8 * FRAME + 5


def plan_of(condition: int, **options: Any) -> Any:
    return ServerConfig.parse("packcache", PAPERS).plan({f"packcache_{k}": v for k, v in options.items()}, condition)


PLAN = plan_of(GIVEN, **VIDEO)


# --------------------------------------------------------------------------- log probabilities of a prompt


def test_logprobs_of_given_frames(engine: Any, reference: Any) -> None:
    llm = engine("packcache", PAPERS, max_num_batched_tokens=61, max_num_seqs=4)
    ids = prompt(GIVEN, seed=1)
    params = sampling(2, **VIDEO)
    params.prompt_logprobs = 0
    (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    first, *others = output.prompt_logprobs
    assert first is None
    given = torch.tensor([entry[token].logprob for entry, token in zip(others, ids[1:], strict=True)])
    policy, stock = (
        reference.logits(ids[:-1], plan).log_softmax(-1)[torch.arange(GIVEN - 1), ids[1:]] for plan in (PLAN, None)
    )
    torch.testing.assert_close(given, policy, atol=1e-3, rtol=1e-3)
    assert (given - stock).abs().max() > 0.1


# --------------------------------------------------------------------------- prompts as embeddings


def test_a_video_whose_prompt_is_embeddings(engine: Any, reference: Any, checkpoint: Path) -> None:
    llm = engine("packcache", PAPERS, enable_prompt_embeds=True, max_num_batched_tokens=128)
    embeddings = read_weights(checkpoint)["model.embed_tokens.weight"]

    def made_of(ids: list[int], params: Any) -> list[int]:
        (output,) = llm.generate([{"prompt_embeds": embeddings[ids]}], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    ids = prompt(GIVEN, seed=2)
    made = made_of(ids, sampling(90, **VIDEO))
    reference.check(ids, made, 90, PLAN)
    assert reference.differs(ids, made)
    # Frames that are made have ids to compare, and the condition needs none.
    changed = {"selection": "changed", "tokens_per_frame": FRAME}
    ids, length = prompt(CONDITION, seed=3), 6 * FRAME + 5
    made = made_of(ids, sampling(length, **changed))
    reference.check(ids, made, length, plan_of(CONDITION, **changed))
    assert reference.differs(ids, made, plan_of(CONDITION, tokens_per_frame=FRAME))


# --------------------------------------------------------------------------- adapters

RANK = 4


def make_adapter(folder: Path, weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Write a LoRA adapter of the attention's matrices; the weights with it merged."""
    random = torch.Generator().manual_seed(seed)
    adapter, merged = {}, dict(weights)
    for name, weight in weights.items():
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            continue
        rows, columns = weight.shape
        down = torch.randn(RANK, columns, generator=random) * weight.std()
        up = torch.randn(rows, RANK, generator=random) * 0.3
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        merged[name] = weight + up @ down
    folder.mkdir(exist_ok=True)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter, folder / "adapter_model.safetensors")
    return merged


def test_videos_with_adapters(engine: Any, reference: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Two in a batch. Rows of the model itself beside them are wrong on a CPU without any policy, too."""
    llm = engine("packcache", PAPERS, enable_lora=True, max_lora_rank=8, max_loras=2, max_num_seqs=2)
    prompts = [prompt(GIVEN, seed=10 + number) for number in (1, 2)]
    folders = [tmp_path / str(number) for number in (1, 2)]
    merged = [make_adapter(folder, read_weights(checkpoint), seed) for seed, folder in enumerate(folders)]
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        sampling(60, **VIDEO),
        lora_request=[LoRARequest(str(folder), int(folder.name), str(folder)) for folder in folders],
        use_tqdm=False,
    )
    for ids, output, weights in zip(prompts, outputs, merged, strict=True):
        made = list(output.outputs[0].token_ids)
        own = CarefulReference(reference.config, weights)
        own.check(ids, made, 60, PLAN)
        assert own.differs(ids, made)
        assert reference.differs(ids, made, PLAN), "the adapter changed nothing"


# --------------------------------------------------------------------------- structured outputs

ALLOWED = 128
"""Tokens that the grammar allows: the first half of the vocabulary."""


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared checkpoint, and a tokenizer whose 256 tokens are two letters each."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = make_random_llama(tmp_path_factory.mktemp("llama"))
    letters = string.ascii_lowercase[:16]
    words = {first + second: 16 * i + j for i, first in enumerate(letters) for j, second in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="pp"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="pp", unk_token="pp").save_pretrained(folder)
    return folder


def test_grammars_of_preempted_videos(
    engine: Any, reference: Any, with_tokenizer: Path, preemptions: list[int]
) -> None:
    llm = engine(
        "packcache", PAPERS, num_gpu_blocks_override=40, max_model_len=1024, max_num_batched_tokens=256,
        model=with_tokenizer, skip_tokenizer_init=False,
    )  # fmt: skip
    prompts = [prompt(70 + i, seed=20 + i) for i in range(4)]
    params = []
    for i in range(4):
        own = sampling(360, tokens_per_frame=67 - 7 * i)
        own.structured_outputs = StructuredOutputsParams(regex="([a-h][a-p]){400}")
        params.append(own)
    outputs = run(llm, prompts, params)
    assert max(preemptions) > 10
    for ids, tokens, own in zip(prompts, outputs, params, strict=True):
        plan = ServerConfig.parse("packcache", PAPERS).plan(own.extra_args, len(ids))
        logits = reference.logits([*ids, *tokens[:-1]], plan)[len(ids) - 1 :]
        assert tokens == steady(lambda each: each[:, :ALLOWED].argmax(-1).tolist(), logits)
        assert tokens != logits.argmax(-1).tolist(), "the grammar changed nothing"


def test_a_grammar_beside_a_video_whose_frames_have_ids(engine: Any, reference: Any, with_tokenizer: Path) -> None:
    llm = engine(
        "packcache", frame_ids.CONFIG, max_num_batched_tokens=256, model=with_tokenizer, skip_tokenizer_init=False
    )
    ids, own = prompt(60, seed=31), sampling(50)
    own.structured_outputs = StructuredOutputsParams(regex="([a-h][a-p]){400}")
    video, params, allowed = frame_ids.video(30, 40, 2)
    tokens, made = run(llm, [ids, video], [own, params])
    logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
    assert tokens == steady(lambda each: each[:, :ALLOWED].argmax(-1).tolist(), logits)
    frame_ids.check(reference, frame_ids.CONFIG, video, params, allowed, made)
