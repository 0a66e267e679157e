"""A hook that has moved: nothing is installed but what refuses a policy, and stock servers do not notice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from vllm_packcache.hooks import install as hooks
from vllm_packcache.hooks.install import HookError
from vllm_packcache.hooks.table import Hook

# --------------------------------------------------------------------------- all or none


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for a module of vLLM's, with what the contract says of it."""
    made = ModuleType("vllm.stand_in")
    source = """
class Owner:
    def method(self, one):
        return one

    @staticmethod
    def static(one, two=2):
        return one, two

def function(one, **others):
    return one

number = 4
builtin = min

class Immutable(type):
    def __setattr__(self, name, value):
        raise TypeError("immutable")

class Frozen(metaclass=Immutable):
    def method(self, one, two):
        return one
"""
    exec(source, vars(made))
    monkeypatch.setitem(sys.modules, "vllm.stand_in", made)
    return made


TAKES = {"Owner.method": "(self, one)", "Owner.static": "(one, ...)"}


def hook(symbol: str, wrapper: str = "tests.hooks.test_install:doubled") -> Hook:
    return Hook("vllm.stand_in", symbol + TAKES.get(symbol, "(one, two, ...)"), "a test", wrapper=wrapper)


def doubled(function):
    return lambda *args: (function(*args), function(*args))


GOOD = [hook("Owner.method"), hook("Owner.static"), hook("function")]


def test_all_are_put_in_place_once(module: ModuleType) -> None:
    hooks.install(GOOD)
    hooks.install(GOOD)
    assert module.Owner().method(1) == (1, 1)
    assert module.Owner.static(1) == ((1, 2), (1, 2))
    assert module.Owner().static(1) == ((1, 2), (1, 2))
    # Of another plugin's wrapper nobody knows what it takes: it passes on what it is given.
    assert module.function(1) == (1, 1)


@pytest.mark.parametrize(
    ("bad", "change", "sentence"),
    [
        (hook("gone"), "", "vllm.stand_in: gone is gone (KeyError: 'gone')"),
        (hook("number"), "", "vllm.stand_in: number is no function"),
        (hook("Owner.method"), "def method(self, one, new=0): pass", "Owner.method takes more than it did: new"),
        (hook("Owner.static"), "def static(another): pass", "Owner.static no longer takes one"),
        (
            hook("Owner.method", "no.such:wrapper"),
            "",
            "no.such cannot be imported (ModuleNotFoundError: No module named",
        ),
        (hook("Owner.method", "tests.hooks.test_install:none"), "", "tests.hooks.test_install cannot be imported"),
        (hook("Owner.method", "builtins:int"), "", "Owner.method cannot be wrapped (TypeError"),
        (hook("builtin"), "", "builtin does not say what it takes (ValueError"),
    ],
    ids=lambda value: value.symbol if isinstance(value, Hook) else "",
)
def test_where_one_cannot_be_none_is(module: ModuleType, bad: Hook, change: str, sentence: str) -> None:
    exec(change, found := {})
    for name in ("method", "static"):
        if name in found:
            setattr(module.Owner, name, found[name])
    before = dict(vars(module.Owner)), dict(vars(module))
    registered = []
    others = [good for good in GOOD if good.symbol != bad.symbol]
    with pytest.raises(HookError) as moved:
        hooks.install([*others, bad], lambda: registered.append(True))
    assert sentence in str(moved.value)
    assert (dict(vars(module.Owner)), dict(vars(module))) == before
    assert not registered


def test_where_registering_fails_none_is(module: ModuleType) -> None:
    def register() -> None:
        raise ImportError("cannot import name 'Moved'")

    with pytest.raises(HookError, match="ImportError: cannot import name 'Moved'"):
        hooks.install(GOOD, register)
    assert module.Owner().method(1) == 1


def test_where_a_class_refuses_to_be_changed_the_others_are_as_before(module: ModuleType) -> None:
    before = dict(vars(module.Owner)), dict(vars(module))
    with pytest.raises(HookError, match=r"method cannot be replaced \(TypeError: immutable\)"):
        hooks.install([*GOOD, hook("Frozen.method")])
    assert (dict(vars(module.Owner)), dict(vars(module))) == before


