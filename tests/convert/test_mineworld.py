"""MineWorld's checkpoints: what is written is the model that was saved; what is none is refused, and not run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from vllm_packcache.cli import app

SHAPES = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 320, "num_hidden_layers": 2}
# As the configurations of the public code have it.
PUBLISHED = {
    "num_key_value_heads": 4,
    "vocab_size": 8262,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 16 * 347,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES, **PUBLISHED, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            # Norms as they begin would hide one that is in another's place.
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else weight)
    return made


@pytest.fixture(scope="module")
def state_dict(model: LlamaForCausalLM) -> dict[str, Any]:
    return {
        **{f"transformer.{name}": weight for name, weight in model.state_dict().items()},
        "tokenizer.encoder.conv_in.weight": torch.zeros(3),
    }


@pytest.fixture(scope="module")
def checkpoint(state_dict: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny_16f.ckpt"
    torch.save({"epoch": 3, "global_step": 70, "pytorch-lightning_version": "2.4", "state_dict": state_dict}, path)
    return path


def converted(checkpoint: Path, out: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["convert", "mineworld", str(checkpoint), str(out), "--frames", "16", *options])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refusal(checkpoint: Path, out: Path, *options: str) -> str:
    given = ["convert", "mineworld", str(checkpoint), str(out), *(options or ("--frames", "16"))]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("vllm-packcache: ")
    assert len(line) < 400
    return line


def test_the_folder_is_the_model_that_was_saved(model: LlamaForCausalLM, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "it's here"
    said = converted(checkpoint, out, "--dtype", "float32")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    read = LlamaForCausalLM.from_pretrained(out).eval()
    assert read.dtype == torch.float32
    ids = torch.randint(0, 8262, (1, 700), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    assert "2 layers of 512, 8 heads, 4 of keys and values, 5,552 positions" in " ".join(said.split())
    command = said.splitlines()[-1]
    assert command.startswith(f"vllm serve '{tmp_path}/new/it'\"'\"'s here' --kv-cache-policy packcache ")
    assert command.endswith(" --kv-cache-policy-config mineworld_16f --max-model-len 347000 --skip-tokenizer-init")


def test_its_configuration_is_the_published_one(checkpoint: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["convert", "mineworld", str(checkpoint), str(tmp_path), "--frames", "32"])
    assert said.exit_code == 0
    assert "--kv-cache-policy-config mineworld_32f " in said.stdout
    config = AutoConfig.from_pretrained(tmp_path)
    for name, value in {**SHAPES, **PUBLISHED, "max_position_embeddings": 32 * 347, "head_dim": 64}.items():
        assert getattr(config, name) == value, name
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.hidden_act == "silu"
    # Every id is a visual one or an action: none ends anything.
    for owner in (config, GenerationConfig.from_pretrained(tmp_path)):
        assert (owner.bos_token_id, owner.eos_token_id, owner.pad_token_id) == (None, None, None)
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert set(generation.values()) == {None}
    read = LlamaForCausalLM.from_pretrained(tmp_path)
    assert {weight.dtype for weight in read.parameters()} == {torch.bfloat16}


def test_weights_in_half_precision_and_files_of_older_versions_are_read(
    state_dict: dict[str, Any], tmp_path: Path
) -> None:
    half = {name: weight.half() for name, weight in state_dict.items()}
    torch.save({"state_dict": half}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    converted(tmp_path / "old.ckpt", tmp_path / "out", "--dtype", "float16")
    read = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, half[f"transformer.{name}"])


class Code:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(form: str, state_dict: dict[str, Any], tmp_path: Path) -> None:
    ran, path, out = tmp_path / "ran", tmp_path / "x.ckpt", tmp_path / "out"
    content = {"state_dict": state_dict, "callbacks": Code(ran)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "callbacks": Code(ran)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path, out)
    assert not ran.exists()
    assert not out.exists()
    if form == "pickle":
        assert "CHECKPOINT" in message
    else:
        assert "must hold tensors and plain data alone, and holds " in message
        assert "mkdir', which would run code: where you trust it, load it with weights_only=False" in message
    # The file is one that would have run it.
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert ran.exists()


BIAS = "transformer.model.layers.0.self_attn.q_proj.bias"
VALUES = "transformer.model.layers.1.self_attn.v_proj.weight"
KEYS = "transformer.model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({VALUES: None}, "must have all tensors of its layers, and lacks 'model.layers.1.self_attn.v_proj.weight'"),
        ({VALUES: None, "transformer.lm_head.weight": None}, "v_proj.weight' and 1 more"),
        ({BIAS: torch.zeros(512)}, "the tensors of a Llama without biases, not 'model.layers.0.self_attn.q_proj.bias'"),
        ({"vae.weight": torch.zeros(2)}, "names that begin with transformer. or tokenizer., not 'vae.weight'"),
        ({VALUES: torch.zeros(64, 512)}, f"{VALUES} of shape [256, 512], as the other tensors say, not [64, 512]"),
        (
            {KEYS: torch.zeros(60, 512)},
            "heads of 64 numbers, as many of queries for each of keys, not 512 numbers of a ",
        ),
        ({KEYS: torch.zeros(192, 512)}, "512 numbers of a token and 192 of its keys"),
        ({KEYS: None}, f"the checkpoint must have {KEYS}, a matrix"),
        ({"transformer.model.embed_tokens.weight": torch.zeros(4)}, "embed_tokens.weight, a matrix: is it one of the"),
        (
            {"transformer.lm_head.weight": torch.full((8262, 512), 1e5)},
            "lm_head.weight must be of finite numbers, and ",
        ),
        ({"x": 3}, "must have names and tensors in its state_dict, not 'x'"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    changes: dict[str, Any], words: str, state_dict: dict[str, Any], tmp_path: Path
) -> None:
    changed = {name: weight for name, weight in {**state_dict, **changes}.items() if weight is not None}
    torch.save({"state_dict": changed}, tmp_path / "x.ckpt")
    assert words in refusal(tmp_path / "x.ckpt", tmp_path / "out", "--frames", "16", "--dtype", "float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 no archive", pickle.dumps([1])])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "must be a file of torch.save, and cannot be read as one" in refusal(tmp_path / "x.ckpt", tmp_path / "out")


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"state_dict": [1]}, {"state_dict": {}}])
def test_a_file_without_the_models_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    message = refusal(tmp_path / "x.ckpt", tmp_path / "out")
    assert "must have a state_dict" in message or "must have transformer.model.embed_tokens.weight" in message


def test_options_that_cannot_be_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = refusal(checkpoint, out, "--frames", "8")
    assert "--frames must be 16 or 32, as the checkpoint's name says, not 8" in message
    message = refusal(checkpoint, out, "--frames", "16", "--dtype", "int8")
    assert "--dtype must be one of bfloat16, float16, float32, not 'int8'" in message
    assert "No such file" in refusal(tmp_path / "none.ckpt", out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "OUT must be a new or an empty folder, not " in refusal(checkpoint, out)
    assert "OUT must be a new or an empty folder, not " in refusal(checkpoint, out / "notes.txt")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    result = CliRunner().invoke(app, ["convert", "mineworld", str(checkpoint), str(out)])
    assert result.exit_code == 2
    assert "--frames" in result.stderr
