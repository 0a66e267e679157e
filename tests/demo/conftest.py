"""The bundled masked model, loaded once."""

from __future__ import annotations

import pytest

from benchmarks.training.masked_evaluate import FusedLumos
from vllm_packcache.demo.masked.bundle import write_checkpoint


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> FusedLumos:
    """The bundled masked model as the reference computes it."""
    model = FusedLumos.load(write_checkpoint(tmp_path_factory.mktemp("masked")))
    assert isinstance(model, FusedLumos)
    return model
