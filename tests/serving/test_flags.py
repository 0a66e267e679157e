"""What a command line says reaches every process, and what is wrong with it ends the command with one sentence."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.hooks import startup as plugin

POLICY = ("--kv-cache-policy", "packcache")
CONFIG = {"window": 3, "layout": {"grid": [4, 8]}}
BOTH = {"kv_cache_policy": "packcache", "kv_cache_policy_config": CONFIG}


@pytest.fixture(scope="module")
def parser() -> Any:
    """The parser of a command with a subcommand, like vLLM's."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    command = FlexibleArgumentParser(prog="command")
    AsyncEngineArgs.add_cli_args(command.add_subparsers(dest="subparser").add_parser("run"))
    return command


@pytest.fixture
def parse(parser: Any, checkpoint: Path) -> Callable[..., argparse.Namespace]:
    return lambda *flags: parser.parse_args(["run", "--model", str(checkpoint), *flags])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written = tmp_path / "policy.yaml"
    written.write_text("window: 3\nlayout: {grid: [4, 8]}\n")
    return written


def test_flags_are_in_additional_config_once_they_are_parsed(
    parse: Callable[..., argparse.Namespace], file: Path
) -> None:
    for text in (str(file), json.dumps(CONFIG)):
        assert parse(*POLICY, "--kv-cache-policy-config", text).additional_config == BOTH
    assert parse("--kv_cache_policy=packcache", "--kv-cache-policy-c", str(file)).additional_config == BOTH
    assert parse(*POLICY, "--kv-cache-policy-config.window", "3").additional_config == {
        "kv_cache_policy": "packcache",
        "kv_cache_policy_config": {"window": 3},
    }
    assert parse("--additional-config", json.dumps(BOTH)).additional_config == BOTH
    assert parse().additional_config == {}


def test_they_lie_beside_what_additional_config_says_in_any_order(
    parse: Callable[..., argparse.Namespace], file: Path
) -> None:
    other = ("--additional-config", '{"other": 1, "kv_cache_policy": null}')
    config = ("--kv-cache-policy-config", str(file))
    same = ("--additional-config", json.dumps({"kv_cache_policy": "packcache", "kv_cache_policy_config": str(file)}))
    for flags in ((*other, *POLICY, *config), (*POLICY, *other, *config), (*config, *POLICY, *other)):
        assert parse(*flags).additional_config == {"other": 1, **BOTH}
    for flags in ((*same, *POLICY), (*config, *same), (*config, *POLICY, *same)):
        assert parse(*flags).additional_config == BOTH
    # vLLM's own rule: what is given last.
    assert parse(*other, *POLICY, "--additional-config", "{}").additional_config == {"kv_cache_policy": "packcache"}


