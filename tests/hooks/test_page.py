"""The documentation's table of hooks is the table itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from vllm_packcache.hooks.page import page
from vllm_packcache.hooks.table import Hook

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_table() -> None:
    """Otherwise: python -m vllm_packcache.hooks.page > docs/hooks.md."""
    assert (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8") == page(Path(vllm.__file__).parent)


@pytest.mark.parametrize(
    ("since", "until", "true_of"),
    [("", "", "0.32.0 0.32.1 0.33.0"), ("0.33", "", "0.33.0"), ("", "0.32", "0.32.0 0.32.1")],
)
def test_a_row_is_about_versions(since: str, until: str, true_of: str) -> None:
    hook = Hook("vllm", "name", "a test", since=since, until=until)
    assert " ".join(v for v in ("0.32.0", "0.32.1", "0.33.0") if hook.true_of(Version(v))) == true_of
    if since:
        assert hook.true_of(Version("0.33.0+cpu"))


def test_a_statement_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match="cannot read 'f\\(a'"):
        Hook("vllm", "f(a", "a test").places()
