"""Make a video with vLLM's `LLM`, without a server: ``python examples/offline.py``.

The model is the bundled one; put your model, its preset and its token ids in the places marked below.
"""

from __future__ import annotations

from pathlib import Path

import vllm_packcache

MODEL = Path(vllm_packcache.__file__).parent / "demo" / "model"  # yours
PRESET = "demo"  # a preset, a file, or the options as a dict
FRAMES = 6


def main() -> None:
    """Make a video and print the first token ids of its frames."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=8192,
        additional_config={"kv_cache_policy": "packcache", "kv_cache_policy_config": PRESET},
    )
    prompt = "a red circle moves right"  # or {"prompt_token_ids": [...]}: text, then the conditioning image
    # Any option that begins with packcache_ says that the request is a video. Frames are whole.
    sampling = SamplingParams(temperature=0, extra_args={"packcache_frames": FRAMES})
    (answer,) = llm.generate([prompt], sampling)
    tokens = answer.outputs[0].token_ids
    length = len(tokens) // FRAMES
    for frame in range(FRAMES):
        print(f"frame {frame}: {length} tokens, {list(tokens[frame * length :][:8])} ...")


if __name__ == "__main__":
    # vLLM starts its engine in a process of its own, which imports this file again.
    main()
