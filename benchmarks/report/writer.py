"""The writer of the report: from the JSON of a folder to a CSV, Markdown, and the results section of a README.

Nothing is measured here. The same JSON gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import fill

from benchmarks.bundled import outdated
from benchmarks.protocol import Benchmark
from benchmarks.registry import benchmarks
from benchmarks.report.markdown import Files
from benchmarks.report.parts import GOAL_HEADINGS, MET, NOT_MEASURED, Goal, Result, Row
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.core.policies import PackCache

CSV, REPORT = "results.csv", "report.md"

Results = Mapping[Benchmark, Result | None]
"""Of every benchmark; None: there is none that is whole."""

WIDTH = 120

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""What stands between them in a README is generated."""


def write(folder: Path, readme: Path | None = None) -> list[Path]:
    """Write the CSV and the report of a folder, and the results section of a README.

    Args:
        folder: with the JSON of benchmarks, see `Benchmark.file`.
        readme: a file with `BEGIN` and `END`; None: none.

    Returns:
        What was written.

    Raises:
        ConfigError: a mark is missing in ``readme``.
        OSError: a file cannot be read or written.
    """
    written = texts(folder, readme)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8", newline="")
    return list(written)


def report(folder: Path, readme: Path | None = None) -> list[Path]:
    """`write`, of a folder that a person names.

    Raises:
        ConfigError: a mark is missing in ``readme``, or no result is in ``folder``.
        OSError: a file cannot be read or written.
    """
    own = [benchmark for benchmark in benchmarks() if benchmark.own_file is None]
    if not any(benchmark.read(folder) for benchmark in own):
        names = ", ".join(benchmark.file for benchmark in own)
        raise ConfigError(f"FOLDER: {folder} has no results: none of {names}; see vllm-packcache bench all")
    return write(folder, readme)


def texts(folder: Path, readme: Path | None = None) -> dict[Path, str]:
    """What `write` writes, by file."""
    results = {benchmark: benchmark.read(folder) for benchmark in benchmarks()}
    texts = {
        folder / CSV: _csv(results),
        folder / REPORT: _joined(_long(results, Files(folder, folder))) + "\n",
    }
    if readme is not None:
        section = _joined(_short(results, Files(folder, readme.parent)))
        texts[readme] = replaced(readme, section)
    return texts


def _joined(paragraphs: Iterable[Paragraph]) -> str:
    """Paragraphs as a text; prose is wrapped, tables, lists, headings and pictures are lines of their own."""
    return "\n\n".join(
        str(paragraph)
        if isinstance(paragraph, Table) or paragraph.startswith(("- ", "#", "!"))
        else fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)
        for paragraph in paragraphs
    )


def replaced(readme: Path, section: str) -> str:
    """The text of a file with another section between the marks.

    Raises:
        ConfigError: a mark is not there, or there twice.
    """
    text = readme.read_text(encoding="utf-8")
    for mark in (BEGIN, END):
        if text.count(mark) != 1:
            raise ConfigError(f"--readme: {readme} must have the line {mark} once; it has it {text.count(mark)} times")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ConfigError(f"--readme: {readme} must have the line {END} after {BEGIN}")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def _csv(results: Results) -> str:
    rows = []
    for benchmark, result in results.items():
        if result is not None:
            for row in benchmark.report.rows(result):
                # Whether something holds is a number too.
                value = int(row.value) if isinstance(row.value, bool) else row.value
                rows.append((benchmark.name, *row._replace(value=value)))
    return Table(("benchmark", *Row._fields), rows).csv()


def _goals(results: Results) -> Iterator[tuple[Benchmark, Goal]]:
    for benchmark, result in results.items():
        if result is not None:
            yield from ((benchmark, goal) for goal in benchmark.report.goals(result))
        elif benchmark.required:
            yield benchmark, Goal("every goal", NOT_MEASURED, "", "")


def _goal_table(results: Results) -> Iterator[Paragraph]:
    goals = list(_goals(results))
    verdicts = [goal.verdict for _, goal in goals]
    judged = [verdict for verdict in verdicts if verdict.startswith((MET, "**"))]
    met = [verdict for verdict in judged if verdict.startswith(MET)]
    yield (
        f"{len(met)} of the {len(judged)} goals that were judged are met. In brackets: quartiles; within the spread: "
        "the bound lies between them."
    )
    yield Table(("", *GOAL_HEADINGS), [(benchmark.name, *goal) for benchmark, goal in goals], texts=2)


def _missing(benchmark: Benchmark) -> str:
    return f"Not measured: `{benchmark.file}` is not there, or not finished."


def _outdated(result: Result) -> Iterator[Paragraph]:
    if outdated(result):
        yield "**Measured with earlier weights than those that are bundled today:**"


def _long(results: Results, files: Files) -> Iterator[Paragraph]:
    yield "# Results"
    yield (
        f"Written by `vllm-packcache bench report` from the JSON beside it; [`{CSV}`]({CSV}) has every number, the "
        "JSON the samples too."
    )
    missing = [benchmark.name for benchmark, result in results.items() if result is None and benchmark.required]
    if missing:
        yield f"**Missing: {', '.join(missing)}.**"
    yield "## Goals"
    yield from _goal_table(results)
    for benchmark, result in results.items():
        if result is None and not benchmark.required:
            continue
        yield f"## {benchmark.title}"
        if result is None:
            yield _missing(benchmark)
            continue
        yield from _outdated(result)
        yield from benchmark.section(result, files)


def _short(results: Results, files: Files) -> Iterator[Paragraph]:
    yield (
        f"Generated by `vllm-packcache bench report`. The long form is {files.link(REPORT)}, every number is in "
        f"{files.link(CSV)}. Where both are compared, `packcache` is the rule of the paper, and `changed` the default: "
        f"selection = {PackCache.selection}, window = {PackCache.window}."
    )
    yield from _goal_table(results)
    for benchmark, result in results.items():
        if result is not None:
            yield from _outdated(result)
            yield from benchmark.section(result, files, short=True)
        elif benchmark.required:
            yield f"**{benchmark.title}**: {_missing(benchmark)[0].lower()}{_missing(benchmark)[1:]}"
