"""How a measurement is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_packcache.tools import files


def test_numbers_in_a_row_are_a_line(tmp_path: Path) -> None:
    result = {"samples": [0.5, 2, -3e-9], "rounds": [{"times": [1, 2]}, {"times": []}], "text": "[1, 2]", "none": None}
    files.write(tmp_path / "result.json", result)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == result
    assert '"samples": [ 0.5, 2, -3e-09 ]' in text
    assert text.endswith("}\n")


def test_what_cannot_be_written_is_known_before_it_is_measured(tmp_path: Path) -> None:
    files.claim(None, tmp_path / "new" / "result.json")
    assert (tmp_path / "new" / "result.json").exists()
    with pytest.raises(FileExistsError):
        files.claim(tmp_path / "new" / "result.json" / "result.json")
