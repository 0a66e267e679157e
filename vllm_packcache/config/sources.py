"""Where a configuration comes from: a mapping, JSON text, a file, or the name of a preset.

The same content is the same configuration whichever way it comes: as plain data, numbers as JSON reads them, every name
once. A file is JSON (RFC 8259) or YAML (1.2, core schema, of which JSON is a part), with or without a byte order mark.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vllm_packcache.config.errors import ConfigError, named, shown, shown_path

CONFIG_KEY = "kv_cache_policy_config"
"""Key of ``additional_config`` (and, with dashes, the flag) that holds the configuration."""

LARGEST_FILE = 64 * 1024
"""Bytes of a file that are read: YAML of this size takes up to three seconds."""

DEEPEST = 32
"""Lists and mappings inside each other."""

MOST_VALUES = 4_096
"""Values in a configuration. Aliases of YAML count as what they stand for: a small file cannot become a large one."""

_YAML_SUFFIXES = (".yaml", ".yml")


def presets() -> dict[str, Path]:
    """The presets in ``configs/`` by name."""
    # In a wheel the folder lies inside the package, in a checkout beside it.
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def load_mapping(source: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Read a configuration: a mapping, JSON text, a file's path, or a preset's name.

    Returns:
        Plain data that nobody else has: what JSON can say, and numbers that are not finite (see `check_finite`).

    Raises:
        ConfigError: it cannot be read, holds no mapping, a name twice, or something that is no plain data.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _plain_mapping(source)
    if not isinstance(source, str):
        raise ConfigError(f"{CONFIG_KEY} must be a mapping, JSON text, a file or a preset, not {shown(source)}")
    text = source.removeprefix("\ufeff").strip()
    if text.startswith("{"):
        return _plain_mapping(_json(text, CONFIG_KEY))
    path = _find(text)
    loaded = _parse(_read(path), path)
    if not isinstance(loaded, _Entries):
        kind = "null" if loaded is None else type(loaded).__name__
        raise ConfigError(f"{CONFIG_KEY}: {shown_path(path)} must hold a mapping of options, not {kind}")
    return _plain_mapping(loaded)


def check_finite(value: object, name: str) -> None:
    """Make sure that plain data holds no NaN and no infinity: JSON has no such numbers, but its readers take them.

    Raises:
        ConfigError: it does; ``name`` and the names inside it say where.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{CONFIG_KEY}: {name} must be a finite number, not {value}")
    if isinstance(value, dict):
        for inner, item in value.items():
            check_finite(item, f"{name}.{named(inner)}")
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            check_finite(item, f"{name}: item {number}")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _find(text: str) -> Path:
    """The file that is called so, or the preset."""
    path = Path(text)
    try:
        path = path.expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError):
        # A text that can be no path: too long, the home of nobody, or with a null character.
        pass
    found = presets()
    if text not in found:
        raise ConfigError(
            f"{CONFIG_KEY}: {shown_path(text)} is neither a file nor a preset: presets are {', '.join(found)}"
        )
    return found[text]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{CONFIG_KEY}: {shown_path(path)} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(
            f"{CONFIG_KEY}: {shown_path(path)} cannot be read: a configuration has at most "
            f"{LARGEST_FILE // 1024} KiB, and it is larger"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{CONFIG_KEY}: {shown_path(path)} cannot be read: byte {error.start} is no UTF-8: save it as text in UTF-8"
        ) from None


def _parse(text: str, path: Path) -> object:
    suffix = path.suffix.lower()
    if suffix == ".json" or text.lstrip().startswith("{"):
        try:
            return _json(text, f"{CONFIG_KEY}: {shown_path(path)}")
        except ConfigError:
            # YAML, too, can begin like that.
            if suffix not in _YAML_SUFFIXES:
                raise
    try:
        loaded = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(
            f"{CONFIG_KEY}: {shown_path(path)} is nested more than {DEEPEST} deep: no option is"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{CONFIG_KEY}: {shown_path(path)} cannot be read: {' '.join(str(error).split())}") from None
    return _Entries() if loaded is None else loaded


# ---------------------------------------------------------------------------------------------------------------------
# Texts


class _Entries(list[tuple[object, object]]):
    """The entries of a mapping as they were written, names that are there twice too."""


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Entries)
    except RecursionError:
        raise ConfigError(f"{where} is nested more than {DEEPEST} deep: no option is") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None


