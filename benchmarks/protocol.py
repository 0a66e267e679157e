"""What a benchmark is: it plans, measures, judges and reports. All are run and shown in one way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from benchmarks.report.markdown import Files
from benchmarks.report.parts import GOAL_HEADINGS, Goal, Result, Row, read
from benchmarks.report.table import Paragraph, Table, styled
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import FORMATS, check_format
from vllm_packcache.tools.machine import about

Plan = Any
"""Sizes of everything that is run: a frozen dataclass of the benchmark's own."""

Draw = Callable[[Result, Path], None]
"""Makes a file of a result."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a measurement has at hand besides its plan.

    Args:
        console: where progress goes.
        quick: it is to show that everything works; its times say nothing.
        folder: where the result goes; None: nowhere.
    """

    console: Console
    quick: bool = False
    folder: Path | None = None


class Reporting(Protocol):
    """What is said of a result: a module that has these functions, or a `Report`."""

    @property
    def goals(self) -> Callable[[Result], list[Goal]]:
        """Of a result."""

    @property
    def rows(self) -> Callable[[Result], Iterable[Row]]:
        """Every number of a result."""

    @property
    def long(self) -> Callable[[Result, Files], Iterable[Paragraph]]:
        """Paragraphs of its section in the report, and of what is printed."""

    @property
    def short(self) -> Callable[[Result, Files], Iterable[Paragraph]]:
        """The same for a README: a table, a picture, a few sentences."""


class Report(NamedTuple):
    """See `Reporting`."""

    goals: Callable[[Result], list[Goal]]
    rows: Callable[[Result], Iterable[Row]]
    long: Callable[[Result, Files], Iterable[Paragraph]]
    short: Callable[[Result, Files], Iterable[Paragraph]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Benchmark:
    """A benchmark. Without ``measure`` it is one that something else runs, and that is reported only.

    Args:
        name: what its result calls it.
        title: heading of its section.
        place: in the report, counted from its beginning.
        plan: what is run, by whether it is to be quick.
        measure: runs a plan; its ``machine`` is what it used of the machine.
        judged: what follows from what was measured, by its key in the result; ``targets`` have their bounds.
        report: what is said of a result.
        legend: what is printed after its tables.
        prints: whether its result is printed; not that of one that prints it itself.
        draw: its picture.
        also: other files that are made of the result alone, by name.
        made: files that its measurement leaves, the last things that it does.
        duration: what its result calls the seconds that it took.
        own_file: where its result is if not in the folder of the others.
        required: whether ``bench all`` runs it, and a folder without it lacks something.
        same: whether a result is of the sizes of a plan, and of one that is quick or not.
    """

    name: str
    title: str
    place: int
    report: Reporting
    plan: Callable[[bool], Plan] = lambda quick: None
    measure: Callable[[Any, Session], Mapping[str, Any]] | None = None
    judged: Mapping[str, Callable[[Result], Any]] = field(default_factory=dict)
    legend: str = ""
    prints: bool = True
    draw: Draw | None = None
    also: Mapping[str, Draw] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    duration: str = "seconds"
    own_file: Path | None = None
    required: bool = False
    same: Callable[[Result, Any, bool], bool] = lambda result, plan, quick: True

    @property
    def file(self) -> str:
        """Name of its result in a folder."""
        return f"{files.stem(self.name)}.json"

    @property
    def drawn(self) -> dict[str, Draw]:
        """What is made of the result alone, by name of the file."""
        return ({} if self.draw is None else in_formats(files.stem(self.name), self.draw)) | dict(self.also)

    def read(self, folder: Path) -> Result | None:
        """Its result; None: there is none that is whole."""
        result = read(self.own_file or folder / self.file)
        # What anybody puts into a folder may be something else.
        own = self.own_file is not None or (result is not None and result.get("benchmark") == self.name)
        return result if own else None

    def run(
        self,
        json_path: Path | None,
        plot_path: Path | None = None,
        *,
        plan: Plan = None,
        quick: bool = False,
        console: Console | None = None,
    ) -> dict[str, Any]:
        """Measure, judge, write everything measured to ``json_path`` and a picture to ``plot_path``, and print.

        Args:
            json_path: file for the samples and all that is needed to repeat them; None: they are only printed.
            plot_path: PNG or SVG, by its suffix; None: no picture.
            plan: what is run; None: what is usual.
            quick: small sizes that show that everything works; times say nothing.
            console: where progress and tables go.

        Returns:
            What is written to ``json_path``.

        Raises:
            ConfigError: ``plot_path`` has another suffix.
            EngineFailed: an engine raised or died.
            OSError: a file cannot be written, or a server did not come up or failed.
            KeyboardInterrupt: it was interrupted.
        """
        assert self.measure is not None
        console = console or Console()
        check_format("--plot", plot_path)
        files.claim(json_path, plot_path)
        for path in (json_path, plot_path):
            # Should this be interrupted, nobody is to take an empty file for a result.
            if path is not None and path.is_file() and not is_there(path):
                path.unlink()
        folder = None if json_path is None else json_path.parent
        result: dict[str, Any] = {**about(self.name), "quick": quick}
        machine, start = result["machine"], time.monotonic()
        session = Session(console=console, quick=quick, folder=folder)
        result |= self.measure(self.plan(quick) if plan is None else plan, session)
        result[self.duration] = time.monotonic() - start
        result["machine"] = machine | result["machine"] | {"load_average_after": os.getloadavg()}
        for key, judge in self.judged.items():
            result[key] = judge(result)
        if json_path is not None:
            files.write(json_path, result)
        if plot_path is not None:
            assert self.draw is not None
            self.draw(result, plot_path)
        if self.prints:
            self.print(result, console, Files(folder or Path(), folder or Path()))
        return result

    def run_in(
        self, folder: Path, *, plan: Plan = None, quick: bool = False, console: Console | None = None
    ) -> dict[str, Any]:
        """`run`, with everything that is made of the result, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        result = self.run(folder / self.file, plan=plan, quick=quick, console=console)
        for name, draw in self.drawn.items():
            draw(result, folder / name)
        return result

    def section(self, result: Result, files: Files, *, short: bool = False) -> Iterator[Paragraph]:
        """Paragraphs about a result; those of a quick run begin with the warning that it is one."""
        if result.get("quick"):
            yield "**A quick run: its sizes show that everything works, its numbers say nothing.**"
        yield from (self.report.short if short else self.report.long)(result, files)

    def print(self, result: Result, console: Console, files: Files) -> None:
        """Show the goals of a result and its section of the report, which a terminal has no pictures for."""
        console.print(styled(f"**{self.title}**"))
        if goals := self.report.goals(result):
            Table(GOAL_HEADINGS, goals).print(console)
        for paragraph in self.section(result, files):
            if isinstance(paragraph, Table):
                paragraph.print(console)
            elif not paragraph.startswith("!"):
                console.print(styled(paragraph), end="\n\n")
        if self.legend:
            console.print(self.legend)


def in_formats(stem: str, draw: Draw) -> dict[str, Draw]:
    """A picture in every format, by name of the file."""
    return {f"{stem}{suffix}": draw for suffix in FORMATS}


def is_there(path: Path) -> bool:
    """Whether a file has been written; an empty one only keeps the place."""
    return path.is_file() and path.stat().st_size > 0
