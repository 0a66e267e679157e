"""Configuration: what an operator writes, what a request may change, and errors a person can act on.

A configuration is a mapping with the options of the policy and, under ``layout``, the shape of a frame::

    layout: {grid: [16, 16], frame_start_tokens: 1}
    history_frames: 2
    window: 4
    decay: 0.5
    positions: rebase

It is given as a YAML or JSON file, as JSON text, as a mapping, or as the name of a preset in ``configs/``
(`vllm_packcache.config.sources`). With ``policy`` it may say whose options it holds: any other policy takes its layout
alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from vllm_packcache import families
from vllm_packcache.config.errors import ConfigError, named, shown
from vllm_packcache.config.guidance import GUIDANCE_KEY, GuidanceConfig, Scale
from vllm_packcache.config.sessions import SessionsConfig
from vllm_packcache.config.sources import CONFIG_KEY, check_finite, load_mapping
from vllm_packcache.config.videos import STORE_FLAG, STORE_KEY, TOKENIZER_FLAG, TOKENIZER_KEY, VideosConfig
from vllm_packcache.core import policies
from vllm_packcache.core.grammar import LARGEST_ID, FrameGrammar, FrameIds, IdRange, VideoGrammar, grammar_of
from vllm_packcache.core.layout import MAX_FRAMES, FrameLayout, VideoLayout
from vllm_packcache.core.plan import REQUEST_PREFIX as REQUEST_PREFIX
from vllm_packcache.core.plan import Plan, Stream, Turn, VideoRequest
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.policies.base import check_class
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import PolicyError, Retention, some_tokens
from vllm_packcache.families import DECODER, LUMOS, Family
from vllm_packcache.families import actions as codings
from vllm_packcache.families.actions import ActionCoding
from vllm_packcache.families.base import Prompt
from vllm_packcache.families.lumos import MaskedOptions

POLICY_KEY = "kv_cache_policy"
"""Key of ``additional_config`` (and, with dashes, the flag) that names the policy."""

POLICY_FLAG = "--" + POLICY_KEY.replace("_", "-")
CONFIG_FLAG = "--" + CONFIG_KEY.replace("_", "-")

POSITION_LIMIT_KEY = "kv_cache_position_limit"
"""Key of ``additional_config`` under which the first process tells the others what the model can tell apart."""

CANVAS_OPTION = "diffusion_canvas_length"
"""vLLM's own request option for the tokens that a request makes at a time: every checked canvas request has it."""

OWNER_KEY = "policy"
"""Key of a configuration that says whose options it holds."""

PASSES_KEY = "passes"
"""Key of a configuration that says how frames are made in passes where a request does not."""

DEEPEST = 4
"""Lists and mappings inside each other that an option's value may be made of."""

OPT_OUT = Full.name
"""The one other policy a request may name: its whole cache is kept."""


PositionMode = Literal["rebase", "absolute"]
"""``rebase``: time is counted from the oldest frame of the window; ``absolute``: from the start of the sequence."""


_Part = TypeVar("_Part", SessionsConfig, VideosConfig, GuidanceConfig, MaskedOptions)


def is_video_key(key: object) -> bool:
    """Whether a request option is one of ours."""
    return isinstance(key, str) and key.startswith(REQUEST_PREFIX)


_Frames = Annotated[int, Field(ge=1, le=MAX_FRAMES)]
_Scale = Annotated[int, Field(ge=1, le=2**16)]


_Id = Annotated[int, Field(ge=0, le=LARGEST_ID)]
_Tokens = Annotated[int, Field(ge=0, le=LARGEST_ID)]
_Ids = tuple[_Id, _Id]
_Number = Literal["rows", "columns"]
_Value = Annotated[float, Field(ge=-1e6, le=1e6)]
_Specials = tuple[_Id | _Ids | _Number, ...]


