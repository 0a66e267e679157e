"""Pictures, sentences and token ids of the demo model.

One id space holds everything: a few special tokens, the words of the prompts, and one token ``<v0>``,
``<v1>``, ... per codeword of the patch codebook.  A sequence is

    <bos> text padded to 30 tokens <image> 256 visual ids     (the condition, always 288 tokens)
    <frame> 256 visual ids                                    (one frame, 257 tokens)
    <frame> 256 visual ids ...

with visual ids in row-major order of the 16x16 grid.  The fixed text length keeps every frame at a fixed
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vllm_packcache.demo import world

MODEL_DIR = Path(__file__).parent / "model"
"""The bundled model: weights, config, tokenizer and codebook."""

GRID = world.GRID
PATCH = world.PATCH
SIZE = world.SIZE
VISUAL_TOKENS = GRID * GRID
FRAME_TOKENS = VISUAL_TOKENS + 1
"""Tokens of one frame: ``<frame>`` and 256 visual ids."""
TEXT_TOKENS = 30
"""Tokens given to the text; shorter texts are padded, longer ones cut."""
CONDITION_TOKENS = 1 + TEXT_TOKENS + 1 + VISUAL_TOKENS
"""Tokens of every prompt that ``build_prompt`` returns."""

TRAINED_FRAMES = 16
"""Of the longest videos that the bundled model was trained on."""

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<frame>")
WORDS = (
    *("a", "an", "the", "and", "moves", "right", "left", "at", "in", "on", "behind", "pillar"),
    *world.SHAPES,
    *world.COLOURS,
    *world.SCENES,
    world.PHOTO,
    *world.PILLARS,
    *world.WIDTHS.values(),
)

# A patch of a photograph is shown as a world patch only where it is this close to one (mean Lab distance), so
# that a photo is made of plain colours and not of fragments of circles and pillars.
_WORLD_PATCH_LAB_DISTANCE = 1.5


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB uint8 [..., 3] to CIE Lab (D65) float32 [..., 3], where distances match the eye."""
    linear = rgb.astype(np.float32) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
    return lab.astype(np.float32)


