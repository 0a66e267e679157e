"""A server for a world to play."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.core.policies import PackCache
from vllm_packcache.demo.play.world import MODEL_DIR
from vllm_packcache.demo.served import serve_page

PRESET = "play"
BUNDLED = (
    *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "8192"),
    *("--block-size", "32", "--max-num-seqs", "8"),
    # A worker process that spins beside the engine would take the engine's time on a small machine.
    *("--distributed-executor-backend", "uni"),
)
"""Flags of the bundled model's server."""


def run_play(
    model: Path | None,
    config: str | None,
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    key: str | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Serve a world to play, until Ctrl-C or SIGTERM.

    Args:
        model: folder of a checkpoint; None: the bundled one.
        config: of packcache, with ``sessions: pictures`` and ``play``; None: the bundled world's preset.
        out: folder for the server's log; it is created.
        host: address that it listens on.
        port: that it listens on; None: any that is free.
        key: that the page asks for; None: none.
        flags: of vLLM, besides.

    Raises:
        ConfigError: the configuration is wrong, or has nothing to play.
        OSError: the folder cannot be written.
        ServerError: the server did not come up, or died.
    """
    if model is not None and config is None:
        raise ConfigError("--config must be given with a checkpoint: a configuration with sessions: pictures and play")
    config = config or PRESET
    if ServerConfig.parse(PackCache.name, config).sessions.play is None:
        raise ConfigError(
            f"--config: {shown(config)} has nothing to play: give sessions: {{pictures: module:object, play: "
            "module:object} in it, as the preset play has"
        )
    arguments = [
        *("--kv-cache-policy", PackCache.name, "--kv-cache-policy-config", config),
        *(BUNDLED if model is None else ()),
        *flags,
    ]
    serve_page(model or MODEL_DIR, arguments, out, "/play", "play", host=host, port=port, key=key)
