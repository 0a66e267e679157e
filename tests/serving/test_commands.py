"""Commands of vLLM's other than ``serve`` that start engines: each takes the flags, and heeds them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.serving.conftest import prompt
from tests.serving.test_api_servers import BLOCK, CONFIG
from vllm_packcache.config.server import ServerConfig

FLAGS = (
    "--kv-cache-policy", "packcache", "--kv-cache-policy-config", json.dumps(CONFIG),
    "--num-gpu-blocks-override", "40", "--block-size", str(BLOCK), "--max-model-len", "4096",
    "--dtype", "float32", "--enforce-eager",
)  # fmt: skip


def vllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``vllm ARGUMENTS``, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=540,
        check=False,
    )


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared checkpoint with a tokenizer: its text is numbers, a token each, and a chat is what is said in it."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(checkpoint, folder)
    numbers = Tokenizer(WordLevel({str(number): number for number in range(256)}, unk_token="0"))
    numbers.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=numbers)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_run_batch(model: Path, tmp_path: Path, reference: Any) -> None:
    """A video's tokens are right, and a bad option is a 400 of its own line."""
    ids = prompt(70, seed=11)
    options = {
        "video": {"packcache_frames": 3},
        "nonsense": {"packcache_nonsense": 1},
        "too large": {"packcache_tokens_per_frame": 1400, "packcache_frames": 2},
        "again": {"packcache_frames": 3},
    }
    said = [{"role": "user", "content": " ".join(map(str, ids))}]
    body = {"model": "m", "messages": said, "temperature": 0, "ignore_eos": True}
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "return_token_ids": True, "vllm_xargs": xargs},
        }
        for name, xargs in options.items()
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))

    done = vllm(
        *("run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")),
        *("--model", str(model), "--served-model-name", "m", *FLAGS),
    )

    assert done.returncode == 0, done.stdout
    answers = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    plan = ServerConfig.parse("packcache", CONFIG).plan(options["video"], len(ids))
    expected = reference.generate(ids, 3 * 67, plan, BLOCK).token_ids
    for name in ("video", "again"):
        assert answers[name]["response"]["body"]["choices"][0]["token_ids"] == expected
    for name, sentence in (
        ("nonsense", "packcache_nonsense is no known option"),
        ("too large", "and the KV cache has 39: let the policy keep less"),
    ):
        assert answers[name]["response"]["status_code"] == 400
        assert sentence in json.dumps(answers[name]), answers[name]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_benchmarks(kind: str, model: Path) -> None:
    """They time random text, and say that a policy is on."""
    requests = {
        # Its ids are below 10,000, and the tokenizer knows fewer.
        "latency": (
            *("--skip-tokenizer-init", "--load-format", "dummy", "--hf-overrides", '{"vocab_size": 10000}'),
            *("--num-iters", "1", "--num-iters-warmup", "1", "--batch-size", "2"),
        ),
        "throughput": ("--num-prompts", "4", "--dataset-name", "random"),
    }[kind]
    done = vllm(*("bench", kind, "--model", str(model), "--input-len", "64", "--output-len", "8", *requests, *FLAGS))
    assert done.returncode == 0, done.stdout
    assert "is on: policy packcache {" in done.stdout
