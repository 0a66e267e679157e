"""The rotation kernel and its PyTorch twin agree (see `rotation_kernel_checks`), and it compiles for real GPUs."""

from __future__ import annotations

import re

import pytest
import torch

from tests import interpreted

CHECKS = "tests/worker/rotation_kernel_checks.py"


def test_under_tritons_interpreter() -> None:
    interpreted.check(CHECKS, interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    interpreted.check(CHECKS, interpreted=False)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("capability", [86, 90], ids=["A40", "H200"])
def test_keys_are_moved_16_bytes_at_a_time(capability: int, interleaved: bool) -> None:
    import triton.language as tl

    from vllm_packcache.worker.rotation_kernel import _rotate

    pointers = {"addresses": "*i64", "blocks": "*i32", "kinds": "*i64", "turns": "*fp32"}
    numbers = dict.fromkeys(("stride_block", "stride_head", "stride_token", "split"), "i32")
    constants = {
        "ELEMENT": tl.bfloat16, "BLOCK_SIZE": 16, "KINDS": 1, "PAIRS": 64, "INTERLEAVED": interleaved,
        "TOKENS_TILE": 16, "PAIRS_TILE": 64,
    }  # fmt: skip
    ptx = interpreted.compiled(_rotate, capability, pointers | numbers, constants)
    stores = re.findall(r"st\.global[.\w]*", ptx)
    assert stores
    assert all(".v4.b32" in store for store in stores), stores
