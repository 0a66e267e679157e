"""Model families: one file each, found by the architecture that a checkpoint names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from vllm_packcache.core import plugins
from vllm_packcache.core.layout import FrameLayout
from vllm_packcache.families.base import Family
from vllm_packcache.families.decoder import Decoder
from vllm_packcache.families.emu3 import Emu3
from vllm_packcache.families.lumos import Lumos

__all__ = ["DECODER", "EMU3", "LUMOS", "Family", "describing", "find", "of", "with_models"]

ENTRY_POINT_GROUP = "vllm_packcache.families"

DECODER, EMU3, LUMOS = Decoder(), Emu3(), Lumos()
_BUILT_IN: tuple[Family, ...] = (EMU3, LUMOS)

logger = logging.getLogger("vllm.packcache")


def of(architectures: Iterable[str] | None) -> Family:
    """The family of a model.

    Args:
        architectures: as its configuration names them; None or none: there is no model.

    Raises:
        ValueError: a package offers a family for it that cannot be loaded, or several do.
    """
    return next((family for name in architectures or () if (family := find(name)) is not None), DECODER)


@cache
def find(architecture: str) -> Family | None:
    """The family that claims an architecture, and no other; None: none does.

    Raises:
        ValueError: a package's cannot be loaded, or several claim it.
    """
    entries = {entry.value: entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == architecture}
    claims: list[Family] = [family for family in _BUILT_IN if architecture in family.architectures]
    claims += [_load(entry) for entry in entries.values()]
    if len(claims) > 1:
        raise ValueError(
            f"architecture {architecture!r} is claimed by {' and by '.join(sorted(map(_class_of, claims)))}: uninstall "
            "all packages but one"
        )
    return claims[0] if claims else None


def describing(frame: FrameLayout, axis_scale: tuple[int, int, int] | None) -> Family:
    """The family that alone makes such frames; where none does, that of all other models."""
    return next((family for family in _BUILT_IN if family.describes(frame, axis_scale)), DECODER)


def with_models() -> Iterator[tuple[str, Family]]:
    """Architectures that stock vLLM has no model for, and their families; what cannot be loaded is logged."""
    names = {name for family in _BUILT_IN for name in family.architectures}
    names |= {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    for architecture in sorted(names):
        try:
            family = find(architecture)
        except ValueError as error:
            # In nobody's way who serves another model.
            logger.warning("%s", error)
            continue
        if family is not None and family.model is not None:
            yield architecture, family


def _load(entry: EntryPoint) -> Family:
    what, remedy = f"the family of {entry.name!r}", "mend or uninstall the package"
    family: type[Family] = plugins.load(entry, Family, what, "vllm_packcache.families.Family", remedy)
    if entry.name not in family.architectures:
        raise ValueError(f"{what} of {plugins.package_of(entry)} does not name it in architectures: {remedy}")
    try:
        return family()
    except TypeError as error:
        raise ValueError(f"{what} of {plugins.package_of(entry)} is not complete ({error}): {remedy}") from error


def _class_of(family: Family) -> str:
    return f"{type(family).__module__}:{type(family).__qualname__}"
