"""What an installed wheel leaves behind: modules, and metadata with entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path,
    name: str,
    modules: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
    version: str = "1.0",
) -> Path:
    """Lay a package into ``folder``, as pip would.

    Args:
        folder: to be put on the path.
        name: of the distribution.
        modules: file names and what they hold.
        entry_points: groups, of names and objects.
        version: of the distribution.

    Returns:
        The folder.
    """
    for file, text in modules.items():
        (folder / file).write_text(text, encoding="utf-8")
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join([*lines, ""]))
    return folder
