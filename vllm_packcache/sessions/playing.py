"""What the page at ``/play`` needs to know of a world: how games begin, and what keys do; an operator names it."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.families.actions import ActionCoding
from vllm_packcache.sessions.messages import Create

Line = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Control(_Part):
    """A button of the page.

    ``keys`` press it too, named as ``KeyboardEvent.code`` names them, such as ``ArrowRight`` or ``KeyD``. While it is
    down, ``action`` is part of what is done in each frame; with ``once`` in the next frame alone.
    """

    label: Line
    keys: tuple[Line, ...] = ()
    action: dict[str, Any]
    once: bool = False


class Opening(_Part):
    """A way that a game begins: ``session`` is the body of ``POST /v1/sessions``."""

    name: Line
    session: Create


class Play(_Part):
    """A world to play.

    ``idle`` is done in every frame, and controls that are down are added to it: of those that say different things,
    the newest. ``frames_per_second`` is how fast the page plays at most.
    """

    title: Line
    hint: Line | None = None
    openings: Annotated[tuple[Opening, ...], Field(min_length=1, max_length=100)]
    controls: Annotated[tuple[Control, ...], Field(max_length=40)] = ()
    idle: dict[str, Any] = {}
    frames_per_second: Annotated[float, Field(gt=0, le=240)] = 30.0


def play_of(name: str | None, coding: ActionCoding | None) -> Play | None:
    """What an operator has named: a `Play`, a mapping of its fields, or what returns one of them without arguments.

    Args:
        name: ``module:object``; None: there is none.
        coding: of the server's actions; None: it takes none.

    Raises:
        ConfigError: it cannot be imported, is no world to play, or has actions that the server does not take.
    """
    if name is None:
        return None
    try:
        found = resolve_name(name)
        if callable(found):
            found = found()
    except Exception as error:  # It is the operator's.
        raise ConfigError(
            f"sessions: play must be module:object of something that can be imported, and {shown(name)} cannot: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        ) from None
    try:
        play = Play.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(
            f"sessions: play must be a world to play, and {shown(name)} is none: {where}: {first['msg'].lower()}"
        ) from None
    _check(play, coding)
    return play


def _check(play: Play, coding: ActionCoding | None) -> None:
    """Check that the server takes what the page would send.

    Raises:
        ConfigError: it does not.
    """
    if coding is None:
        if play.controls or play.idle:
            raise ConfigError(
                "sessions: play has actions, and the layout none: give a layout with actions, or no controls"
            )
        return
    for label, action in (("idle", {}), *((control.label, control.action) for control in play.controls)):
        try:
            coding.ids({**play.idle, **action})
        except ValueError as error:
            raise ConfigError(f"sessions: play: the action of {shown(label)}: {error}") from None
