"""Families are found by architecture, also those of other packages, which are in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import packages
from vllm_packcache import families
from vllm_packcache.families import DECODER, LUMOS
from vllm_packcache.families.lumos import ARCHITECTURES

ANOTHER_PACKAGE = '''
from vllm_packcache.families import Family
from vllm_packcache.families.decoder import Decoder


class Grid(Decoder):
    """A causal family with a model of its own."""

    name = "grid"
    architectures = ("GridForCausalLM", "ChameleonXLLMXForConditionalGeneration")
    model = "grid_model:Grid"


class Unnamed(Decoder):
    name = "unnamed"


class Unfinished(Family):
    name = "unfinished"
    architectures = ("Unfinished",)


class NoFamily:
    pass
'''

ENTRIES = {
    "GridForCausalLM": "other_families:Grid",
    "Gone": "no_such_module:Gone",
    "NoFamily": "other_families:NoFamily",
    "Unnamed": "other_families:Unnamed",
    "Unfinished": "other_families:Unfinished",
    "ChameleonXLLMXForConditionalGeneration": "other_families:Grid",
}

SAID = {
    "Gone": "the family of 'Gone' of package other-families cannot be loaded (ModuleNotFoundError: No module named "
    "'no_such_module'): mend or uninstall the package",
    "NoFamily": "the family of 'NoFamily' of package other-families must be a class that derives from "
    "vllm_packcache.families.Family, and other_families:NoFamily is none: mend or uninstall the package",
    "Unnamed": "the family of 'Unnamed' of package other-families does not name it in architectures: mend or uninstall "
    "the package",
    "Unfinished": "the family of 'Unfinished' of package other-families is not complete (Can't instantiate abstract "
    "class Unfinished with abstract method request): mend or uninstall the package",
    "ChameleonXLLMXForConditionalGeneration": "architecture 'ChameleonXLLMXForConditionalGeneration' is claimed by "
    "other_families:Grid and by vllm_packcache.families.lumos:Lumos: uninstall all packages but one",
}
"""What who serves such a model is told."""


def python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    modules = {"other_families.py": ANOTHER_PACKAGE}
    return packages.install(tmp_path, "other-families", modules, {"vllm_packcache.families": ENTRIES})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lumos_is_found_by_either_name(architecture: str) -> None:
    assert families.of([architecture]) == LUMOS
    assert (LUMOS.role, LUMOS.streams) == ("canvas", 2)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["Unheard", "Of"]])
def test_every_other_model_is_a_decoder(architectures: list[str] | None) -> None:
    assert families.of(architectures) == DECODER
    assert (DECODER.role, DECODER.streams, DECODER.model) == ("causal", 1, None)


def test_a_family_of_another_package_is_found_by_its_architecture(installed: Path) -> None:
    result = python(
        "import sys\n"
        "from vllm_packcache import families\n"
        "print(families.of(['LlamaForCausalLM']), 'other_families' in sys.modules)\n"
        "found = families.of(['GridForCausalLM'])\n"
        "print(found.name, families.of(['GridForCausalLM']) is found)\n",
        installed,
    )
    assert result.stdout.splitlines() == ["Decoder() False", "grid True"], result.stderr


def test_what_cannot_be_used_is_said_to_who_serves_it_and_logged_to_others(installed: Path) -> None:
    result = python(
        "import logging\n"
        "from types import SimpleNamespace\n"
        "from vllm_packcache import families\n"
        "from vllm_packcache.config.errors import ConfigError\n"
        "from vllm_packcache.config.server import family_of, read_config\n"
        "from vllm_packcache.families import DECODER\n"
        f"for name in {list(SAID)}:\n"
        "    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[name]))\n"
        "    stock = SimpleNamespace(model_config=model, additional_config={})\n"
        "    assert (family_of(model), read_config(stock)) == (DECODER, None)\n"
        "    try:\n"
        "        read_config(SimpleNamespace(model_config=model, additional_config={'kv_cache_policy': 'packcache'}))\n"
        "    except ConfigError as error:\n"
        "        print(str(error).replace(\"method 'request'\", 'method request'))\n"
        "logged = []\n"
        "families.logger.warning = lambda message, *args: logged.append(message % args)\n"
        "print(dict(families.with_models()))\n"
        "print(len(logged))\n",
        installed,
    )
    lines = result.stdout.splitlines()
    said = [line.replace(" without an implementation for", " with") for line in lines[: len(SAID)]]
    assert said == list(SAID.values()), result.stderr
    assert lines[-2] == (
        "{'ChameleonMMRoPEForConditionalGeneration': Lumos(), 'Emu3ForCausalLM': Emu3(), 'Emu3MoE': Emu3(), "
        "'GridForCausalLM': Grid()}"
    )
    assert lines[-1] == str(len(SAID))