_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 with its core schema; what an operator writes is what JSON would make of it.

    PyYAML's own schema is that of YAML 1.1: ``5e-1`` is a text, ``010`` is 8, ``1:30`` is 90, ``no`` is false,
    ``2001-01-01`` is a date, and ``<<`` merges mappings.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- it is an instance's in the stubs of PyYAML
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
        "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
        "tag:yaml.org,2002:map": lambda loader, node: loader.entries(node),
        "tag:yaml.org,2002:null": lambda loader, node: loader.scalar(node, _NULL, lambda text: None),
        "tag:yaml.org,2002:bool": lambda loader, node: loader.scalar(node, _BOOL, lambda text: text.lower() == "true"),
        "tag:yaml.org,2002:int": lambda loader, node: loader.scalar(node, _INT, _int),
        "tag:yaml.org,2002:float": lambda loader, node: loader.scalar(node, _FLOAT, _float),
        None: yaml.SafeLoader.construct_undefined,
    }

    def entries(self, node: yaml.Node) -> _Entries:
        """Names as they are written: JSON has no other than texts."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "this is no mapping", node.start_mark)
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name must be a text", name.start_mark)
        return _Entries([(name.value, self.construct_object(value, deep=True)) for name, value in node.value])

    def scalar(self, node: yaml.ScalarNode, form: re.Pattern[str], read: Any) -> Any:
        """A value of ``form``, which an explicit tag could claim of any text."""
        text = self.construct_scalar(node)
        if not form.fullmatch(text):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"{shown(text)} is no {kind}", node.start_mark)
        try:
            return read(text)
        except ValueError:
            raise yaml.constructor.ConstructorError(None, None, "a number too long", node.start_mark) from None


for _tag, _form, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form.pattern})\Z"), _first)


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    # Infinity and NaN have a dot before their name.
    return float(text if text[-1] in "0123456789." else text.replace(".", ""))


# ---------------------------------------------------------------------------------------------------------------------
# Plain data


def _plain_mapping(entries: Mapping[Any, Any] | _Entries) -> dict[str, Any]:
    plain = _plain(entries, "", 0, itertools.count())
    assert isinstance(plain, dict)
    return plain


def _plain(value: object, name: str, depth: int, visited: Iterator[int]) -> Any:
    """``value`` as what JSON can say, and numbers that are not finite.

    Args:
        value: from a reader of files, or from whoever wrote a mapping in Python.
        name: where it stands.
        depth: of the mappings and lists that it stands in.
        visited: counts the values that were looked at.
    """
    if depth > DEEPEST:
        raise ConfigError(f"{CONFIG_KEY} is nested more than {DEEPEST} deep: no option is")
    if next(visited) > MOST_VALUES:
        raise ConfigError(f"{CONFIG_KEY} holds more than {MOST_VALUES:,} values, with what aliases stand for")
    if isinstance(value, Mapping | _Entries):
        plain: dict[str, Any] = {}
        for key, item in value.items() if isinstance(value, Mapping) else value:
            inner = _text(str(key), f"a name in {name}" if name else "a name")
            path = f"{name}.{named(inner)}" if name else named(inner)
            if inner in plain:
                raise ConfigError(f"{CONFIG_KEY}: {path} is given twice: leave one out")
            plain[inner] = _plain(item, path, depth + 1, visited)
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}: item {number}", depth + 1, visited) for number, item in enumerate(value, 1)]
    if isinstance(value, str):
        return _text(value, name)
    if isinstance(value, int) and value.bit_length() > 4096:
        # Python refuses to write them out, also as JSON.
        raise ConfigError(f"{CONFIG_KEY}: {name} must be a shorter number, not {shown(value)}")
    if value is None or isinstance(value, int | float):
        return value
    raise ConfigError(
        f"{CONFIG_KEY}: {name} must be a number, a text, true or false, a list or a mapping, not {shown(value)}"
    )


def _text(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON and the command line can hold halves of a character.
        raise ConfigError(f"{CONFIG_KEY}: {name} must be Unicode text, not {shown(text)}") from None
    return text
