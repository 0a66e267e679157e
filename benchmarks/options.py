"""Options that the commands of several benchmarks have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Samples = Annotated[Path | None, typer.Option("--json", help="Write all samples and what is needed to repeat them.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A small geometry: shows that everything works, times say nothing.")
]
