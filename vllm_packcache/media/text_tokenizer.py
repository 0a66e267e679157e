"""Text as a model reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from vllm_packcache.families import lumos


class TextTokenizer:
    """A Hugging Face tokenizer.

    Args:
        path: a folder with ``tokenizer.json``, or such a file.
        is_text: whether an id may stand in a text of the model: `lumos.is_text`, or another family's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no tokenizer.
    """

    def __init__(self, path: Path, is_text: Callable[[int], bool] = lumos.is_text) -> None:
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the text needs a Hugging Face tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        # The library raises nothing narrower.
        except Exception as error:
            raise ValueError(f"{file} is no Hugging Face tokenizer: {error}") from None
        self._file, self._is_text = file, is_text

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the begin of the sequence: who puts a prompt together puts it.

        Raises:
            ValueError: they cannot stand before a video.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        for wrong in (id for id in ids if not self._is_text(id)):
            raise ValueError(
                f"{self._file} makes {wrong} of {self._tokenizer.id_to_token(wrong)!r}, no id of text for this model: "
                "leave it out, or give the model's own tokenizer"
            )
        return ids