def test_a_file_of_options_says_what_flags_say(parse: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    options = tmp_path / "serve.yaml"
    options.write_text(
        "kv-cache-policy: packcache\nkv_cache_policy_config: {window: 3, layout: {grid: [4, 8]}}\n"
        "additional-config: {other: 1}\n"
    )
    assert parse("--config", str(options)).additional_config == {"other": 1, **BOTH}
    # The command line comes after the file.
    changed = parse("--config", str(options), "--kv-cache-policy", "sliding_window").additional_config
    assert changed == {"other": 1, **BOTH, "kv_cache_policy": "sliding_window"}


@pytest.mark.parametrize("policy", ["sliding_window", "attention_sink", "full"])
def test_another_policy_takes_a_presets_layout_alone_whichever_way_it_is_said(
    parse: Callable[..., argparse.Namespace], policy: str, tmp_path: Path
) -> None:
    keys = {"kv_cache_policy": policy, "kv_cache_policy_config": "demo"}
    options = tmp_path / "serve.yaml"
    options.write_text(json.dumps({key.replace("_", "-"): value for key, value in keys.items()}))
    expected = ServerConfig.parse(policy, {"layout": "demo"})
    for told in (
        keys,
        parse("--kv-cache-policy", policy, "--kv-cache-policy-config", "demo").additional_config,
        parse("--additional-config", json.dumps(keys)).additional_config,
        parse("--config", str(options)).additional_config,
    ):
        assert ServerConfig.from_additional_config(told) == expected


def test_secrets_are_not_in_the_log_that_vllm_writes_of_a_command_line(
    parse: Callable[..., argparse.Namespace],
) -> None:
    secret = "whsec_" + "A" * 32
    videos = {"webhooks": [{"url": "https://a/b", "secret": secret}]}
    arguments = parse(*POLICY, "--kv-cache-policy-config", json.dumps({**CONFIG, "videos": videos}))
    # Of every argument it writes what is printed of it here.
    logged = str(vars(arguments))
    assert "https://a/b" in logged
    assert secret not in logged
    config = ServerConfig.from_additional_config(pickle.loads(pickle.dumps(arguments)).additional_config)
    assert config is not None
    assert config.videos.webhooks[0].secret.get_secret_value() == secret


def test_every_process_that_gets_the_arguments_has_them(parse: Callable[..., argparse.Namespace], file: Path) -> None:
    """API servers are spawned with the parsed arguments, and have no plugin yet when they read them."""
    arguments = parse(*POLICY, "--kv-cache-policy-config", str(file))
    del arguments.subparser
    file.unlink()
    read = (
        "import pickle, sys\n"
        "arguments = pickle.load(sys.stdin.buffer)\n"
        "assert 'vllm' not in sys.modules\n"
        "print(dict(arguments.additional_config))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", read],
        input=pickle.dumps(argparse.Namespace(additional_config=arguments.additional_config)),
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert told.stdout.decode().strip() == str(BOTH)


@pytest.mark.parametrize(
    "makes_parser",
    [
        "vllm.entrypoints.launchers.cli_args:make_arg_parser",
        "vllm.entrypoints.launchers.run_batch:make_arg_parser",
        "vllm.benchmarks.latency:add_cli_args",
        "vllm.benchmarks.throughput:add_cli_args",
        "vllm.benchmarks.startup:add_cli_args",
    ],
)
def test_every_command_makes_its_engine_of_them(makes_parser: str, checkpoint: Path, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    parser = FlexibleArgumentParser()
    parser = resolve_name(makes_parser)(parser) or parser
    files = ["-i", "in", "-o", "out"] if "run_batch" in makes_parser else []
    options = tmp_path / "options.yaml"
    options.write_text(f"kv-cache-policy-config: {json.dumps(CONFIG)}\n")
    arguments = parser.parse_args(["--model", str(checkpoint), *files, *POLICY, "--config", str(options)])
    assert AsyncEngineArgs.from_cli_args(arguments).additional_config == BOTH


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--kv-cache-policy", "nope"), "argument --kv-cache-policy: invalid choice: 'nope'"),
        (("--kv-cache-policy-config", "nowhere.yaml"), "neither a file nor a preset"),
        (("--kv-cache-policy-config", "{"), "is not valid JSON"),
        (("--additional-config", '{"kv_cache_policy_config": "nowhere"}'), "neither a file nor a preset"),
        (("--additional-config", "[1]"), "argument --additional-config: must be a JSON object"),
        (
            (*POLICY, "--additional-config", '{"kv_cache_policy": "full"}'),
            "--additional-config has another kv_cache_policy than --kv-cache-policy: leave one of them out",
        ),
        (
            ("--additional-config", json.dumps(BOTH), "--kv-cache-policy-config", "{}"),
            "has another kv_cache_policy_config than --kv-cache-policy-config: leave one of them out",
        ),
    ],
)
def test_bad_flags(
    parse: Callable[..., argparse.Namespace], flags: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*flags)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("command run: error: ")
    assert sentence in line


def engine_config(arguments: argparse.Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments.skip_tokenizer_init = True
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((*POLICY, "--kv-cache-policy-config", '{"window": 0}'), "kv_cache_policy_config: window must be 1 or more"),
        (("--kv-cache-policy-config", '{"window": 3}'), "kv_cache_policy_config is given without kv_cache_policy"),
        (("--additional-config", '{"kv_cache_policy": "nope"}'), "kv_cache_policy: unknown policy 'nope'"),
        ((*POLICY, "--kv-cache-dtype", "nvfp4"), "--kv-cache-policy-config: positions: rebase turns cached keys"),
        ((*POLICY, "--kv-cache-policy-config", "lumos1_256p"), "--kv-cache-policy-config: layout: axis_scale is for"),
    ],
)
def test_what_cannot_be_right_ends_the_command_before_anything_loads(
    parse: Callable[..., argparse.Namespace], flags: tuple[str, ...], sentence: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = parse(*flags)
    with pytest.raises(SystemExit) as ended:
        engine_config(arguments)
    assert str(ended.value.code).startswith(f"error: {sentence}")
    assert "\n" not in str(ended.value.code)
    # The same from Python.
    with pytest.raises(ConfigError):
        EngineArgs(
            model=arguments.model,
            skip_tokenizer_init=True,
            kv_cache_dtype=arguments.kv_cache_dtype,
            additional_config=dict(arguments.additional_config),
        ).create_engine_config()


def test_a_command_without_a_policy_is_vllms_own(parse: Callable[..., argparse.Namespace]) -> None:
    assert type(engine_config(parse()).additional_config) is dict
    given = engine_config(parse("--additional-config", '{"other": 1}')).additional_config
    assert type(given) is dict
    assert given == {"other": 1}
    on = engine_config(parse(*POLICY)).additional_config
    assert type(on) is dict
    assert on == {"kv_cache_policy": "packcache", "kv_cache_position_limit": 8192}
