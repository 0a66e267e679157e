"""The table of hooks, checked by reading vLLM's source.

Nothing is imported: the same check runs on the installed vLLM, in ``vllm-packcache doctor``, and on the
unpacked wheel of a version that is not installed. Every check fails with the name of what moved.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from vllm_packcache.hooks.table import HOOKS, Hook, Place

_OURS = Path(__file__).parents[1]


@dataclass(frozen=True)
class HookCheck:
    """The outcome for one `Place`: ``detail`` says where it is, or what moved."""

    name: str
    ok: bool
    detail: str


def places(version: str, hooks: Sequence[Hook] = HOOKS) -> list[Place]:
    """Everything that must be true of a version of vLLM."""
    return [place for hook in hooks if hook.true_of(Version(version)) for place in hook.places()]


def check_hooks(version: str, vllm_folder: Path | None = None) -> list[HookCheck]:
    """Check everything that must be true of a version of vLLM.

    Args:
        version: of vLLM.
        vllm_folder: the folder of a ``vllm`` package; None: the installed one.
    """
    if vllm_folder is None:
        vllm_folder = installed_folder()
        if vllm_folder is None:
            return [HookCheck("vllm", False, "vLLM is not installed")]
    return [check(place, vllm_folder) for place in places(version)]


def installed_folder() -> Path | None:
    """The folder of the installed ``vllm`` package."""
    spec = find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def files_of(module: str) -> tuple[str, ...]:
    """Where a module of vLLM's may be, relative to the folder of the ``vllm`` package: a file, or a package."""
    if module == "vllm":
        return ("__init__.py",)
    path = module.removeprefix("vllm.").replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


def check(place: Place, folder: Path) -> HookCheck:
    """Check one place in the folder of a ``vllm`` package."""
    files = files_of(place.module)
    file = next((file for file in files if (folder / file).is_file()), None)
    where = f"vllm/{file or files[0]}: {place.symbol}"
    if file is None:
        return HookCheck(place.why, False, f"{where}: the file is gone")
    node = _find(_module(folder / file), place.symbol.split("."))
    moved = "is gone" if node is None else _difference(place, node)
    return HookCheck(place.why, moved is None, where if moved is None else f"{where} {moved}")


def _difference(place: Place, node: ast.AST) -> str | None:
    """What is no longer true of a place; None: nothing."""
    there, wanted, exact = _parameters(node), set(place.parameters), place.exact
    ours = _override(place.override) if place.override else None
    if ours is not None:
        wanted = _parameters(ours)
        # What a variadic method of ours does not look at it passes on.
        exact = ours.args.vararg is None and ours.args.kwarg is None
    if missing := wanted - there:
        return f"no longer takes {', '.join(sorted(missing))}"
    if exact and (added := there - wanted):
        return f"takes more than it did: {', '.join(sorted(added))}"
    names = list(_names_in_order(node))
    for read in place.reads:
        if read not in names:
            return f"no longer uses {read}, or in another order"
        names = names[names.index(read) + 1 :]
    return None


def _override(path: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The method ``module:Class.method`` of ours; None: it is an attribute of that class.

    Raises:
        LookupError: the module or class is gone, or has no such name: nothing of ours would be compared with vLLM's.
    """
    module, _, symbol = path.partition(":")
    owner, _, method = symbol.partition(".")
    file = _OURS.parent / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        raise LookupError(f"there is no module {module}")
    tree = _module(file)
    # Some of our classes are made by a function.
    kind = next((node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner), None)
    if kind is None:
        raise LookupError(f"{module} has no class {owner}")
    member = _child(kind, method)
    if member is None:
        raise LookupError(f"{module}: {owner} has no {method}")
    return member if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) else None


@cache
def _module(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(module: ast.Module, path: list[str]) -> ast.AST | None:
    node = _child(module, path[0])
    if len(path) == 1 or not isinstance(node, ast.ClassDef):
        return node if len(path) == 1 else None
    found = _child(node, path[1])
    if found is not None:
        return found
    # What a class does not define is its base's, as far as that is in the same file.
    bases = (base.id for base in node.bases if isinstance(base, ast.Name))
    return next((found for base in bases if (found := _find(module, [base, path[1]])) is not None), None)


def _child(node: ast.AST, name: str) -> ast.AST | None:
    return next((child for child in ast.iter_child_nodes(node) if name in _defined_names(child)), None)


def _defined_names(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return {alias.asname or alias.name for alias in names}
    return set()


def _parameters(node: ast.AST) -> set[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    arguments = node.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _names_in_order(node: ast.AST) -> Iterator[str]:
    """Names and attributes read or called in ``node``, in the order of the source."""
    found = [
        (child.end_lineno, child.end_col_offset, child.id if isinstance(child, ast.Name) else child.attr)
        for child in ast.walk(node)
        if isinstance(child, ast.Name | ast.Attribute)
    ]
    return (name for *_, name in sorted(found))
