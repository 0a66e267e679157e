"""Text as a masked model reads it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from vllm_packcache.families import lumos


class TextTokenizer:
    """A Hugging Face tokenizer.

    Args:
        path: a folder with ``tokenizer.json``, or such a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the text needs a Hugging Face tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        # The library raises nothing narrower.
        except Exception as error:
            raise ValueError(f"{file} is no Hugging Face tokenizer: {error}") from None
        self._file = file

    def encode(self, text: str) -> list[int]:
        """Ids of a text, such as `lumos.question`, without the begin of the sequence: `lumos.text_prompt` puts it.

        Raises:
            ValueError: they cannot stand before a video.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        for wrong in (id for id in ids if id >= lumos.VISUAL_BEGIN or id in lumos.STRUCTURE):
            raise ValueError(
                f"{self._file} makes {wrong} of {self._tokenizer.id_to_token(wrong)!r}, no id of text for this model: "
                "leave it out, or give the model's own tokenizer"
            )
        return ids
