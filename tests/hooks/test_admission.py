"""What the tables of the longest sequence take, of vLLM's own and of ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.hooks import admission as tables
from vllm_packcache.hooks.admission import check_tables, set_aside

GIB = 2**30


def server(v2: bool = True, length: int = 100_000_000, backend: str | None = None, **changes: Any) -> Any:
    """As much of a `VllmConfig` as is read: 256 requests, blocks of 16 tokens."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=length, uses_mrope=changes.get("uses_mrope", False)),
        scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=2048),
        cache_config=SimpleNamespace(block_size=16, gpu_memory_utilization=0.9),
        attention_config=SimpleNamespace(backend=backend and AttentionBackendEnum[backend]),
        use_v2_model_runner=v2,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 100 GiB in a machine of 1,000."""
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda_alike=lambda: True, get_device_total_memory=lambda: 100 * GIB
    )
    monkeypatch.setattr(tables, "current_platform", platform)
    monkeypatch.setattr(tables.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000 * GIB // 4096}.get)


TABLE, TOKENS = 256 * 6_250_000 * 4, 256 * 100_000_000


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("config", "device", "host"),
    [
        (server(), 2 * TABLE, 4 * TOKENS),
        (server(backend="FLASH_ATTN"), 2 * TABLE, 4 * TOKENS),
        (server(backend="FLASHINFER"), 3 * TABLE, 4 * TOKENS),
        (server(backend="FLEX_ATTENTION"), 2 * TABLE + 2048 * 6_250_000 * 4, 4 * TOKENS),
        (server(uses_mrope=True), 2 * TABLE, 16 * TOKENS),
        # Its table is there when vLLM measures what is left.
        (server(v2=False), 0, TABLE + 5 * TOKENS),
    ],
    ids=["V2", "FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "axes", "V1"],
)
def test_bytes(config: Any, device: int, host: int) -> None:
    assert set_aside(config) == (device, host)


@pytest.mark.usefixtures("gpu")
def test_streams_have_a_table_each() -> None:
    assert set_aside(server(), groups=2) == (4 * TABLE, 4 * TOKENS)


def test_on_a_cpu_all_of_it_is_the_hosts() -> None:
    assert set_aside(server()) == (0, 2 * TABLE + 4 * TOKENS)
    assert set_aside(server(v2=False)) == (0, 2 * TABLE + 5 * TOKENS)


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tables.logger, "info", lambda text, *values: said.append(text % values))
    check_tables(server(length=100_000))
    assert said == []
    # 10 GiB are left beside the KV cache; the tables take half a GiB for each 4,000,000 tokens.
    check_tables(server(length=80_000_000))
    given = "--max-model-len 80000000 and --max-num-seqs 256"
    assert said == [
        f"{given}: vLLM sets aside 9.5 GiB of GPU memory for block tables",
        f"{given}: vLLM sets aside 76.3 GiB of memory for token ids and block tables",
    ]
    with pytest.raises(
        ConfigError,
        match=r"^--max-model-len 100000000 and --max-num-seqs 256 need 11\.9 GiB of GPU memory for block tables, "
        r"because vLLM sets it aside .* --gpu-memory-utilization 0\.9 leaves 10\.0 GiB: lower one of the three$",
    ):
        check_tables(server())
    with pytest.raises(ConfigError, match=r"need 1,251\.7 GiB of memory for .* this machine has 1,000\.0 GiB: lower"):
        check_tables(server(v2=False, length=1_000_000_000))
