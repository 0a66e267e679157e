"""Where the plugin has been shown to work.

``python -m tests.support`` prints the table of `docs/operate.md`, and that of formats in `docs/configure.md`.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_packcache.config.formats import FORMATS, UNKNOWN, Format

INSTALLED = "0.32.0"
"""The version of vLLM that the tests run on."""

NEXT = "0.33.0"
"""The version whose source the tests read, and whose Python ``make test-next`` runs."""


class Support(NamedTuple):
    """A row.

    Args:
        vllm: version.
        runners: of vLLM's model runners.
        backends: attention backends.
        tested: how.
        shown_by: the tests that show it, ``file`` or ``file::test``, relative to this folder.
    """

    vllm: str
    runners: str
    backends: str
    tested: str
    shown_by: tuple[str, ...]


SUPPORT = (
    Support(
        INSTALLED,
        "V1",
        "CPU_ATTN",
        "on a CPU: tokens against a PyTorch reference, serving, soak",
        ("serving/test_tokens.py", "serving/test_positions.py", "serving/test_schedules.py", "serving/test_soak.py"),
    ),
    Support(
        INSTALLED,
        "V2",
        "CPU_ATTN",
        "on a CPU, Triton interpreted: the same tests of tokens, also from what full CUDA graphs capture",
        (
            "serving/test_tokens.py",
            "serving/test_positions.py",
            "serving/test_schedules.py",
            "serving/test_graphs.py::test_what_was_captured_serves_every_decode_step",
        ),
    ),
    Support(
        INSTALLED,
        "V2",
        "TRITON_ATTN, FLEX_ATTENTION",
        "the same with one video",
        ("serving/test_graphs.py::test_a_gpu_backend_equals_the_reference",),
    ),
    Support(
        INSTALLED,
        "V2",
        "TRITON_ATTN",
        "by hand on an H100, without vLLM's compiled part: tokens of two videos from full CUDA graphs; our kernels",
        (
            "serving/test_tokens.py::test_packcache_equals_reference",
            "worker/test_rotation_kernel.py",
            "worker/test_compaction_kernel.py",
        ),
    ),
    Support(
        INSTALLED,
        "V2",
        "FLASH_ATTN",
        "not run: what its metadata builder plans with is compacted; keys lie as Triton's, says its source",
        ("worker/test_runner_v2.py::test_backends_plan_with_live_lengths", "hooks/test_vllm_contract.py"),
    ),
    Support(
        INSTALLED,
        "V1, V2",
        "FLASHINFER",
        "not run: wrapped like the others; keys lie as Triton's, says its source",
        ("hooks/test_vllm_contract.py", "worker/test_key_layout_triton.py"),
    ),
    Support(
        INSTALLED,
        "V2",
        "CPU_ATTN, TRITON_ATTN",
        "masked models, Triton interpreted: tokens against the published loop as a PyTorch reference",
        ("serving/test_masked_tokens.py", "serving/test_masked_http.py"),
    ),
    Support(
        INSTALLED,
        "V1, V2",
        "CPU_ATTN",
        "keys of 8-bit floats, re-based: tokens against a loop that rounds as the cache does; V2 also masked models",
        ("serving/test_quantised.py", "serving/test_masked_tokens.py::test_floats_of_eight_bits"),
    ),
    Support(
        INSTALLED,
        "V2",
        "TRITON_ATTN",
        "keys of 8-bit integers, re-based: the same, Triton interpreted",
        ("serving/test_quantised.py", "serving/test_masked_tokens.py::test_integers_of_eight_bits"),
    ),
    Support(
        NEXT,
        "V1",
        "CPU_ATTN",
        f"its Python over the CPU kernels of {INSTALLED}: tokens and cached keys against a PyTorch reference",
        ("serving/test_tokens.py", "serving/test_positions.py"),
    ),
    Support(
        NEXT,
        "V2",
        "CPU_ATTN",
        "the same, Triton interpreted, also masked models and two ranks of one",
        ("serving/test_tokens.py", "serving/test_positions.py", "serving/test_masked_tokens.py"),
    ),
    Support(
        NEXT,
        "V2",
        "TRITON_ATTN",
        "the same with one video of a masked model",
        ("serving/test_masked_tokens.py::test_a_gpu_backend",),
    ),
    Support(
        NEXT,
        "V1, V2",
        "all others",
        "not run: everything that the plugin relies on is in its source",
        ("hooks/test_vllm_contract.py",),
    ),
)


FORMATS_SHOWN_BY = {
    ("auto", "CPU_ATTN"): ("serving/test_tokens.py", "serving/test_masked_tokens.py"),
    ("auto", "TRITON_ATTN"): (
        "serving/test_graphs.py::test_a_gpu_backend_equals_the_reference",
        "serving/test_masked_tokens.py::test_a_gpu_backend",
    ),
    ("auto", "FLEX_ATTENTION"): ("serving/test_graphs.py::test_a_gpu_backend_equals_the_reference",),
    ("fp8", "CPU_ATTN"): ("worker/test_key_layout.py::test_the_cpu_backend_in_eight_bits",),
    ("fp8_e4m3", "CPU_ATTN"): (
        "serving/test_quantised.py::test_floats_on_a_cpu",
        "serving/test_masked_tokens.py::test_floats_of_eight_bits",
    ),
    ("fp8_e5m2", "CPU_ATTN"): ("serving/test_quantised.py::test_floats_on_a_cpu",),
    ("int8_per_token_head", "TRITON_ATTN"): (
        "serving/test_quantised.py::test_integers_with_a_scale_for_every_token_and_head",
        "serving/test_masked_tokens.py::test_integers_of_eight_bits",
    ),
}
"""The tests that show what is marked as run in `vllm_packcache.config.formats`, by format and backend."""


def table() -> str:
    """`SUPPORT` as Markdown."""
    rows = [("vLLM", "runner", "attention backend", "tested"), ("---",) * 4, *(row[:4] for row in SUPPORT)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def formats() -> str:
    """`vllm_packcache.config.formats.FORMATS` as Markdown; those that differ in nothing have one row."""
    named: dict[tuple[str, ...], list[str]] = {}
    for own in FORMATS.values():
        named.setdefault(_row(own), []).append(f"`{own.name}`")
    head = ("`--kv-cache-dtype`", "bytes", "`rebase`", "masked models", "attention backends, and compute capabilities")
    rows = [head, ("---",) * 5, *((", ".join(names), *row) for row, names in named.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(own: Format) -> tuple[str, ...]:
    lost = "what a turn loses is not known" if own.loses == UNKNOWN else f"an error of {own.loses} after a turn"
    cards = [keeper.cards.removeprefix("GPUs of compute capability ") for keeper in own.keepers]
    backends = [
        f"{own.backend}{'' if own.shown else '*'}: {card}" for own, card in zip(own.keepers, cards, strict=True)
    ]
    return (
        str(own.pair_bytes(128, 2)),
        f"no: {lost}" if own.loses else "yes",
        "yes" if own.masked_keepers() else "no",
        "; ".join(backends),
    )


if __name__ == "__main__":
    print(table())
    print(formats(), end="")
