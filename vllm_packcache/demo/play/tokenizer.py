"""A word for every token of the world to play, so that prompts can be written and read."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from vllm_packcache.demo.play.world import (
    ACTION_IDS,
    FALL,
    FLOWER,
    GEM,
    LANTERN,
    LEFT,
    LEFT_DOOR,
    PICTURE_ID,
    RIGHT,
    RIGHT_DOOR,
    RISE,
    SKY,
    STAND,
    UNKNOWN_ID,
    VISUAL_IDS,
    VOCABULARY,
    WALL,
    action_of,
    tile_of,
)

KIND_NAMES = {
    SKY: "sky",
    WALL: "wall",
    GEM: "gem",
    FLOWER: "flower",
    LANTERN: "lantern",
    LEFT_DOOR: "left-door",
    RIGHT_DOOR: "right-door",
}
MOTION_NAMES = {STAND: "stands", RISE: "rises", FALL: "falls"}
SIDE_NAMES = {LEFT: "left", RIGHT: "right"}


def name_of(token: int) -> str:
    """The word of a token: ``0:sky``, ``2:gem:stands:left`` (the player before a gem), ``right+jump``, ``wait``."""
    if token == PICTURE_ID:
        return "<picture>"
    if token == UNKNOWN_ID:
        return "<unk>"
    if VISUAL_IDS[0] <= token <= VISUAL_IDS[1]:
        tile = tile_of(token)
        player = [] if tile.motion is None else [MOTION_NAMES[tile.motion], SIDE_NAMES[tile.facing]]
        return ":".join([str(tile.room), KIND_NAMES[tile.kind], *player])
    assert ACTION_IDS[0] <= token <= ACTION_IDS[1]
    action = action_of(token)
    thing = KIND_NAMES[action.drop] if action.drop else ""
    return "+".join(filter(None, (SIDE_NAMES.get(action.move), "jump" * action.jump, thing))) or "wait"


def build_tokenizer() -> Tokenizer:
    """Words between spaces."""
    words = {name_of(token): token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=name_of(UNKNOWN_ID)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), unk_token=name_of(UNKNOWN_ID), clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(directory)