def build_text_tokenizer(num_visual: int) -> Tokenizer:
    """The one vocabulary of specials, words and ``num_visual`` visual tokens, as a WordLevel tokenizer."""
    tokens = (*SPECIALS, *WORDS, *(f"<v{i}>" for i in range(num_visual)))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    # Words and <tokens> are kept, anything else (punctuation, spaces) separates them.
    pattern = Regex(r"<[a-z]+[0-9]*>|[a-z]+|[0-9]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and codebook.npz of the current world to ``directory``."""
    from transformers import PreTrainedTokenizerFast

    table = world.palette()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_text_tokenizer(len(table.patches)),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    np.savez_compressed(directory / "codebook.npz", patches=table.patches, num_plain=table.num_plain)


class VideoTokenizer:
    """Turns sentences and pictures into token ids of the demo model, and generated ids back into pictures.

    Args:
        directory: a model directory with ``tokenizer.json`` and ``codebook.npz``; the bundled one by default.

    Raises:
        FileNotFoundError: if either file is missing.
        ValueError: if the tokenizer is not one of this model.
    """

    def __init__(self, directory: str | Path = MODEL_DIR) -> None:
        directory = Path(directory)
        for name in ("tokenizer.json", "codebook.npz"):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name} is missing")
        self._text = Tokenizer.from_file(str(directory / "tokenizer.json"))
        with np.load(directory / "codebook.npz", allow_pickle=False) as data:
            self.patches: np.ndarray = data["patches"]
            self._num_plain = int(data["num_plain"])
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.image_id, self.frame_id = map(self._id, SPECIALS)
        self.visual_offset = self._id("<v0>")
        self.vocab_size: int = self._text.get_vocab_size()

    def _id(self, token: str) -> int:
        number = self._text.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return number

    @cached_property
    def _codebook_lab(self) -> np.ndarray:
        return _to_lab(self.patches).reshape(len(self.patches), -1)

    def encode_text(self, text: str) -> list[int]:
        """Ids of the words of ``text``, not padded; words the model does not know become ``<unk>``."""
        # Angle brackets are dropped so that a prompt cannot smuggle in visual or special tokens.
        return self._text.encode(text.replace("<", " ").replace(">", " "), add_special_tokens=False).ids

    def encode_image(self, rgb: np.ndarray) -> np.ndarray:
        """Nearest codeword of each patch of a picture.

        Args:
            rgb: uint8 [H, W, 3] of any size (also [H, W], [H, W, 1] or [H, W, 4]; alpha is laid over white).
                The middle square is cut out and resized to 64x64.

        Returns:
            int64 [16, 16] token ids (not codebook indices).

        Raises:
            ValueError: if the array is not a uint8 picture with at least one pixel.
        """
        picture = np.asarray(_as_picture(rgb))
        cells = picture.reshape(GRID, PATCH, GRID, PATCH, 3).swapaxes(1, 2)
        lab = _to_lab(cells).reshape(VISUAL_TOKENS, -1)
        book = self._codebook_lab
        squared = (lab**2).sum(1)[:, None] - 2 * lab @ book.T + (book**2).sum(1)[None]
        world_only = squared.copy()
        world_only[:, : self._num_plain] = np.inf
        nearest_world = world_only.argmin(1)
        nearest_plain = squared[:, : self._num_plain].argmin(1)
        distance = np.sqrt(((lab - book[nearest_world]) ** 2).mean(1) * 3)
        plain_distance = np.sqrt(((lab - book[nearest_plain]) ** 2).mean(1) * 3)
        use_world = (distance < _WORLD_PATCH_LAB_DISTANCE) & (distance < plain_distance)
        return np.where(use_world, nearest_world, nearest_plain).reshape(GRID, GRID) + self.visual_offset

    def decode_frames(self, ids: np.ndarray) -> np.ndarray:
        """Pictures of token ids.

        Args:
            ids: int [T, 16, 16] token ids; an id that is not a visual token shows as mid grey.

        Returns:
            uint8 [T, 64, 64, 3].

        Raises:
            ValueError: if the shape is wrong.
        """
        ids = np.asarray(ids)
        if ids.ndim != 3 or ids.shape[1:] != (GRID, GRID):
            raise ValueError(f"expected ids of shape [T, {GRID}, {GRID}], got {ids.shape}")
        index = ids - self.visual_offset
        known = (index >= 0) & (index < len(self.patches))
        cells = np.where(known[..., None, None, None], self.patches[np.where(known, index, 0)], np.uint8(128))
        return cells.swapaxes(2, 3).reshape(len(ids), SIZE, SIZE, 3)

    def build_prompt(self, text: str, image: np.ndarray) -> list[int]:
        """The condition: always ``CONDITION_TOKENS`` ids, after which the model generates ``<frame>``.

        Args:
            text: what should happen, e.g. "a red circle moves right at night behind a wide grey pillar".
            image: the picture at time 0, as ``encode_image`` takes it.
        """
        return self.build_prompt_from_ids(text, self.encode_image(image))

    def build_prompt_from_ids(self, text: str, image_ids: np.ndarray) -> list[int]:
        """``build_prompt`` for a picture that is encoded already (int [16, 16] token ids)."""
        words = self.encode_text(text)[:TEXT_TOKENS]
        words += [self.pad_id] * (TEXT_TOKENS - len(words))
        return [self.bos_id, *words, self.image_id, *np.asarray(image_ids).reshape(-1).tolist()]

    def frames_from_ids(self, ids: Sequence[int]) -> np.ndarray:
        """Frames of generated ids (what follows the condition).

        The place of a token decides what it is, so a wrong id spoils one token and not the rest; an id that
        is not visual is replaced by the same place of the frame before (mid grey codeword in the first).
        A last frame that is not finished is left out.

        Returns:
            int64 [T, 16, 16] token ids.
        """
        frames: list[np.ndarray] = []
        for start in range(0, len(ids) - FRAME_TOKENS + 1, FRAME_TOKENS):
            frames.append(self.frame_from_ids(ids[start : start + FRAME_TOKENS], frames[-1] if frames else None))
        return np.array(frames, np.int64).reshape(-1, GRID, GRID)

    def frame_from_ids(self, ids: Sequence[int], before: np.ndarray | None = None) -> np.ndarray:
        """One frame of generated ids, as `frames_from_ids` makes it.

        Args:
            ids: ``FRAME_TOKENS`` of them.
            before: token ids of the frame before, int [16, 16]; None: it is the first that was generated.

        Returns:
            int64 [16, 16] token ids.
        """
        frame = np.array(ids[1:], np.int64).reshape(GRID, GRID)
        wrong = (frame < self.visual_offset) | (frame >= self.visual_offset + len(self.patches))
        frame[wrong] = self._grey if before is None else before[wrong]
        return frame

    @cached_property
    def _grey(self) -> int:
        """The plain codeword that is nearest to mid grey, as a token id."""
        plain = self.patches[: self._num_plain].astype(int)
        return int(np.abs(plain - 128).sum((1, 2, 3)).argmin()) + self.visual_offset


def _as_picture(rgb: np.ndarray) -> Image.Image:
    """The middle square of any uint8 picture as 64x64 RGB."""
    rgb = np.asarray(rgb)
    if rgb.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture, got {rgb.dtype}")
    if rgb.ndim == 3 and rgb.shape[2] == 1:
        rgb = rgb[..., 0]
    if rgb.ndim not in (2, 3) or (rgb.ndim == 3 and rgb.shape[2] not in (3, 4)) or 0 in rgb.shape:
        raise ValueError(f"expected a picture of shape [H, W, 3], got {rgb.shape}")
    picture = Image.fromarray(rgb)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    # The box filter gives a picture back exactly when it was enlarged by a whole factor.
    return ImageOps.fit(picture.convert("RGB"), (SIZE, SIZE), method=Image.Resampling.BOX)


def readable(text: str) -> str:
    """A text of a user's on one line, and what is no text in it marked."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def shapes(codes: np.ndarray) -> tuple[float, bool]:
    """What of a picture is no drawing of the toy world.

    Args:
        codes: codewords, int [16, 16].

    Returns:
        The share of its places that show a plain colour, of which no drawing has any; and whether it has a part of one
        of the world's shapes.
    """
    palette = world.palette()
    return float((codes < palette.num_plain).mean()), bool(np.isin(codes, palette.parts).any())


def world_prompt(tokenizer: VideoTokenizer, video: world.Video) -> list[int]:
    """The condition of a video: its sentence and its frame 0."""
    return tokenizer.build_prompt_from_ids(video.prompt, video.frame_ids(0) + tokenizer.visual_offset)


def video_ids(tokenizer: VideoTokenizer, video: world.World, frames: int) -> np.ndarray:
    """Condition and frames 1 to ``frames`` of a world as one sequence, int64 [288 + frames * 257]."""
    ids = world_prompt(tokenizer, video)
    for k in range(1, frames + 1):
        ids.append(tokenizer.frame_id)
        ids.extend((video.frame_ids(k) + tokenizer.visual_offset).reshape(-1).tolist())
    return np.array(ids)
