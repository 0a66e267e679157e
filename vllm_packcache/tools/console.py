"""What all commands of the command line share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from vllm_packcache.config.errors import ConfigError

FROM_EXTRAS = frozenset({"matplotlib", "psutil"})
"""Modules that no server needs: packages that extras of this one bring."""


@contextlib.contextmanager
def one_sentence(extra: str | None = None) -> Iterator[None]:
    """Turn an error that a person can act on into its sentence and exit status 2.

    Args:
        extra: of this package, which brings what the command imports; None: it needs none.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if extra is None or missing not in FROM_EXTRAS:
            raise
        typer.echo(
            f"vllm-packcache: {missing} is not installed, which this command needs: "
            f"pip install 'vllm-packcache[{extra}]'",
            err=True,
        )
        raise typer.Exit(2) from None
    except (ConfigError, OSError) as error:
        typer.echo(f"vllm-packcache: {error}", err=True)
        raise typer.Exit(2) from None
