"""What the log of a vLLM server tells: its newest line, what it died of, and what became of a video."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_packcache.engine.record import read_line

MOST_CHARACTERS = 400
"""Of a cause, which is two sentences at most. The rest is in the log."""

_PREFIX = re.compile(
    r"^(?:\((?P<process>[^()]+) pid=\d+\) )?(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = "Traceback (most recent call last):"
_LINKS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_USAGE = re.compile(r"^(?:\S+(?: \S+)?: )?error: (?P<message>.+)")
"""How a command line is refused: by argparse with the command's name before it, by the plugin without."""
_EXCEPTION = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_DERIVED = re.compile(
    r"root cause|EngineDeadError|EngineCore encountered an issue|initialization failed|died unexpectedly|"
    r"died with exit code",
    re.IGNORECASE,
)
"""What a process says when it ends because another one has."""
_PLAIN = ("ConfigError", "Exception", "OSError", "RuntimeError", "ValidationError", "ValueError")
"""Exceptions whose message says it all."""
_ENDED = ("KeyboardInterrupt", "SystemExit", "CancelledError")
_KILLED = re.compile(
    r"engine core (?:process \S+ )?(?:exited|died) unexpectedly|Worker proc \S+ died unexpectedly|"
    r"died with exit code -9|Failed core proc\(s\): .*-9|EngineDeadError",
    re.IGNORECASE,
)
"""What is said of a process that has said nothing itself."""


class _Line(NamedTuple):
    level: str
    text: str


def read(log: Path) -> str:
    """What a log file holds."""
    return log.read_text(encoding="utf-8", errors="replace")


def last_line(text: str) -> str:
    """The last line of a log that is not blank."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def record_of(log: Path, request_id: str) -> dict[str, Any]:
    """What the engine has recorded of a video that has ended; see `vllm_packcache.engine.record`.

    Args:
        log: of the server, which logs INFO.
        request_id: as an answer has it.

    Raises:
        OSError: there is no such record.
    """
    for line in read(log).splitlines():
        if (found := read_line(line, request_id)) is not None:
            return found
    raise OSError(f"{log} has no record of the video {request_id}")


def cause(text: str) -> str | None:
    """What a server died of, in the words of the process that failed first; None: the log does not say.

    The processes of a server fail one after another, and all but the first only say so. An exception that was raised
    while another one was handled is the one that was written for people.

    Args:
        text: of the server's log.
    """
    lines = [_stripped(line) for line in text.splitlines()]
    refused = (found["message"] for line in lines if (found := _USAGE.match(line.text)))
    why = next(_failures(lines), None) or next(refused, None)
    if why is None and any(_KILLED.search(line.text) for line in lines):
        why = "a process of it ended without a word, as one does that is killed where memory runs out"
    return why and _short(why)


def _stripped(line: str) -> _Line:
    line = _COLOUR.sub("", line)
    prefix = _PREFIX.match(line)
    assert prefix is not None, "it matches nothing, too"
    return _Line(prefix["level"] or "", line[prefix.end() :])


def _failures(lines: list[_Line]) -> Iterator[str]:
    """The exceptions that ended a process, the first one first, of those that led to one another the last."""
    found: str | None = None
    position = 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if line.text.strip() in _LINKS:
            found = None
        if line.text.strip() != _TRACEBACK or line.level in ("DEBUG", "INFO", "WARNING"):
            continue
        if found is not None:
            yield found
        message, position = _exception(lines, position)
        name = message.partition(":")[0].rpartition(".")[2]
        found = None if name in _ENDED or _DERIVED.search(message) else message
    if found is not None:
        yield found


def _exception(lines: list[_Line], position: int) -> tuple[str, int]:
    """The exception below a traceback that begins before ``position``, and where its first line ends."""
    while position < len(lines) and (lines[position].text.startswith(" ") or not lines[position].text):
        position += 1
    if position == len(lines):
        return "", position
    message = lines[position].text
    position += 1
    if re.search(r"\d+ validation errors? for", message):
        # pydantic's: what was wrong stands below, between the field's name and what was given.
        while position < len(lines) and lines[position].text.startswith("  "):
            detail = lines[position].text.strip()
            position += 1
            if "[type=" in detail:
                name = message.partition(":")[0].rpartition(".")[2]
                return f"{name}: {detail.partition(' [type=')[0].removeprefix('Value error, ')}", position
    return message, position


def _short(message: str) -> str:
    """The first two sentences of an exception, on one line and without its module."""
    found = _EXCEPTION.match(message)
    if found is not None:
        name, said = found["name"].rpartition(".")[2], found["message"]
        message = name if not said else said if name in _PLAIN else f"{name}: {said}"
    sentences = re.split(r"(?<=[.!?]) +(?=[A-Z])", " ".join(message.split()))
    shown = " ".join(sentences[:2])
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS].rstrip()} ..."
