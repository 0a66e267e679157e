"""What several tests of docker/ need."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest


@pytest.fixture(scope="session")
def serve_parser() -> ArgumentParser:
    """The parser of ``vllm serve`` with the plugin's flags."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_packcache.hooks import startup as plugin

    plugin.register()
    return make_arg_parser(FlexibleArgumentParser())