class LayoutConfig(BaseModel):
    """The shape of a frame: ``grid`` with its extra tokens, or ``tokens_per_frame`` alone.

    ``axis_scale`` is for models whose positions have three axes: how far frames, rows and columns are apart.

    With ``visual_ids`` and the ids of special tokens it says which ids may stand where: an id is fixed, a pair is the
    first and the last one of a range. Of visual tokens the model chooses among them, of special ones the client does.
    ``last_row_end_ids`` are those after the last row, where they are others than ``row_end_ids``.
    ``rows`` and ``columns`` in a frame's start or end stand for the digits of that number, whose ids ``digit_ids`` has,
    from 0 to 9.

    ``actions`` names the coding by which a client's action becomes the ids that are left to it; ``action_ranges`` are
    the smallest and the largest value of each number of an action, where the coding has a use for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    grid: tuple[int, int] | None = None
    tokens_per_frame: int | None = None
    frame_start_tokens: int = 0
    row_end_tokens: int = 0
    frame_end_tokens: int = 0
    condition_image_tokens: Annotated[int, Field(ge=0)] = 0
    axis_scale: tuple[_Scale, _Scale, _Scale] | None = None
    visual_ids: _Ids | None = None
    frame_start_ids: _Specials | None = None
    row_end_ids: tuple[_Id, ...] | None = None
    last_row_end_ids: tuple[_Id, ...] | None = None
    frame_end_ids: _Specials | None = None
    digit_ids: Annotated[tuple[_Id, ...], Field(min_length=10, max_length=10)] | None = None
    actions: str | None = None
    action_ranges: tuple[tuple[_Value, _Value], ...] | None = None

    def frame_layout(self) -> FrameLayout:
        """The frame this describes.

        Raises:
            ValueError: the numbers contradict each other, or neither grid nor tokens_per_frame is given.
        """
        extra = (
            self._special_tokens("frame_start", self.frame_start_tokens, self.frame_start_ids),
            self.row_end_tokens,
            self._special_tokens("frame_end", self.frame_end_tokens, self.frame_end_ids),
        )
        if self.grid is None:
            if self.tokens_per_frame is None:
                raise ValueError("layout needs grid or tokens_per_frame")
            return FrameLayout(self.tokens_per_frame, None, *extra)
        if self.tokens_per_frame is None:
            return FrameLayout.from_grid(self.grid, *extra)
        return FrameLayout(self.tokens_per_frame, self.grid, *extra)

    @property
    def has_ids(self) -> bool:
        """Whether it says which ids may stand where."""
        said = self.visual_ids, self.frame_start_ids, self.row_end_ids, self.last_row_end_ids, self.frame_end_ids
        return any(own is not None for own in said)

    def frame_ids(self) -> FrameIds:
        """What it says of ids.

        Raises:
            ValueError: a range is empty, or a number has no digits.
        """
        return FrameIds(
            None if self.visual_ids is None else _id_range("visual_ids", self.visual_ids),
            self._special_ids("frame_start", self.frame_start_ids),
            self.row_end_ids,
            self._special_ids("frame_end", self.frame_end_ids),
            self.last_row_end_ids,
        )

    def _special_tokens(self, place: str, tokens: int, ids: _Specials | None) -> int:
        """How many special tokens stand there: of rows and columns as many as the numbers have digits."""
        if ids is None or set(get_args(_Number)).isdisjoint(ids):
            return tokens
        digits = len(self._special_ids(place, ids) or ())
        if tokens not in (0, digits):
            raise ValueError(
                f"{place}_tokens must be {digits} where rows and columns have so many digits, not {tokens}: leave it "
                "out"
            )
        return digits

    def _special_ids(self, place: str, ids: _Specials | None) -> tuple[int | IdRange, ...] | None:
        """Of each special token that stands there; None: it does not say."""
        return None if ids is None else tuple(chain.from_iterable(self._ids_of(f"{place}_ids", own) for own in ids))

    def written_out(self, name: str, ids: Sequence[int | str]) -> tuple[int, ...]:
        """``ids``, where ``rows`` and ``columns`` are the digits of this layout's grid.

        Raises:
            ValueError: there is no grid, or digits have no ids.
        """
        return tuple(cast(int, token) for own in ids for token in self._ids_of(name, own))

    def _ids_of(self, name: str, own: int | tuple[int, int] | str) -> Sequence[int | IdRange]:
        if isinstance(own, int):
            return [own]
        if not isinstance(own, str):
            return [_id_range(name, own)]
        if self.grid is None or self.digit_ids is None:
            raise ValueError(f"{name}: {own} needs grid and digit_ids")
        return [self.digit_ids[int(digit)] for digit in str(self.grid[get_args(_Number).index(own)])]

    def grammar(self) -> FrameGrammar | None:
        """Which ids may stand at each place of a frame; None: it does not say.

        Raises:
            ValueError: as `frame_layout`, `frame_ids` and `vllm_packcache.core.grammar.grammar_of`.
        """
        return grammar_of(self.frame_layout(), self.frame_ids()) if self.has_ids else None

    def coding(self) -> ActionCoding | None:
        """How a client's actions become the ids that are left to it; None: it does not say.

        Raises:
            ValueError: there is no such coding, or the ranges are not of its actions.
        """
        if self.actions is None:
            if self.action_ranges is not None:
                raise ValueError("action_ranges needs actions, the coding whose numbers these are of")
            return None
        return codings.find(self.actions, self.action_ranges)

    def shortest_condition(self) -> VideoLayout:
        """A video whose condition is the conditioning image alone, without any text.

        Raises:
            ValueError: as `frame_layout`.
        """
        return VideoLayout(self.frame_layout(), self.condition_image_tokens, self.condition_image_tokens)


def _id_range(name: str, ids: tuple[int, int]) -> IdRange:
    if ids[0] > ids[1]:
        raise ValueError(f"{name} must be the first and the last id of a range, not {list(ids)}")
    return IdRange(*ids)


class _RequestOptions(BaseModel):
    """Options of one request that are not the policy's own, without their prefix."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: str | None = None
    grid: tuple[int, int] | None = None
    tokens_per_frame: int | None = None
    condition_tokens: Annotated[int, Field(ge=0)] | None = None
    condition_image_tokens: Annotated[int, Field(ge=0)] | None = None
    frames: _Frames | None = None
    given_ids: tuple[_Id, ...] | None = None
    guidance: Scale | None = None
    negative_prompt_ids: Annotated[tuple[_Id, ...], Field(min_length=1)] | None = None
    session_tokens: _Tokens | None = None
    forget_frames: _Tokens = 0
    forget_from: _Tokens = 0


