"""What all commands of the command line share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from vllm_packcache.config.errors import ConfigError


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turn an error that a person can act on into its sentence and exit status 2."""
    try:
        yield
    except (ConfigError, OSError) as error:
        typer.echo(f"vllm-packcache: {error}", err=True)
        raise typer.Exit(2) from None
