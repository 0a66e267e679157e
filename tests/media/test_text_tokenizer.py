"""The tokenizer of text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.media.tokenizer_files import write_text_tokenizer
from vllm_packcache.families import lumos
from vllm_packcache.media.text_tokenizer import TextTokenizer


def test_a_question_has_its_ids_and_no_begin(tmp_path: Path) -> None:
    write_text_tokenizer(tmp_path)
    question = lumos.question("a fox, très vite", 64, 32, 3, 8)
    ids = TextTokenizer(tmp_path).encode(question)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(question).ids == [lumos.BOS, *ids]
    assert library.decode(ids) != ""
    assert TextTokenizer(tmp_path / "tokenizer.json").encode(question) == ids


@pytest.mark.parametrize(("token", "id"), [("<video>", lumos.VIDEO_BEGIN), ("<code>", lumos.VISUAL_BEGIN)])
def test_a_text_cannot_hold_what_begins_or_is_a_picture(token: str, id: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{id} of '{token}'"):
        TextTokenizer(write_text_tokenizer(tmp_path)).encode(f"a {token} b")


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="is no Hugging Face tokenizer"):
        TextTokenizer(tmp_path)
