"""The bundled masked model, loaded once."""

from __future__ import annotations

import pytest

from benchmarks.training.masked_bundle import load_bundle
from benchmarks.training.masked_model import Lumos


@pytest.fixture(scope="session")
def loaded() -> Lumos:
    """The bundled masked model as it is trained."""
    return load_bundle()