@pytest.mark.parametrize("gone", range(2))
def test_the_command_line_refuses_with_what_is_left(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    command_line = [hook("Owner.method"), hook("Owner.static")]
    command_line[gone] = hook("gone")
    monkeypatch.setattr(hooks, "COMMAND_LINE", command_line)
    monkeypatch.setattr(hooks, "ENGINE", [hook("function")])
    monkeypatch.setattr(hooks, "_moved", None)
    logged: list[str] = []
    monkeypatch.setattr(hooks.logger, "warning", lambda message, *args: logged.append(message % args))
    hooks.install_all(lambda: None)
    assert module.function(1) == 1
    assert hooks.installed() == [f"vllm.stand_in.{command_line[1 - gone].symbol}"]
    sentence = hooks.fault()
    assert sentence is not None
    assert sentence.startswith("vllm-packcache does not fit this build of vLLM (vllm.stand_in: gone is gone")
    assert logged == [sentence]


def test_what_is_of_another_version_is_left_alone(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, function = replace(hook("gone"), until="0.1"), replace(hook("function"), since="0.1")
    monkeypatch.setattr(hooks, "COMMAND_LINE", [gone])
    monkeypatch.setattr(hooks, "ENGINE", [gone, function])
    hooks.install_all(lambda: None)
    assert hooks.fault() is None
    assert hooks.installed() == ["vllm.stand_in.function"]


@pytest.mark.parametrize(
    ("version", "metadata", "sentence"),
    [
        ("dev", ["vllm>=0.32"], "vllm-packcache does not support vLLM dev: install vllm>=0.32"),
        ("0.32.0", [], "vllm-packcache is not installed properly, its metadata names no vllm: install it again"),
    ],
)
def test_a_version_that_cannot_be_read_takes_no_server_down(
    monkeypatch: pytest.MonkeyPatch, version: str, metadata: list[str], sentence: str
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr(hooks, "requires", lambda name: metadata)
    monkeypatch.setattr(hooks, "COMMAND_LINE", [])
    monkeypatch.setattr(hooks, "ENGINE", [hook("gone")])
    hooks.version_error.cache_clear()
    try:
        hooks.install_all(lambda: None)
        assert (hooks.fault() or "").startswith(sentence)
    finally:
        hooks.version_error.cache_clear()


# --------------------------------------------------------------------------- vLLM itself

MOVED = """
import argparse, json, sys
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

del GPUModelRunner._preprocess
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_packcache.hooks import install as hooks
from vllm_packcache.config.errors import ConfigError

load_general_plugins()
llama, lumos = sys.argv[1:]
outcome = {"installed": hooks.installed()}


def config(model, additional):
    return EngineArgs(model=model, skip_tokenizer_init=True, additional_config=additional).create_engine_config()


outcome["stock"] = config(llama, {}).additional_config
for name, model, additional in (("policy", llama, {"kv_cache_policy": "packcache"}), ("masked", lumos, {})):
    try:
        config(model, additional)
    except ConfigError as error:
        outcome[name] = str(error)
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
outcome["parsed"] = parser.parse_args(["--model", llama]).additional_config
print(json.dumps(outcome))
parser.parse_args(["--model", llama, "--kv-cache-policy", "packcache"])
"""


def test_a_method_that_vllm_has_renamed(checkpoint: Path, tmp_path: Path) -> None:
    config = {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "model_type": "chameleon"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = subprocess.run(
        [sys.executable, "-c", MOVED, str(checkpoint), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    outcome = json.loads(ended.stdout.splitlines()[-1])
    assert outcome["installed"] == [f"{hook.module}.{hook.symbol}" for hook in hooks.COMMAND_LINE]
    assert outcome["stock"] == outcome["parsed"] == {}
    sentence = (
        "vllm-packcache does not fit this build of vLLM (vllm.v1.worker.gpu_model_runner: GPUModelRunner._preprocess "
        "is gone (KeyError: '_preprocess')): run `vllm-packcache doctor`"
    )
    assert outcome["policy"].startswith(sentence)
    assert outcome["masked"] == outcome["policy"]
    assert ended.returncode == 2
    assert f"error: argument --kv-cache-policy: {outcome['policy']}" in ended.stderr
