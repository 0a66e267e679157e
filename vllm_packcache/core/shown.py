"""How messages show what was given, which may be anybody's text.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

SHOWN_CHARACTERS = 80
"""At most so much of what was given is shown in a message."""


def shown(value: object) -> str:
    """``value`` as Python writes it, cut to `SHOWN_CHARACTERS`."""
    if isinstance(value, str):
        # Before it is quoted: what is cut off need not be looked at.
        value = value[: SHOWN_CHARACTERS + 1]
    try:
        text = repr(value)
    except ValueError:
        # Python does not write out a number of thousands of digits.
        return "a number too long to show"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def shown_path(path: object) -> str:
    """A file's path as Python writes a text, cut to `SHOWN_CHARACTERS`: its middle, since its end tells files apart."""
    text = str(path)
    if len(text) > 2 * SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + text[-SHOWN_CHARACTERS:]
    quoted = repr(text)
    if len(quoted) <= SHOWN_CHARACTERS:
        return quoted
    start = SHOWN_CHARACTERS // 3
    return f"{quoted[:start]}…{quoted[start + 1 - SHOWN_CHARACTERS :]}"


def named(option: str) -> str:
    """The name of an option, which may be anybody's text: as it is where it looks like a name, as `shown` otherwise."""
    return option if option.isprintable() and len(option) <= SHOWN_CHARACTERS else shown(option)
