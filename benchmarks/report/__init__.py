"""The report of all benchmarks: from the JSON of a folder to a CSV, Markdown, and the results section of a README.

Nothing is measured here. The same JSON gives the same text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import fill

from benchmarks.report import calibrate, decode, gpu, long_video, masked, model, overhead, quality, serve
from benchmarks.report.markdown import Files, table
from benchmarks.report.parts import MET, NOT_MEASURED, Goal, Part, Result, Row
from vllm_packcache.config.errors import ConfigError

PARTS = (
    *(module.PART for module in (decode, serve, masked, quality)),
    quality.MASKED,
    calibrate.PART,
    calibrate.MASKED,
    *(module.PART for module in (long_video, overhead, model, gpu)),
)
"""In the order of the report."""

CSV, REPORT = "results.csv", "report.md"

WIDTH = 120

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""What stands between them in a README is generated."""


def write(folder: Path, readme: Path | None = None) -> list[Path]:
    """Write the CSV and the report of a folder, and the results section of a README.

    Args:
        folder: with the JSON of benchmarks, see `PARTS`.
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
    own = [part for part in PARTS if part.own_file is None]
    if not any(part.read(folder) for part in own):
        names = ", ".join(part.file for part in own)
        raise ConfigError(f"FOLDER: {folder} has no results: none of {names}; see vllm-packcache bench all")
    return write(folder, readme)


def texts(folder: Path, readme: Path | None = None) -> dict[Path, str]:
    """What `write` writes, by file."""
    results = {part: part.read(folder) for part in PARTS}
    texts = {
        folder / CSV: _csv(results),
        folder / REPORT: _joined(_long(results, Files(folder, folder))) + "\n",
    }
    if readme is not None:
        section = _joined(_short(results, Files(folder, readme.parent)))
        texts[readme] = replaced(readme, section)
    return texts


def _joined(paragraphs: Iterable[str]) -> str:
    """Paragraphs as a text; prose is wrapped, tables, lists, headings and pictures are lines of their own."""
    return "\n\n".join(
        paragraph
        if paragraph.startswith(("| ", "- ", "#", "!"))
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


def _csv(results: Mapping[Part, Result | None]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["benchmark", *Row._fields])
    for part, result in results.items():
        if result is not None:
            for row in part.rows(result):
                # Whether something holds is a number too.
                value = int(row.value) if isinstance(row.value, bool) else row.value
                writer.writerow([part.benchmark, *row._replace(value=value)])
    return file.getvalue()


def _goals(results: Mapping[Part, Result | None]) -> Iterator[tuple[Part, Goal]]:
    for part, result in results.items():
        if result is not None:
            yield from ((part, goal) for goal in part.goals(result))
        elif part.required:
            yield part, Goal("every goal", NOT_MEASURED, "", "")


def _goal_table(results: Mapping[Part, Result | None]) -> Iterator[str]:
    goals = list(_goals(results))
    verdicts = [goal.verdict for _, goal in goals]
    judged = [verdict for verdict in verdicts if verdict.startswith((MET, "**"))]
    met = [verdict for verdict in judged if verdict.startswith(MET)]
    yield (
        f"{len(met)} of the {len(judged)} goals that were judged are met. In brackets: quartiles; within the spread: "
        "the bound lies between them."
    )
    yield table(
        ("", "goal", "measured", "aim", "verdict"),
        [(part.benchmark, *goal) for part, goal in goals],
        texts=2,
    )


def _missing(part: Part) -> str:
    return f"Not measured: `{part.file}` is not there, or not finished."


def _quick(result: Result) -> Iterator[str]:
    if result.get("quick"):
        yield "**A quick run: its sizes show that everything works, its numbers say nothing.**"


def _long(results: Mapping[Part, Result | None], files: Files) -> Iterator[str]:
    yield "# Results"
    yield (
        f"Written by `vllm-packcache bench report` from the JSON beside it; [`{CSV}`]({CSV}) has every number, the "
        "JSON the samples too."
    )
    missing = [part.benchmark for part, result in results.items() if result is None and part.required]
    if missing:
        yield f"**Missing: {', '.join(missing)}.**"
    yield "## Goals"
    yield from _goal_table(results)
    for part, result in results.items():
        if result is None and not part.required:
            continue
        yield f"## {part.title}"
        if result is None:
            yield _missing(part)
            continue
        yield from _quick(result)
        yield from part.long(result, files)


def _short(results: Mapping[Part, Result | None], files: Files) -> Iterator[str]:
    yield (
        f"Generated by `vllm-packcache bench report`. The long form is {files.link(REPORT)}, every number is in "
        f"{files.link(CSV)}."
    )
    yield from _goal_table(results)
    for part, result in results.items():
        if result is not None:
            yield from _quick(result)
            yield from part.short(result, files)
        elif part.required:
            yield f"**{part.title}**: {_missing(part)[0].lower()}{_missing(part)[1:]}"
