"""The page ``docs/hooks.md``: ``python -m vllm_packcache.hooks.page > docs/hooks.md`` writes it."""

from __future__ import annotations

from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from packaging.version import Version

from vllm_packcache.hooks.contract import files_of, installed_folder
from vllm_packcache.hooks.install import supported_vllm
from vllm_packcache.hooks.table import HOOKS, Hook

UPSTREAM = "https://github.com/vllm-project/vllm/blob"

_TOP = """# What of vLLM the plugin relies on

Generated from `vllm_packcache/hooks/table.py` by `python -m vllm_packcache.hooks.page > docs/hooks.md`.

`name(a, b)` takes just these parameters, `name(a, ...)` others too. `name: a, b` reads or calls `a`, then `b`.
A row without versions is true of every supported vLLM: `{supported}`.
"""


def page(vllm_folder: Path) -> str:
    """The page in Markdown.

    Args:
        vllm_folder: the folder of a ``vllm`` package, which says what file a module is.
    """
    parts = [_TOP.format(supported=supported_vllm())]
    # Of the version that was looked into, so that a link leads to what is described.
    upstream = f"{UPSTREAM}/v{Version(version('vllm')).base_version}/vllm/"
    ordered = sorted(HOOKS, key=attrgetter("section"))
    for section, hooks in groupby(ordered, attrgetter("section")):
        rows = [_row(hook, vllm_folder, upstream) for hook in hooks]
        parts.append(
            f"## {section[:1].upper()}{section[1:]}\n\n"
            "| vLLM's | kind | what must be there | why | ours | what would end it | versions |\n"
            "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def _row(hook: Hook, folder: Path, upstream: str) -> str:
    file = next((file for file in files_of(hook.module) if (folder / file).is_file()), files_of(hook.module)[0])
    what = "<br>".join(f"`{statement}`" for statement in hook.what.split("; "))
    ours = hook.wrapper or hook.subclass
    versions = f"{hook.since or 'oldest'} to {hook.until or 'newest'}" if hook.since or hook.until else ""
    cells = (
        f"[`{hook.owner.removeprefix('vllm.')}`]({upstream}{file})",
        hook.kind.value,
        what,
        hook.why.partition(": ")[2],
        f"`{ours.removeprefix('vllm_packcache.')}`" if ours else "",
        hook.ended_by,
        versions,
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    found = installed_folder()
    if found is None:
        raise SystemExit("vLLM is not installed: install it, it says which file a module is")
    print(page(found), end="")