def _fields_of(model: type) -> list[str]:
    """Names of the options that a pydantic model or a dataclass has."""
    if issubclass(model, BaseModel):
        return list(model.model_fields)
    assert dataclasses.is_dataclass(model)
    return [field.name for field in dataclasses.fields(model)]


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """A server's validated configuration.

    Args:
        policy: the policy of requests that do not change it.
        layout: the shape of a frame of requests that do not give one; None: every video request must.
        positions: how tokens of videos are positioned.
        position_limit: positions that the model has, P: those of a request lie below it. None: vLLM's own limit on the
            length of a request is enough.
        name: what the policy is called: the name of its entry point, whatever its class says.
        family: of the model that is served.
        sessions: how long they wait and live.
        videos: over HTTP: whether there are any, and how long they are kept.
        guidance: of causal videos; None: none is guided.
        passes: how frames are made in passes where a request does not say it; None: as published.
    """

    policy: Policy
    layout: LayoutConfig | None = None
    positions: PositionMode = "absolute"
    position_limit: int | None = None
    name: str = OPT_OUT
    family: Family = DECODER
    sessions: SessionsConfig = dataclasses.field(default_factory=SessionsConfig)
    videos: VideosConfig = dataclasses.field(default_factory=VideosConfig)
    guidance: GuidanceConfig | None = None
    passes: MaskedOptions | None = None

    @classmethod
    def parse(
        cls,
        policy: str,
        source: Mapping[str, Any] | str | None = None,
        position_limit: int | None = None,
        family: Family = DECODER,
    ) -> ServerConfig:
        """Validate a policy's name and its configuration.

        Args:
            policy: name of a policy.
            source: a mapping, JSON text, the path of a YAML or JSON file, or the name of a preset. Of one that says
                that its options are another policy's the layout alone is taken.
            position_limit: positions that the model has.
            family: of the model.

        Raises:
            ConfigError: something is wrong with one of them.
        """
        if not isinstance(policy, str):
            raise ConfigError(f"{POLICY_KEY} must be the name of a policy, not {shown(policy)}")
        try:
            policy_class = policies.find(policy)
        except ValueError as error:
            raise ConfigError(f"{POLICY_KEY}: {error}") from None
        try:
            check_class(policy_class, _RESERVED)
        except TypeError as error:
            raise ConfigError(f"{POLICY_KEY}: {policy!r}: {error}") from None
        options = _options_of(policy, load_mapping(source))
        layout = cls._parse_layout(options.pop("layout", None))
        positions, sessions, videos = (options.pop(name, None) for name in ("positions", "sessions", "videos"))
        guidance, passes = options.pop(GUIDANCE_KEY, None), options.pop(PASSES_KEY, None)
        parsed = _parse_policy(
            policy_class,
            options,
            CONFIG_KEY,
            name=policy,
            also=("layout", "positions", "sessions", "videos", GUIDANCE_KEY, PASSES_KEY),
            way_out=_layout_alone if layout else None,
        )
        for option, value in options.items():
            check_finite(value, option)
        if layout is not None:
            _check_policy(parsed, layout.frame_layout(), CONFIG_KEY)
            if layout.has_ids and family.role != "causal":
                raise ConfigError(f"{CONFIG_KEY}: layout: ids of frames are known of {family.name}: leave them out")
            try:
                family.check_layout(layout.frame_layout(), layout.axis_scale)
            except ValueError as error:
                raise ConfigError(f"{CONFIG_KEY}: layout: {error}") from None
        config = cls(
            parsed,
            layout,
            _parse_positions(positions, parsed, policy),
            position_limit,
            policy,
            family,
            _parse_part(SessionsConfig, sessions, "sessions"),
            _parse_part(VideosConfig, videos, "videos"),
            _parse_guidance(guidance, family, layout),
            _parse_passes(passes, family, layout),
        )
        try:
            config.fingerprint()
        except PolicyError as error:
            raise ConfigError(f"{POLICY_KEY}: {policy!r}: {error}") from None
        return config

    @classmethod
    def from_additional_config(cls, additional_config: object, family: Family = DECODER) -> ServerConfig | None:
        """Read the configuration out of vLLM's ``additional_config``; None: not switched on.

        A family that vLLM does not serve by itself is always on; without a policy all is kept.

        Args:
            additional_config: of vLLM's configuration.
            family: of the model.

        Raises:
            ConfigError: it is switched on and wrong.
        """
        given = additional_config if isinstance(additional_config, Mapping) else {}
        if given.get(POLICY_KEY) is None:
            if given.get(CONFIG_KEY) is not None:
                raise ConfigError(f"{CONFIG_KEY} is given without {POLICY_KEY}: name a policy too")
            for key in (STORE_KEY, TOKENIZER_KEY):
                if given.get(key) is not None:
                    raise ConfigError(f"{key} is given without {POLICY_KEY}: name a policy too, such as packcache")
            return cls(Full(), family=family) if family.role == "canvas" else None
        config = cls.parse(
            given[POLICY_KEY],
            given.get(CONFIG_KEY),
            given.get(POSITION_LIMIT_KEY),
            family,
        )
        return dataclasses.replace(config, videos=_with_flags_of_videos(config.videos, given))

    def fingerprint(self) -> dict[str, str]:
        """What the policy is: its class, and a digest of what it decides.

        Processes compare it, so that all of them keep the same blocks.

        Raises:
            PolicyError: the policy breaks its contract in a short video.
        """
        return {"class": _class_name(type(self.policy)), "decisions": _digest(self.policy, self.layout)}

    def as_mapping(self) -> dict[str, Any]:
        """The configuration as plain JSON-able data, every default spelled out."""
        mapping = dataclasses.asdict(self.policy) | {"positions": self.positions}
        if self.sessions != SessionsConfig():
            mapping["sessions"] = self.sessions.model_dump(mode="json", exclude_none=True)
        if self.videos != VideosConfig():
            mapping["videos"] = self.videos.model_dump(mode="json", exclude_none=True)
        if self.guidance is not None:
            said = self.guidance.model_dump(mode="json", exclude_defaults=True)
            mapping[GUIDANCE_KEY] = said or True
        if self.passes is not None:
            mapping[PASSES_KEY] = dataclasses.asdict(self.passes)
        if self.layout is not None:
            mapping["layout"] = self.layout.model_dump(mode="json", exclude_none=True)
        return mapping

    @property
    def streams(self) -> int:
        """Most streams of a request, each of which has blocks of its own."""
        return max(self.family.streams, 1 if self.guidance is None else 2)

    def plan(self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> Plan | None:
        """What a request keeps.

        A request is a video request when it carries any option with our prefix; the server's layout and
        policy fill in what it leaves out. Any other request, and one that opts out, keeps its whole cache.

        Args:
            extra_args: ``SamplingParams.extra_args`` of the request.
            num_prompt_tokens: length of its prompt: the condition, unless ``condition_tokens`` says otherwise.

        Returns:
            The plan, or None when the whole cache is kept and positions are as without a policy.

        Raises:
            ConfigError: an option is wrong; the message names it.
        """
        made = self._first_stream(extra_args, num_prompt_tokens)
        return None if made is None or made.as_stock else made.streams[0].plan

    def grammar(self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> VideoGrammar | None:
        """Which ids the tokens of a request may have; None: any. Arguments and errors are those of `plan`."""
        made = self._first_stream(extra_args, num_prompt_tokens)
        return None if made is None else made.grammar

    def _first_stream(self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> VideoRequest | None:
        """A request by its length alone, of which no more than the first stream is as it will be."""
        # What a second one begins with may follow from the prompt's ids, and changes nothing of the first.
        return self.video(extra_args, num_prompt_tokens, lambda condition_tokens: (0,) * condition_tokens)

    def video(
        self,
        extra_args: Mapping[str, Any] | None,
        num_prompt_tokens: int,
        negative: Callable[[int], tuple[int, ...] | None] = lambda condition_tokens: None,
    ) -> VideoRequest | None:
        """What a causal video makes and keeps, see `plan`, one that opts out included.

        None: it is no video, or one that keeps all and nobody says where its frames are.

        Args:
            extra_args: as of `plan`.
            num_prompt_tokens: as of `plan`.
            negative: of the length of the condition, what guidance leads away from where nobody says it; None: nothing.

        Raises:
            ConfigError: an option is wrong; the message names it.
        """
        if not any(map(is_video_key, extra_args or ())):
            return None
        policy, (options,) = self.read(extra_args, _RequestOptions)
        shape = self._request_shape(options)
        layout, grammar = self._request_layout(shape, options, num_prompt_tokens)
        self.check_policy(policy, layout.frame)
        if self.layout is None and options.grid is None and options.tokens_per_frame is None:
            if options.frames is not None:
                raise ConfigError(
                    f"{REQUEST_PREFIX}frames needs {REQUEST_PREFIX}grid or {REQUEST_PREFIX}tokens_per_frame: this "
                    "server was started without a layout"
                )
            if options.guidance is not None or options.negative_prompt_ids is not None:
                raise ConfigError(
                    f"{REQUEST_PREFIX}guidance needs {REQUEST_PREFIX}grid or {REQUEST_PREFIX}tokens_per_frame: this "
                    "server was started without a layout"
                )
            return None
        guidance = options.guidance
        if guidance is None:
            guidance = 1.0 if self.guidance is None else self.guidance.scale
        condition = self._negative_condition(guidance, options, shape, layout, negative)
        conditions = ((),) if condition is None else ((), condition)
        streams = tuple(self._stream(layout, policy, own) for own in conditions)
        made = self._request_grammar(grammar, options.given_ids, layout, num_prompt_tokens)
        return VideoRequest(
            streams,
            options.frames,
            grammar=made,
            turn=self._request_turn(options),
            guidance=guidance,
        )

    def _stream(self, layout: VideoLayout, policy: Policy, condition: tuple[int, ...] = ()) -> Stream:
        """A stream of a request of ``layout``; with a ``condition``, the one that has it in place of the request's."""
        start = 0
        if condition:
            start, image = layout.condition_tokens - len(condition), layout.condition_image_tokens
            # As of any shorter prompt: without room for a conditioning image it has none.
            layout = VideoLayout(layout.frame, len(condition), image if image <= len(condition) else 0)
        try:
            positions = self.positions_of(layout, policy)
        except ValueError as error:
            raise ConfigError(f"{REQUEST_PREFIX}{error}") from None
        return Stream(Plan(layout, policy, positions), start, condition)

    def _negative_condition(
        self,
        guidance: float,
        options: _RequestOptions,
        shape: LayoutConfig,
        layout: VideoLayout,
        negative: Callable[[int], tuple[int, ...] | None],
    ) -> tuple[int, ...] | None:
        """The condition of a request's second stream; None: it has none."""
        scale, condition = (f"{REQUEST_PREFIX}{name}" for name in ("guidance", "negative_prompt_ids"))
        if guidance == 1:
            if options.guidance is None and options.negative_prompt_ids is not None:
                raise ConfigError(f"{condition} is for guided videos: give {scale} too")
            return None
        if self.guidance is None:
            raise ConfigError(
                f"{scale} is {guidance:g}, and this server has no room for a second stream: start it on vLLM's Model "
                f"Runner V2 with {GUIDANCE_KEY}: true in {CONFIG_KEY}, or leave {scale} out"
            )
        if layout.condition_tokens == 0:
            raise ConfigError(
                f"{scale} needs a condition, and this video has none: raise {REQUEST_PREFIX}condition_tokens"
            )
        if options.negative_prompt_ids is not None:
            return options.negative_prompt_ids
        if self.guidance.negative_prompt_ids is not None:
            try:
                return shape.written_out("negative_prompt_ids", self.guidance.negative_prompt_ids)
            except ValueError as error:
                raise ConfigError(f"{condition} is needed, for the server's is of no such frames: {error}") from None
        # Of a session's later turns a front end sees what they add, and no condition.
        own = None if options.session_tokens is not None else negative(layout.condition_tokens)
        if own is None:
            raise ConfigError(
                f"{condition} is needed: it stands in place of the condition in the stream that {scale} leads away from"
            )
        return own

    @staticmethod
    def _request_turn(options: _RequestOptions) -> Turn | None:
        if options.session_tokens is None:
            for name in ("forget_frames", "forget_from"):
                if getattr(options, name):
                    raise ConfigError(
                        f"{REQUEST_PREFIX}{name} is for turns of a session: give {REQUEST_PREFIX}session_tokens too"
                    )
            return None
        for name in ("frames", "given_ids"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"{REQUEST_PREFIX}{name} is not for a session, whose turns make one frame each: leave it out"
                )
        if options.condition_tokens is None:
            raise ConfigError(
                f"{REQUEST_PREFIX}condition_tokens is needed in every turn of a session: its prompt grows, and its "
                "condition does not"
            )
        return Turn(options.session_tokens, options.forget_frames, options.forget_from)

    def request_of(self, params: Any, token_ids: Sequence[int] | None, num_prompt_tokens: int) -> VideoRequest | None:
        """The same as `request`, of what vLLM knows of a request.

        Args:
            params: its ``SamplingParams``; None: it generates nothing.
            token_ids: of its prompt; None: embeddings are sent.
            num_prompt_tokens: length of its prompt.

        Raises:
            ConfigError: an option or the prompt is wrong; the message names it.
        """
        extra_args = None if params is None else params.extra_args
        return self.request(extra_args, num_prompt_tokens if token_ids is None else token_ids)

    def request(self, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
        """What a request makes and keeps, one that opts out included; None: it is no video.

        Args:
            extra_args: ``SamplingParams.extra_args`` of the request.
            prompt: its token ids, or their number.

        Raises:
            ConfigError: an option or the prompt is wrong; the message names it.
        """
        try:
            return self.family.request(self, extra_args, prompt)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def read(self, extra_args: Mapping[str, Any] | None, *options: type) -> tuple[Policy, list[Any]]:
        """What a request says: its policy, and an object of each class of ``options``.

        Args:
            extra_args: of the request.
            options: pydantic models or dataclasses. The first has ``policy``, and is given what nobody knows.

        Raises:
            ConfigError: an option is wrong or unknown; the message names it.
        """
        own, of_policy = _video_options(extra_args), self._policy_options
        changed = {name: own.pop(name) for name in of_policy if name in own}
        fields = [_fields_of(model) for model in options]
        others = [{name: own.pop(name) for name in names if name in own} for names in fields[1:]]
        try:
            parts = zip(options, [own, *others], strict=True)
            read: list[Any] = [
                _validate(model, self._with_usual(model, _with_flags(model, part))) for model, part in parts
            ]
        except ValidationError as error:
            known = [*chain.from_iterable(fields), *sorted(of_policy)]
            raise ConfigError(_describe(error, REQUEST_PREFIX, known, REQUEST_PREFIX)) from None
        return self._request_policy(read[0].policy, changed), read

    def _with_usual(self, model: type, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options of a class that a request gives, with those of the server where it does not."""
        if self.passes is None or not isinstance(self.passes, model):
            return given
        usual = dataclasses.asdict(self.passes)
        if given.get("guidance") == 1:
            # Who asks for none does not say how often, and is not to be refused for it.
            usual = {name: value for name, value in usual.items() if not name.startswith("guidance_")}
        return {**usual, **given}

    @property
    def request_options(self) -> list[str]:
        """Names of what a request may say of its video, without prefix."""
        models = self.family.options or (_RequestOptions,)
        return [*(name for model in models for name in _fields_of(model)), *sorted(self._policy_options)]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a frame where a request gives none; None: the server knows of none."""
        return None if self.layout is None else self.layout.grid

    @property
    def _policy_options(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self.policy)}

    def _request_policy(self, name: str | None, changed: Mapping[str, Any]) -> Policy:
        """The server's policy with what a request changes of it."""
        if name not in (None, OPT_OUT, self.name):
            raise ConfigError(
                f"{REQUEST_PREFIX}policy must be {self.name!r}, the policy of this server, or {OPT_OUT!r}, not "
                f"{shown(name)}"
            )
        policy = self.policy
        if changed:
            merged = {name: getattr(policy, name) for name in self._policy_options} | dict(changed)
            policy = _parse_policy(type(policy), merged, REQUEST_PREFIX, name=self.name, prefix=REQUEST_PREFIX)
        return Full() if name == OPT_OUT else policy

    def window(self, policy: Policy) -> int | None:
        """The window of frames that positions are re-based to; None: they are absolute."""
        return policy.history_window if self.positions == "rebase" else None

    def check_policy(self, policy: Policy, frame: FrameLayout) -> None:
        """Check a request's policy against the shape of its frames.

        Raises:
            ConfigError: they cannot work together.
        """
        _check_policy(policy, frame, REQUEST_PREFIX.rstrip("_"))

    def positions_of(self, layout: VideoLayout, policy: Policy) -> Positions:
        """Where the model sees a video under ``policy``.

        Raises:
            ValueError: the layout does not go with positions of three axes.
        """
        return Positions(layout, self.window(policy), self.layout.axis_scale if self.layout else None)

    @staticmethod
    def _request_grammar(
        grammar: FrameGrammar | None, ids: tuple[int, ...] | None, layout: VideoLayout, num_prompt_tokens: int
    ) -> VideoGrammar | None:
        option, count = f"{REQUEST_PREFIX}given_ids", 0 if grammar is None else len(grammar.given)
        if ids is not None and count == 0:
            raise ConfigError(
                f"{option} is given, and frames of this server have no ids that a client gives: leave it out"
            )
        if grammar is None:
            return None
        rows = [ids[first : first + count] for first in range(0, len(ids), count)] if ids else []
        for number, row in enumerate(rows):
            try:
                grammar.check_given(row)
            except ValueError as error:
                raise ConfigError(f"{option}, frame {number + 1}: it {error}") from None
        return VideoGrammar(layout, grammar, max(0, layout.frame_of(num_prompt_tokens)), tuple(rows))

    def _request_shape(self, options: _RequestOptions) -> LayoutConfig:
        """The server's layout, with the grid or the number of tokens that a request gives."""
        base = self.layout or LayoutConfig()
        if options.grid is not None:
            return base.model_copy(update={"grid": options.grid, "tokens_per_frame": options.tokens_per_frame})
        if options.tokens_per_frame is None:
            if self.layout is None and options.policy != OPT_OUT:
                raise ConfigError(
                    f"{REQUEST_PREFIX}grid or {REQUEST_PREFIX}tokens_per_frame is needed: this server was started "
                    "without a layout"
                )
            return base if self.layout is not None else LayoutConfig(tokens_per_frame=1)
        if base.has_ids:
            raise ConfigError(
                f"{REQUEST_PREFIX}tokens_per_frame says nothing of rows, by which this server knows which ids may "
                f"stand where: give {REQUEST_PREFIX}grid"
            )
        # A bare number says nothing of rows, and a grid of the server's need not fit it.
        return LayoutConfig(tokens_per_frame=options.tokens_per_frame)

    def _request_layout(
        self, shape: LayoutConfig, options: _RequestOptions, num_prompt_tokens: int
    ) -> tuple[VideoLayout, FrameGrammar | None]:
        # Of a session's later turns a front end sees what they add.
        num_prompt_tokens += options.session_tokens or 0
        condition = num_prompt_tokens if options.condition_tokens is None else options.condition_tokens
        if condition > num_prompt_tokens:
            raise ConfigError(
                f"{REQUEST_PREFIX}condition_tokens is {condition}, but the prompt has {num_prompt_tokens} tokens: the "
                "condition is the part of the prompt before the first frame"
            )
        try:
            frame = shape.frame_layout()
            image = options.condition_image_tokens
            if image is None:
                # The server's number describes its usual prompt; a shorter one (text to video) has no such image.
                image = self._usual_image_tokens(frame)
                image = image if image <= condition else 0
            return VideoLayout(frame, condition, image), shape.grammar()
        except ValueError as error:
            raise ConfigError(f"{REQUEST_PREFIX}{error}") from None

    def _usual_image_tokens(self, frame: FrameLayout) -> int:
        """Tokens of the server's conditioning image, where frames are ``frame``: whole frames stay whole frames."""
        if self.layout is None:
            return 0
        image, tokens_per_frame = self.layout.condition_image_tokens, self.layout.frame_layout().tokens_per_frame
        frames, rest = divmod(image, tokens_per_frame)
        return image if rest else frames * frame.tokens_per_frame

    @staticmethod
    def _parse_layout(layout: object) -> LayoutConfig | None:
        if layout is None:
            return None
        if isinstance(layout, str):
            preset = load_mapping(layout).get("layout")
            if not isinstance(preset, Mapping):
                raise ConfigError(f"{CONFIG_KEY}: layout: {shown(layout)} has no layout of its own")
            layout = preset
        if not isinstance(layout, Mapping):
            raise ConfigError(f"{CONFIG_KEY}: layout must be a mapping or a preset's name, not {shown(layout)}")
        try:
            parsed = _validate(LayoutConfig, layout)
            Positions(parsed.shortest_condition(), scale=parsed.axis_scale)
            grammar, coding = parsed.grammar(), parsed.coding()
            if coding is not None:
                coding.check(grammar)
        except ValidationError as error:
            raise ConfigError(_describe(error, f"{CONFIG_KEY}: layout.", list(LayoutConfig.model_fields), "")) from None
        except ValueError as error:
            raise ConfigError(f"{CONFIG_KEY}: layout: {error}") from None
        return parsed


def _parse_guidance(value: object, family: Family, layout: LayoutConfig | None) -> GuidanceConfig | None:
    if value is None or value is False:
        return None
    if family.role != "causal" or family.streams > 1:
        raise ConfigError(f"{CONFIG_KEY}: {GUIDANCE_KEY}: {family.name} has streams of its own: leave it out")
    if not isinstance(value, Mapping) and value is not True:
        raise ConfigError(f"{CONFIG_KEY}: {GUIDANCE_KEY} must be true, false or a mapping, not {shown(value)}")
    parsed = _parse_part(GuidanceConfig, None if value is True else value, GUIDANCE_KEY)
    if layout is not None and parsed.negative_prompt_ids is not None:
        try:
            layout.written_out("negative_prompt_ids", parsed.negative_prompt_ids)
        except ValueError as error:
            raise ConfigError(f"{CONFIG_KEY}: {GUIDANCE_KEY}.{error}") from None
    return parsed


def _parse_passes(value: object, family: Family, layout: LayoutConfig | None) -> MaskedOptions | None:
    if value is None:
        return None
    # Where no model is named, as before one is there, its frames tell whose they are.
    maker = family
    if family == DECODER and layout is not None:
        maker = families.describing(layout.frame_layout(), layout.axis_scale)
    if MaskedOptions not in maker.options:
        raise ConfigError(
            f"{CONFIG_KEY}: {PASSES_KEY} is for models that make a frame in passes, and this one does not: leave it out"
        )
    return _parse_part(MaskedOptions, value, PASSES_KEY)


def _parse_part(model: type[_Part], part: object, name: str) -> _Part:
    """A part of a configuration that has options of its own."""
    if part is None:
        return model()
    if not isinstance(part, Mapping):
        raise ConfigError(f"{CONFIG_KEY}: {name} must be a mapping, not {shown(part)}")
    try:
        return _validate(model, part)
    except ValidationError as error:
        raise ConfigError(_describe(error, f"{CONFIG_KEY}: {name}.", _fields_of(model), "")) from None


_RESERVED = {
    "layout",
    "positions",
    "sessions",
    "videos",
    GUIDANCE_KEY,
    PASSES_KEY,
    *_RequestOptions.model_fields,
    *(name for model in LUMOS.options for name in _fields_of(model)),
}
"""What no policy can call its options."""


def _video_options(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a request says of its video, names without prefix.

    Raises:
        ConfigError: a value is made of too much to be an option's.
    """
    given = {key.removeprefix(REQUEST_PREFIX): value for key, value in (extra_args or {}).items() if is_video_key(key)}
    for name, value in given.items():
        if _deeper(value, DEEPEST):
            raise ConfigError(f"{REQUEST_PREFIX}{named(name)} is nested too deeply: give numbers, or lists of them")
    return given


def _with_flags(model: type, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """``given`` with flags of a dataclass as such: JSON over HTTP turns true and false into 1 and 0."""
    if not dataclasses.is_dataclass(model):
        return given
    flags = [field.name for field in dataclasses.fields(model) if field.type in ("bool", bool)]
    return {**given, **{name: bool(given[name]) for name in flags if given.get(name) in (0, 1)}}


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and mappings lie more than ``levels`` deep inside each other in ``value``."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return False
    return levels == 0 or any(_deeper(item, levels - 1) for item in value)


def family_of(model_config: Any) -> Family:
    """The family of the model that a configuration of vLLM's is of; there may be none.

    Where a package's family cannot be loaded the model is any decoder, as it is to vLLM: that has been logged, and who
    switches a policy on is told by `read_config`.
    """
    try:
        return families.of(_architectures(model_config))
    except ValueError:
        return DECODER


def _architectures(model_config: Any) -> list[str] | None:
    return getattr(getattr(model_config, "hf_config", None), "architectures", None)


def config_of(owner: Any) -> ServerConfig | None:
    """The configuration of an object of vLLM's that has a ``vllm_config``; None: not switched on.

    Parsed once and kept on the object: it is asked for in every step and with every request.

    Raises:
        ConfigError: it is switched on and wrong.
    """
    if not hasattr(owner, "_packcache_config"):
        owner._packcache_config = read_config(owner.vllm_config)
    return owner._packcache_config


def read_config(vllm_config: Any) -> ServerConfig | None:
    """The configuration of an engine; None: not switched on.

    Raises:
        ConfigError: it is switched on and wrong, or the model's family cannot be loaded.
    """
    config = ServerConfig.from_additional_config(vllm_config.additional_config, family_of(vllm_config.model_config))
    if config is not None:
        try:
            families.of(_architectures(vllm_config.model_config))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return config


def _options_of(policy: str, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says to ``policy``: all of it, or its layout alone where the options are of another.

    Raises:
        ConfigError: it names a policy that nobody knows.
    """
    options = dict(mapping)
    owner = options.pop(OWNER_KEY, None)
    if owner is None or owner == policy:
        return options
    known = policies.names()
    if owner not in known:
        raise ConfigError(
            f"{CONFIG_KEY}: {OWNER_KEY} must be the policy whose options these are, one of {', '.join(known)}, not "
            f"{shown(owner)}"
        )
    others = ("layout", "sessions", "videos", GUIDANCE_KEY, PASSES_KEY)
    return {name: options[name] for name in others if name in options}


def _layout_alone(option: str) -> str:
    """How to take the layout out of a configuration whose ``option`` is another policy's, as the end of a sentence."""
    owners = [policy.name for policy in _OWNERS if option in {field.name for field in dataclasses.fields(policy)}]
    return (
        f"; to take the layout alone, say {OWNER_KEY}: {owners[0]} beside it, or leave {option} out" if owners else ""
    )


_OWNERS = (PackCache, SlidingWindow, AttentionSink)


def _with_flags_of_videos(videos: VideosConfig, given: Mapping[str, Any]) -> VideosConfig:
    """What a configuration says of videos, with what the flags beside it say.

    Raises:
        ConfigError: they contradict each other, or there is a tokenizer and nowhere to keep a video.
    """
    for name, key, flag in (("store", STORE_KEY, STORE_FLAG), ("tokenizer", TOKENIZER_KEY, TOKENIZER_FLAG)):
        value, known = given.get(key), getattr(videos, name)
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{key} must be a text, not {shown(value)}")
        if known not in (None, value):
            raise ConfigError(f"{CONFIG_KEY}: videos: {name} is another than {flag} says: leave one of them out")
        videos = videos.model_copy(update={name: value})
    if videos.tokenizer is not None and videos.store is None:
        raise ConfigError(f"{TOKENIZER_FLAG} needs {STORE_FLAG}, the folder that videos are kept in: give it too")
    return videos


_Model = TypeVar("_Model")


@cache
def _validator(model: type[_Model]) -> TypeAdapter[_Model]:
    """Made once a class, which takes longer than many requests."""
    return TypeAdapter(model)


def _validate(model: type[_Model], options: Mapping[str, Any]) -> _Model:
    # By way of JSON, because that is what the options are: strict there means that [2, 3] is a pair and 2 a
    # number, while "2" and true are not.
    named = {str(option): value for option, value in options.items()}
    # A lone surrogate is no text: whatever option it is in, that is wrong.
    text = json.dumps(named, default=repr, ensure_ascii=False).encode("utf-8", "replace")
    return _validator(model).validate_json(text)  # type: ignore[arg-type]


def _parse_policy(
    policy_class: type[Policy],
    options: Mapping[str, Any],
    where: str,
    *,
    name: str,
    prefix: str = "",
    also: tuple[str, ...] = (),
    way_out: Callable[[str], str] | None = None,
) -> Policy:
    known = [field.name for field in dataclasses.fields(policy_class)]
    start = prefix or f"{where}: "
    unknown = [key for key in options if key not in known]
    if unknown:
        choices = ", ".join([*known, *also]) or "none"
        raise ConfigError(
            f"{start}{named(unknown[0])} is no option of policy {name!r}: its options are {choices}"
            f"{way_out(unknown[0]) if way_out else ''}"
        )
    try:
        policy = _validate(policy_class, options)
        hash(policy)
    except ValidationError as error:
        raise ConfigError(_describe(error, start, known, prefix)) from None
    except (PydanticUserError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{start}the options of policy {name!r} cannot be validated and compared: {reason}") from None
    return policy


def _parse_positions(value: object, policy: Policy, name: str) -> PositionMode:
    if value is None:
        value = "rebase" if policy.rebases else "absolute"
    modes = get_args(PositionMode)
    if value not in modes:
        raise ConfigError(f"{CONFIG_KEY}: positions must be {' or '.join(modes)}, not {shown(value)}")
    if value == "rebase" and policy.history_window is None:
        raise ConfigError(
            f"{CONFIG_KEY}: positions: rebase needs a policy that keeps a window of frames, and {name} does "
            "not: use packcache or sliding_window, or positions: absolute"
        )
    return value  # type: ignore[return-value]


def _check_policy(policy: Policy, frame: FrameLayout, where: str) -> None:
    try:
        policy.check(frame)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _describe(error: ValidationError, start: str, known: list[str], prefix: str) -> str:
    """The first thing wrong, in one sentence."""
    first = error.errors()[0]
    option = named(str(first["loc"][0])) if first["loc"] else ""
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = ", ".join(prefix + name for name in known)
        return f"{start}{option} is no known option: known are {names}"
    message = first["msg"].removeprefix("Value error, ")
    if not option:
        return f"{start}{message}"
    if len(first["loc"]) > 1:
        message = f"Item {int(first['loc'][1]) + 1}: {message}"
    given = "" if first["loc"][-1] == "secret" else f", not {shown(first['input'])}"
    return f"{start}{option}: {message[0].lower()}{message[1:]}{given}"


_PROBE = LayoutConfig(grid=(16, 16), condition_image_tokens=16)
"""A frame for a server that has been told of none."""

_PROBE_BLOCKS = 512
"""So many a frame and the condition have at most: the larger they are, the larger is a block."""

_PROBE_FRAMES = (*range(12), 40)


def _class_name(policy: type[Policy]) -> str:
    return f"{policy.__module__}:{policy.__qualname__}"


@lru_cache(maxsize=64)
def _digest(policy: Policy, layout: LayoutConfig | None) -> str:
    """Of the decisions about a short video; nothing, where the policy refuses its frames.

    Raises:
        PolicyError: one of them is none that it may take.
    """
    usual = layout or _PROBE
    video = VideoLayout(usual.frame_layout(), 40 + usual.condition_image_tokens, usual.condition_image_tokens)
    digest = hashlib.sha256()
    try:
        policy.check(video.frame)
    except ValueError:
        return ""
    retention = Retention(video, policy, max(16, video.frame_start(1) // _PROBE_BLOCKS), some_tokens)
    for frame in _PROBE_FRAMES:
        digest.update(retention.past(frame).tobytes())
        digest.update(b"|")
    digest.update(repr((retention.most_blocks(), policy.history_window)).encode())
    return digest.hexdigest()[:16]
