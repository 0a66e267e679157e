"""README and guide pages: a size that a newcomer reads, links that lead somewhere, numbers that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md"), ROOT / "docs" / "results" / "README.md"])

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What a link into a page can name: its headings as they are shown on the web."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_as_long_as_a_newcomer_reads() -> None:
    assert 8_000 <= README.stat().st_size <= 10_240


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            place = page.parent / name if name else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(target)
    assert broken == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(prose(README))}
    reached = {
        (page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in LINK.findall(prose(page))
    }
    assert set(PAGES) - {README} <= linked | reached


def test_numbers_of_the_readme_are_those_of_the_results() -> None:
    _, begin, rest = README.read_text(encoding="utf-8").partition("<!-- results: begin -->")
    rows, end, after = rest.partition("<!-- results: end -->")
    assert begin
    assert end
    measured = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    cells = [cell.strip() for line in rows.strip().splitlines()[2:] for cell in line.strip("|").split("|")[1:]]
    said = [*cells, *re.findall(r"(\d+\.\d+) %", after.partition("\n## ")[0])]
    assert len(said) == 9
    for number in said:
        assert re.search(rf"(?<![\d.]){re.escape(number.removesuffix(' %'))}(?![\d.])", measured), number


def test_every_option_of_the_readme_is_one() -> None:
    from vllm_packcache.config.server import REQUEST_PREFIX, ServerConfig

    config = ServerConfig.parse("packcache", "demo")
    table = prose(README).partition("## Options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (server|request|both) \|", table, re.MULTILINE)
    assert len(rows) == 11
    for names, of in rows:
        for name in re.findall(r"`(\w+)`", names):
            if of != "server":
                assert name.removeprefix(REQUEST_PREFIX) in config.request_options
            if of == "request":
                assert name.startswith(REQUEST_PREFIX)
            else:
                assert name in {"layout", "positions", *config.as_mapping()}
