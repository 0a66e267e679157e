"""The same content is the same configuration whichever way it comes, and what is no plain data is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import quick
from vllm_packcache.config.errors import SHOWN_CHARACTERS, ConfigError, shown, shown_path
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import DEEPEST, LARGEST_FILE, MOST_VALUES, load_mapping
from vllm_packcache.core import policies
from vllm_packcache.core.policies import Full

BOM = b"\xef\xbb\xbf"
TABS = b'{\n\t"window": 3,\n\t"layout": {"grid": [16, 16]}\n}\n'
EXPONENT = b'{"decay": 5e-1, "layout": {"grid": [16, 16]}}'


def refusal(source: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_mapping(source)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("kv_cache_policy_config")
    return message


def written(folder: Path, content: bytes | str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("name", ["mine.json", "mine.JSON", "mine.yaml", "mine.yml", "mine.txt", "mine"])
@pytest.mark.parametrize("begin", [b"", BOM, b" \n\t", BOM + b"\r\n"])
@pytest.mark.parametrize("content", [TABS, EXPONENT, b"{}"])
def test_a_json_file_is_read_as_the_same_json_given_inline(
    tmp_path: Path, content: bytes, begin: bytes, name: str
) -> None:
    expected = json.loads(content)

    assert load_mapping(written(tmp_path, begin + content, name)) == expected
    assert load_mapping((begin + content).decode()) == expected


@pytest.mark.parametrize("suffix", ["yaml", "yml", "txt"])
@pytest.mark.parametrize("begin", [b"", BOM])
def test_a_yaml_file_has_json_numbers(tmp_path: Path, begin: bytes, suffix: str) -> None:
    content = b"a: 5e-1\nb: 1e3\nc: 1E+3\nd: -0.5e1\ne: 16\nf: 010\ng: 0x10\nh: 0o10\ni: +1\nj: .5\nk: 1.\n"

    read = load_mapping(written(tmp_path, begin + content, f"mine.{suffix}"))

    assert read == {
        "a": 0.5, "b": 1000.0, "c": 1000.0, "d": -5.0, "e": 16, "f": 10, "g": 16, "h": 8, "i": 1, "j": 0.5, "k": 1.0,
    }  # fmt: skip
    assert {name: type(value) for name, value in read.items()} == {
        name: int if name in "efghi" else float for name in read
    }


def test_yaml_has_no_more_than_the_core_schema(tmp_path: Path) -> None:
    texts = [
        "no",
        "yes",
        "on",
        "off",
        "1:30",
        "1_000",
        "2001-01-01",
        "=",
        "0b1",
        "1e",
        "e1",
        ".",
        "-",
        "+",
        "NaN",
        "inf",
    ]
    lines = [f"- '{text}'\n- {text}\n" for text in texts if text != "-"]
    content = (
        f"texts:\n{''.join(lines)}nulls: [~, null, Null, NULL, ]\nbools: [true, True, TRUE, false, False, FALSE]\n"
    )

    read = load_mapping(written(tmp_path, content))

    assert read["texts"] == [text for text in texts if text != "-" for _ in range(2)]
    assert read["nulls"] == [None] * 4
    assert read["bools"] == [True] * 3 + [False] * 3


def test_names_are_texts_as_in_json(tmp_path: Path) -> None:
    content = "1: a\n1.0: b\ntrue: c\nnull: d\n~: e\n2001-01-01: f\n<<: {x: 1}\n"

    assert list(load_mapping(written(tmp_path, content))) == ["1", "1.0", "true", "null", "~", "2001-01-01", "<<"]


def test_yaml_in_braces_stays_yaml_where_the_file_says_so(tmp_path: Path) -> None:
    content = "{window: 3, layout: {grid: [16, 16]}}"

    assert load_mapping(written(tmp_path, content)) == {"window": 3, "layout": {"grid": [16, 16]}}
    for name in ("mine.json", "mine"):
        assert "is not valid JSON" in refusal(written(tmp_path, content, name))
    assert "is not valid JSON" in refusal(written(tmp_path, "window: 3", "mine.json"))


@pytest.mark.parametrize("name", ["mine.yaml", "mine.json"])
@pytest.mark.parametrize(
    ("content", "doubled"),
    [
        ('{"window": 3, "window": 7}', "window"),
        ('{"window": 3, "window": 3}', "window"),
        ('{"layout": {"grid": [1, 2], "grid": [1, 2]}}', "layout.grid"),
        ('{"a": [{"b": {"c": 1, "c": 2}}]}', "a: item 1.b.c"),
        ('{"window": 3, "wind\\u006fw": 7}', "window"),
        ('{"a\\nb": 3, "a\\nb": 7}', r"'a\nb'"),
    ],
)
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path, content: str, doubled: str, name: str) -> None:
    expected = f"kv_cache_policy_config: {doubled} is given twice: leave one out"

    assert refusal(written(tmp_path, content, name)) == refusal(content) == expected


@pytest.mark.parametrize(
    ("content", "doubled"),
    [
        ("window: 3\nwindow: 7\n", "window"),
        ("window: 3\n'window': 3\n", "window"),
        ("layout:\n  grid: [1, 2]\n  grid: [1, 2]\n", "layout.grid"),
        ("layout: &a {grid: 1, grid: 2}\nb: *a\n", "layout.grid"),
        ("1: a\n'1': b\n", "1"),
    ],
)
def test_a_name_that_is_there_twice_in_yaml_is_refused(tmp_path: Path, content: str, doubled: str) -> None:
    expected = f"kv_cache_policy_config: {doubled} is given twice: leave one out"

    assert refusal(written(tmp_path, content)) == expected


def test_names_of_a_mapping_that_are_the_same_as_texts_are_refused() -> None:
    assert refusal({"a": {1: 2, "1": 3}}) == "kv_cache_policy_config: a.1 is given twice: leave one out"


# What YAML can hold without escapes of its own.
_TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=8)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


@quick
@given(st.dictionaries(_TEXT, _PLAIN, max_size=4))
def test_all_forms_mean_the_same(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps(content, indent="\t")
    lines = [
        f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in content.items()
    ]
    sources = [
        content,
        text,
        written(folder, text, "same.json"),
        written(folder, text, "same.yaml"),
        written(folder, "# in lines\n" + "".join(lines), "lines.yaml"),
    ]

    for source in sources:
        assert repr(load_mapping(source)) == repr(content)


def test_what_was_read_is_nobody_elses() -> None:
    given = {"layout": {"grid": (16, 16)}}

    read = load_mapping(given)
    read["layout"]["grid"].append(3)

    assert given == {"layout": {"grid": (16, 16)}}


@dataclass(frozen=True, kw_only=True)
class Unchecked(Full):
    name: ClassVar[str] = "unchecked"
    share: float = math.inf
    table: tuple[tuple[float, ...], ...] | int | None = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"share": NaN}', "share must be a finite number, not nan"),
        ('{"share": Infinity}', "share must be a finite number, not inf"),
        ('{"share": -Infinity}', "share must be a finite number, not -inf"),
        ('{"share": 1e999}', "share must be a finite number, not inf"),
        ('{"table": [[1, NaN]]}', "table: item 1: item 2 must be a finite number, not nan"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    """Also where the policy does not look."""
    monkeypatch.setattr(policies, "find", lambda name: Unchecked)
    # A default is its author's business.
    assert ServerConfig.parse("unchecked", {"table": 1}).policy == Unchecked(table=1)
    as_yaml = re.sub(r"-?Infinity|NaN|1e999", lambda word: _YAML_NUMBERS[word.group()], content)
    for source in (content, written(tmp_path, content, "mine.json"), json.loads(content), written(tmp_path, as_yaml)):
        with pytest.raises(ConfigError) as error:
            ServerConfig.parse("unchecked", source)
        assert str(error.value) == f"kv_cache_policy_config: {message}"


_YAML_NUMBERS = {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.Inf", "1e999": "1e999"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("layout: !!python/tuple [1, 2]\n", "could not determine a constructor"),
        ("window: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("window: !!binary aGk=\n", "could not determine a constructor"),
        ("window: !!set {a}\n", "could not determine a constructor"),
        ("window: !!int 1_0\n", "'1_0' is no int"),
        ("window: !!int [1]\n", "expected a scalar node"),
        ("window: !!map 1\n", "this is no mapping"),
        (f"window: {'1' * 5000}\n", "a number too long"),
        ("window: [\n", "while parsing"),
        ("window: 1\n---\nwindow: 2\n", "expected a single document"),
        ("? [1, 2]\n: 3\n", "a name must be a text"),
        ("- 1\n- 2\n", "must hold a mapping of options, not list"),
        ("window\n", "must hold a mapping of options, not str"),
    ],
)
def test_a_yaml_file_holds_plain_data_only(tmp_path: Path, text: str, reason: str) -> None:
    path = written(tmp_path, text)

    message = refusal(path)

    assert message.startswith(f"kv_cache_policy_config: {shown_path(path)} ")
    assert reason in message


@pytest.mark.parametrize(("text", "kind"), [("null", "null"), ("[]", "list"), ("3", "int")])
def test_a_json_file_holds_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    assert refusal(written(tmp_path, text, "mine.json")).endswith(f"must hold a mapping of options, not {kind}")


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", 1j, Path("x")])
def test_a_mapping_holds_plain_data_only(value: object) -> None:
    assert refusal({"layout": {"grid": value}}).startswith(
        "kv_cache_policy_config: layout.grid must be a number, a text, true or false, a list or a mapping, not "
    )


def test_aliases_stand_for_what_they_name(tmp_path: Path) -> None:
    assert load_mapping(written(tmp_path, "a: &x [1, 2]\nb: *x\n")) == {"a": [1, 2], "b": [1, 2]}


NINE = range(1, 10)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in NINE),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{{','.join(f'b{j}: *a{i - 1}' for j in NINE)}}}\n" for i in NINE),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in NINE),
        f"a: [{'1,' * MOST_VALUES}]",
    ],
    ids=["lists", "mappings", "merges", "plain"],
)
def test_a_small_file_does_not_become_a_large_configuration(tmp_path: Path, text: str) -> None:
    assert refusal(written(tmp_path, text)) == (
        f"kv_cache_policy_config holds more than {MOST_VALUES:,} values, with what aliases stand for"
    )


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_a_file_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    assert "recursive" in refusal(written(tmp_path, text))


def test_depth_is_bounded(tmp_path: Path) -> None:
    def nested(depth: int) -> str:
        return '{"a":' * depth + "1" + "}" * depth

    assert load_mapping(nested(DEEPEST))
    for depth in (DEEPEST + 1, 5000):
        sources = [nested(depth), *(written(tmp_path, nested(depth), name) for name in ("mine.json", "mine.yaml"))]
        for source in sources:
            assert f"is nested more than {DEEPEST} deep" in refusal(source)
    circle: dict[str, Any] = {}
    circle["a"] = circle
    assert f"is nested more than {DEEPEST} deep" in refusal(circle)


def test_size_is_bounded(tmp_path: Path) -> None:
    # As large as a file may be, most of it a remark.
    text = "window: 3\n#"
    assert load_mapping(written(tmp_path, text.ljust(LARGEST_FILE, "#"))) == {"window": 3}
    for name in ("mine.yaml", "mine.json"):
        assert "has at most 64 KiB" in refusal(written(tmp_path, text.ljust(LARGEST_FILE + 1, "#"), name))


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b"window: \x80", "décor: 1".encode("latin-1")])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    message = refusal(written(tmp_path, content))

    assert re.search(r"cannot be read: byte \d+ is no UTF-8: save it as text in UTF-8$", message)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(path) == f"kv_cache_policy_config: {shown_path(path)} cannot be read: Permission denied"


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"a": {"\\udfff": 1}}'])
def test_half_a_character_is_refused(text: str) -> None:
    assert re.search(r"(a|a name in a) must be Unicode text, not '\\ud[8f][0f][0f]'$", refusal(text))


def test_a_number_that_python_does_not_write_out_is_refused() -> None:
    assert refusal({"window": 10**5000}) == (
        "kv_cache_policy_config: window must be a shorter number, not a number too long to show"
    )


def test_an_empty_file_and_no_source_mean_the_defaults(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "---\n", "null"):
        assert load_mapping(written(tmp_path, text)) == load_mapping(None) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("a\nb", r"'a\nb'"),
        ("x" * (SHOWN_CHARACTERS - 2), repr("x" * (SHOWN_CHARACTERS - 2))),
        ("x" * 10**6, "'" + "x" * (SHOWN_CHARACTERS - 2) + "…"),
        ([7] * 10**5, repr([7] * 30)[: SHOWN_CHARACTERS - 1] + "…"),
        pytest.param(10**5000, "a number too long to show", id="long"),
    ],
)
def test_what_was_given_is_shown_in_short(value: object, text: str) -> None:
    assert shown(value) == text
    assert len(text) <= SHOWN_CHARACTERS


def test_a_long_path_shows_its_beginning_and_its_end():
    assert shown_path("a/short name") == "'a/short name'"
    for path in ("/home/" + "nested/" * 30 + "mine.yaml", "/home/" + "\n" * 60 + "/mine.yaml"):
        text = shown_path(Path(path))
        assert len(text) == SHOWN_CHARACTERS
        assert text.startswith("'/home/")
        assert text.endswith("/mine.yaml'")
    assert len(shown_path("\n" * 10**6)) == SHOWN_CHARACTERS
