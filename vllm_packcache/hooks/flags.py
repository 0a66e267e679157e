"""The flags, and what a command line says with them: ``additional_config``, which vLLM carries to every process."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import CONFIG_FLAG, POLICY_FLAG, POLICY_KEY, REQUEST_PREFIX
from vllm_packcache.config.sources import CONFIG_KEY, load_mapping
from vllm_packcache.config.videos import SECRET_KEY, STORE_FLAG, STORE_KEY, TOKENIZER_FLAG, TOKENIZER_KEY
from vllm_packcache.core import policies
from vllm_packcache.hooks import install as hooks

_ADDITIONAL_FLAG = "--additional-config"

logger = logging.getLogger("vllm.packcache")


class CommandLine(dict[str, Any]):
    """``additional_config`` as a command line gives it: with what our flags say.

    What is wrong with it ends that command with a sentence; from Python the same is a `ConfigError`.

    Args:
        given: what ``--additional-config`` says.
        flags: what our flags say, by the key that each stands for.

    Raises:
        ConfigError: they contradict each other, or a configuration cannot be read.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None) -> None:
        self.given = dict(given or {})
        self.flags = dict(flags or {})
        if isinstance(self.given.get(CONFIG_KEY), str):
            # Every process reads it: they get what a file says now, not what it says by then.
            self.given[CONFIG_KEY] = dict(load_mapping(self.given[CONFIG_KEY]))
        for key, value in self.flags.items():
            if self.given.get(key) not in (None, value):
                raise ConfigError(f"{_ADDITIONAL_FLAG} has another {key} than {_flag_of(key)}: leave one of them out")
        super().__init__({**self.given, **self.flags})

    def __repr__(self) -> str:
        # vLLM logs what a command line says.
        return repr(_without_secrets(dict(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return CommandLine, (self.given, self.flags)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: "***" if key == SECRET_KEY else _without_secrets(own) for key, own in value.items()}
    return [_without_secrets(own) for own in value] if isinstance(value, list | tuple) else value


_FLAGS = {
    POLICY_KEY: POLICY_FLAG,
    CONFIG_KEY: CONFIG_FLAG,
    STORE_KEY: STORE_FLAG,
    TOKENIZER_KEY: TOKENIZER_FLAG,
}
"""By the key of ``additional_config`` that each stands for."""


def _flag_of(key: str) -> str:
    return _FLAGS[key]


class _KeepFlag(argparse.Action):
    """Keeps a flag of ours in ``additional_config``.

    Engine arguments are made of a parsed command line in many places, some of them in processes that have no plugin
    yet, and always of the fields that vLLM knows.
    """

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if (error := hooks.fault()) is not None:
            raise argparse.ArgumentError(self, error)
        known = getattr(namespace, self.dest, None)
        if not isinstance(known, CommandLine):
            known = CommandLine(known)
        key = next(key for key, flag in _FLAGS.items() if flag in self.option_strings)
        if known.flags.get(key, values) != values:
            logger.warning("%s is given more than once: the last one counts", _flag_of(key))
        self._keep(namespace, known.given, {**known.flags, key: values})

    def _keep(self, namespace: argparse.Namespace, given: Any, flags: dict[str, Any]) -> None:
        try:
            setattr(namespace, self.dest, CommandLine(given, flags))
        except ConfigError as error:
            raise argparse.ArgumentError(self, str(error)) from None


class _KeepGiven(_KeepFlag):
    """Keeps ``--additional-config`` beside our flags, whichever comes first."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if not isinstance(values, Mapping):
            raise argparse.ArgumentError(self, "must be a JSON object")
        known = getattr(namespace, self.dest, None)
        self._keep(namespace, values, known.flags if isinstance(known, CommandLine) else {})


def add_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.add_cli_args`` to add our flags."""

    @wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
        parser = add_cli_args(parser)
        given = parser._option_string_actions.get(_ADDITIONAL_FLAG)
        if given is not None:
            given.__class__, given.default = _KeepGiven, CommandLine()
        group = parser.add_argument_group(
            title="PackCache",
            # Plain `vllm serve --help` shows only this of a group.
            description=f"{', '.join(_FLAGS.values())}: KV cache policy for autoregressive video models, and videos "
            "over HTTP (vllm-packcache).",
        )
        kept: dict[str, Any] = {"action": _KeepFlag, "dest": "additional_config", "default": argparse.SUPPRESS}
        group.add_argument(
            POLICY_FLAG,
            choices=policies.names(),
            help="Which KV-cache blocks of a video request to keep. Video requests say so themselves, with options "
            f"such as {REQUEST_PREFIX}grid in vllm_xargs; others keep their whole cache.",
            **kept,
        )
        group.add_argument(
            CONFIG_FLAG,
            type=_config_argument,
            metavar="FILE|JSON|PRESET",
            help="Options of the policy and layout of a frame: a YAML or JSON file, JSON text, or the name of a "
            "preset.",
            **kept,
        )
        group.add_argument(
            STORE_FLAG,
            type=_store_argument,
            metavar="FOLDER",
            help="Make videos over HTTP (/v1/videos, and a page at /playground) and keep them in this folder.",
            **kept,
        )
        group.add_argument(
            TOKENIZER_FLAG,
            type=_text_argument,
            metavar="NAME|FOLDER|MODULE:OBJECT",
            help="What makes token ids of a prompt and a picture, and pictures of ids: demo, demo_masked, a folder "
            "with tokenizer.json, encoder.jit and decoder.jit, or module:object. Without it, or with ids, videos are "
            "token ids.",
            **kept,
        )
        return parser

    return wrapper


def _store_argument(text: str) -> str:
    # Every process of a server must find it, wherever it is started.
    return os.path.abspath(_text_argument(text))


def _text_argument(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be a text that is not empty")
    return text


def _config_argument(text: str) -> dict[str, Any]:
    try:
        return dict(load_mapping(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
