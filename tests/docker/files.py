"""The files of docker/, read."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
DOCKERFILES = (ROOT / "docker" / "Dockerfile", ROOT / "docker" / "cpu" / "Dockerfile")
ENV_FILES = (ROOT / "configs" / "a40.env", ROOT / "configs" / "h200.env")


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str] | None:
        """The command in exec form; None: it is in shell form."""
        _, bracket, rest = self.text.partition("[")
        return json.loads(bracket + rest) if bracket else None


def instructions(dockerfile: Path) -> list[Instruction]:
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line]


def named(dockerfile: Path, name: str) -> list[Instruction]:
    """The instructions of a Dockerfile with this name, in order."""
    return [instruction for instruction in instructions(dockerfile) if instruction.name == name]


def videos_folder(dockerfile: Path) -> str:
    """The folder for videos, which is made with the owner that Docker gives a volume mounted there."""
    (made,) = [run.text.split() for run in named(dockerfile, "RUN") if run.text.startswith("install ")]
    user, group = named(dockerfile, "USER")[0].text.split(":")
    *options, folder = made[1:]
    assert set(options) == {"--directory", f"--owner={user}", f"--group={group}", "--mode=0770"}
    return folder


def environment(env_file: Path) -> dict[str, str]:
    lines = [line for line in env_file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)  # type: ignore[arg-type]


def parse_exactly(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse the arguments of ``vllm serve``; flags may not be abbreviated, as argparse would let them be."""
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert flags <= set(parser._option_string_actions), flags
    return parser.parse_args(list(words))
