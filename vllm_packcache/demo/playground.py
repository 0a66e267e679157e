"""A server for videos over HTTP, with a page to ask for them and to see them being made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.server import CONFIG_FLAG, POLICY_FLAG
from vllm_packcache.config.videos import STORE_FLAG, TOKENIZER_FLAG
from vllm_packcache.core.policies import PackCache
from vllm_packcache.demo.masked.bundle import write_checkpoint
from vllm_packcache.demo.run import BLOCK_SIZE
from vllm_packcache.demo.served import serve_page
from vllm_packcache.demo.tokenizer import MODEL_DIR

SERVED = (
    *("--dtype", "float32", "--max-model-len", "32768", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", "8"),
    # A worker process that spins beside the engine would take the engine's time on a small machine.
    *("--distributed-executor-backend", "uni"),
)
"""Flags of a bundled model's server."""


class Bundled(NamedTuple):
    """A bundled model.

    Args:
        flags: of its server, besides `SERVED`.
        masked: whether its frames are made in passes.
    """

    flags: tuple[str, ...]
    masked: bool


BUNDLED = {
    "demo": Bundled(("--enforce-eager", "--skip-tokenizer-init"), False),
    "demo_masked": Bundled(("--skip-tokenizer-init",), True),
}
"""Bundled models; preset and tokenizer are called the same."""


def run_playground(
    model: str,
    config: str | None,
    tokenizer: str | None,
    store: Path,
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    key: str | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Serve videos over HTTP and the page, until Ctrl-C or SIGTERM.

    Args:
        model: one of `BUNDLED`, or the folder of a checkpoint.
        config: of packcache: a preset, a file or JSON text; None: the preset of the bundled model.
        tokenizer: for `TOKENIZER_FLAG`; None: of the bundled model, and none of any other.
        store: folder that videos are kept in; it is created.
        out: folder for the server's log; it is created.
        host: address that it listens on.
        port: that it listens on; None: any that is free.
        key: that the page asks for; None: none.
        flags: of vLLM, besides.

    Raises:
        ConfigError: the model or the configuration is wrong.
        OSError: a folder cannot be written.
        ServerError: the server did not come up, or died.
    """
    bundled = BUNDLED.get(model)
    if bundled is None and config is None:
        raise ConfigError(
            f"MODEL must be {' or '.join(BUNDLED)}, or a folder with a --config of its own, not {shown(model)} alone"
        )
    named = tokenizer if tokenizer is not None or bundled is None else model
    arguments = [
        *(POLICY_FLAG, PackCache.name, CONFIG_FLAG, config or model, STORE_FLAG, str(store)),
        *(() if named is None else (TOKENIZER_FLAG, named)),
        *(() if bundled is None else (*SERVED, "--served-model-name", model, *bundled.flags)),
        *flags,
    ]
    with TemporaryDirectory() as folder:
        path, interpreted = Path(model), False
        if bundled is not None:
            path, interpreted = MODEL_DIR, bundled.masked and not _on_gpu()
            if bundled.masked:
                path = write_checkpoint(folder)
        serve_page(
            path, arguments, out, "/playground", "make videos", host=host, port=port, key=key, interpreted=interpreted
        )


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
