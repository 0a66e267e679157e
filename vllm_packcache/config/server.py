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
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from vllm_packcache.config.errors import ConfigError, named, shown
from vllm_packcache.config.sources import CONFIG_KEY, check_finite, load_mapping
from vllm_packcache.core import policies
from vllm_packcache.core.layout import MAX_FRAMES, FrameLayout, VideoLayout
from vllm_packcache.core.plan import Asked, VideoPlan
from vllm_packcache.core.policies import AttentionSink, Full, PackCache, Policy, SlidingWindow
from vllm_packcache.core.policies.base import check_class
from vllm_packcache.core.positions import Positions
from vllm_packcache.core.retention import PolicyError, Retention
from vllm_packcache.families import lumos
from vllm_packcache.families.lumos import MaskedOptions, MaskedPlan

POLICY_KEY = "kv_cache_policy"
"""Key of ``additional_config`` (and, with dashes, the flag) that names the policy."""

POLICY_FLAG = "--" + POLICY_KEY.replace("_", "-")
CONFIG_FLAG = "--" + CONFIG_KEY.replace("_", "-")

POSITION_LIMIT_KEY = "kv_cache_position_limit"
"""Key of ``additional_config`` under which the first process tells the others what the model can tell apart."""

REQUEST_PREFIX = "packcache_"
"""Prefix of the request options in ``vllm_xargs`` / ``SamplingParams.extra_args``."""

CANVAS_OPTION = "diffusion_canvas_length"
"""vLLM's own request option for the tokens that a request makes at a time: every checked masked request has it."""

OWNER_KEY = "policy"
"""Key of a configuration that says whose options it holds."""

DEEPEST = 4
"""Lists and mappings inside each other that an option's value may be made of."""

OPT_OUT = Full.name
"""The one other policy a request may name: its whole cache is kept."""


PositionMode = Literal["rebase", "absolute"]
"""``rebase``: time is counted from the oldest frame of the window; ``absolute``: from the start of the sequence."""


def is_video_key(key: object) -> bool:
    """Whether a request option is one of ours."""
    return isinstance(key, str) and key.startswith(REQUEST_PREFIX)


_Frames = Annotated[int, Field(ge=1, le=MAX_FRAMES)]
_Scale = Annotated[int, Field(ge=1, le=2**16)]


class LayoutConfig(BaseModel):
    """The shape of a frame: ``grid`` with its extra tokens, or ``tokens_per_frame`` alone.

    ``axis_scale`` is for models whose positions have three axes: how far frames, rows and columns are apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    grid: tuple[int, int] | None = None
    tokens_per_frame: int | None = None
    frame_start_tokens: int = 0
    row_end_tokens: int = 0
    frame_end_tokens: int = 0
    condition_image_tokens: Annotated[int, Field(ge=0)] = 0
    axis_scale: tuple[_Scale, _Scale, _Scale] | None = None

    def frame_layout(self) -> FrameLayout:
        """The frame this describes.

        Raises:
            ValueError: the numbers contradict each other, or neither grid nor tokens_per_frame is given.
        """
        extra = (self.frame_start_tokens, self.row_end_tokens, self.frame_end_tokens)
        if self.grid is None:
            if self.tokens_per_frame is None:
                raise ValueError("layout needs grid or tokens_per_frame")
            return FrameLayout(self.tokens_per_frame, None, *extra)
        if self.tokens_per_frame is None:
            return FrameLayout.from_grid(self.grid, *extra)
        return FrameLayout(self.tokens_per_frame, self.grid, *extra)

    def shortest_condition(self) -> VideoLayout:
        """A video whose condition is the conditioning image alone, without any text.

        Raises:
            ValueError: as `frame_layout`.
        """
        return VideoLayout(self.frame_layout(), self.condition_image_tokens, self.condition_image_tokens)


class _RequestOptions(BaseModel):
    """Options of one request that are not the policy's own, without their prefix."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: str | None = None
    grid: tuple[int, int] | None = None
    tokens_per_frame: int | None = None
    condition_tokens: Annotated[int, Field(ge=0)] | None = None
    condition_image_tokens: Annotated[int, Field(ge=0)] | None = None
    frames: _Frames | None = None


class _MaskedRequestOptions(BaseModel):
    """Options of one request to a masked model that are neither the policy's nor of `MaskedOptions`, without prefix."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: str | None = None
    grid: tuple[int, int] | None = None
    frames: _Frames | None = None
    condition_frames: Annotated[int, Field(ge=0)] | None = None


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
    """

    policy: Policy
    layout: LayoutConfig | None = None
    positions: PositionMode = "absolute"
    position_limit: int | None = None
    name: str = OPT_OUT

    @classmethod
    def parse(
        cls, policy: str, source: Mapping[str, Any] | str | None = None, position_limit: int | None = None
    ) -> ServerConfig:
        """Validate a policy's name and its configuration.

        Args:
            policy: name of a policy.
            source: a mapping, JSON text, the path of a YAML or JSON file, or the name of a preset. Of one that says
                that its options are another policy's the layout alone is taken.
            position_limit: positions that the model has.

        Raises:
            ConfigError: something is wrong with either.
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
        positions = options.pop("positions", None)
        parsed = _parse_policy(
            policy_class,
            options,
            CONFIG_KEY,
            name=policy,
            also=("layout", "positions"),
            way_out=_layout_alone if layout else None,
        )
        for option, value in options.items():
            check_finite(value, option)
        if layout is not None:
            _check_policy(parsed, layout.frame_layout(), CONFIG_KEY)
        config = cls(parsed, layout, _parse_positions(positions, parsed, policy), position_limit, policy)
        try:
            config.fingerprint()
        except PolicyError as error:
            raise ConfigError(f"{POLICY_KEY}: {policy!r}: {error}") from None
        return config

    @classmethod
    def from_additional_config(cls, additional_config: object) -> ServerConfig | None:
        """Read the configuration out of vLLM's ``additional_config``; None: not switched on.

        Raises:
            ConfigError: it is switched on and wrong.
        """
        if not isinstance(additional_config, Mapping):
            return None
        if additional_config.get(POLICY_KEY) is None:
            if additional_config.get(CONFIG_KEY) is not None:
                raise ConfigError(f"{CONFIG_KEY} is given without {POLICY_KEY}: name a policy too")
            return None
        return cls.parse(
            additional_config[POLICY_KEY],
            additional_config.get(CONFIG_KEY),
            additional_config.get(POSITION_LIMIT_KEY),
        )

    @classmethod
    def of_masked_model(cls, additional_config: object) -> ServerConfig:
        """The configuration of a masked model's server; not switched on, all is kept.

        Raises:
            ConfigError: it is switched on and wrong, or its layout is not that of such models' frames.
        """
        config = cls.from_additional_config(additional_config) or cls(Full())
        layout = config.layout
        if layout is None:
            return config
        if layout.grid is None:
            raise ConfigError(f"{CONFIG_KEY}: layout: give grid: the frames of this model are made of rows and columns")
        frame, own = layout.frame_layout(), lumos.frame_layout(layout.grid)
        if frame not in (own, FrameLayout.from_grid(layout.grid)):
            raise ConfigError(
                f"{CONFIG_KEY}: layout: frames of this model have frame_start_tokens: {own.frame_start_tokens}, "
                f"row_end_tokens: {own.row_end_tokens}, frame_end_tokens: {own.frame_end_tokens}: give these, or grid "
                "alone"
            )
        if layout.axis_scale not in (None, lumos.MM_ROPE_SCALE):
            raise ConfigError(
                f"{CONFIG_KEY}: layout: axis_scale of this model is {list(lumos.MM_ROPE_SCALE)}, not "
                f"{list(layout.axis_scale)}: leave it out"
            )
        return config

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
        if self.layout is not None:
            mapping["layout"] = self.layout.model_dump(mode="json", exclude_none=True)
        return mapping

    def plan(self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> VideoPlan | None:
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
        asked = self.asked(extra_args, num_prompt_tokens)
        return None if asked is None else self.plan_of(asked)

    def plan_of(self, asked: Asked) -> VideoPlan | None:
        """What the video of a request keeps; see `plan`.

        Raises:
            ConfigError: its layout does not go with the positions of the model.
        """
        plan = self._video_of(asked)
        return None if plan.as_stock else plan

    def video(self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> VideoPlan | None:
        """The same as `plan`, but of a video that opts out, too; None: it is none, or nobody says where its frames are.

        Raises:
            ConfigError: an option is wrong; the message names it.
        """
        asked = self.asked(extra_args, num_prompt_tokens)
        if asked is None:
            return None
        plan = self._video_of(asked)
        return plan if asked.has_frames or not plan.as_stock else None

    def _video_of(self, asked: Asked) -> VideoPlan:
        try:
            positions = self.positions_of(asked.layout, asked.policy)
        except ValueError as error:
            raise ConfigError(f"{REQUEST_PREFIX}{error}") from None
        return VideoPlan(asked.layout, asked.policy, positions)

    def asked(self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> Asked | None:
        """What a request says of its video, see `plan`; None: it is none.

        Raises:
            ConfigError: an option is wrong; the message names it.
        """
        given = _video_options(extra_args)
        if not given:
            return None
        own, changed = self._split(given)
        try:
            options = _validate(_RequestOptions, own)
        except ValidationError as error:
            raise ConfigError(_describe(error, REQUEST_PREFIX, self.request_options, REQUEST_PREFIX)) from None
        policy = self._request_policy(options.policy, changed)
        layout = self._request_layout(options, num_prompt_tokens)
        _check_policy(policy, layout.frame, REQUEST_PREFIX.rstrip("_"))
        has_frames = self.layout is not None or options.grid is not None or options.tokens_per_frame is not None
        if options.frames is not None and not has_frames:
            raise ConfigError(
                f"{REQUEST_PREFIX}frames needs {REQUEST_PREFIX}grid or {REQUEST_PREFIX}tokens_per_frame: this server "
                "was started without a layout"
            )
        return Asked(policy, layout, options.frames, has_frames)

    @property
    def request_options(self) -> list[str]:
        """Names of what a request may say of its video, without prefix."""
        return [*_RequestOptions.model_fields, *sorted(self._policy_options)]

    @property
    def masked_request_options(self) -> list[str]:
        """The same for a masked model."""
        return [*_MaskedRequestOptions.model_fields, *_MASKED_OPTIONS, *sorted(self._policy_options)]

    def masked_plan(self, extra_args: Mapping[str, Any] | None, prompt_ids: Sequence[int]) -> MaskedPlan:
        """What a request to a masked model makes and keeps: every request is a video.

        Args:
            extra_args: ``SamplingParams.extra_args`` of the request.
            prompt_ids: of `vllm_packcache.families.lumos.text_prompt`, and any frames that are given. They are
                conditioning images; with ``condition_frames`` the first so many are, and the others begin the video.

        Raises:
            ConfigError: an option or the prompt is wrong; the message names it.
        """
        own, changed = self._split(_video_options(extra_args))
        how = {name: own.pop(name) for name in _MASKED_OPTIONS if name in own}
        try:
            options = _validate(_MaskedRequestOptions, own)
            # JSON over HTTP turns true and false into 1 and 0.
            flags = {name: bool(how[name]) for name in _MASKED_FLAGS if how.get(name) in (0, 1)}
            made = _validate(MaskedOptions, how | flags)
        except ValidationError as error:
            raise ConfigError(_describe(error, REQUEST_PREFIX, self.masked_request_options, REQUEST_PREFIX)) from None
        policy = self._request_policy(options.policy, changed)
        grid = options.grid or (self.layout.grid if self.layout else None)
        if grid is None:
            raise ConfigError(f"{REQUEST_PREFIX}grid is needed: this server was started without a layout")
        try:
            lumos.check_text(prompt_ids)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            layout = self._masked_layout(prompt_ids, grid, options.condition_frames)
            first_frame = lumos.given_frames(prompt_ids, layout)
            _check_frames(prompt_ids, layout)
        except ValueError as error:
            raise ConfigError(f"{REQUEST_PREFIX}grid {list(grid)} and the prompt: {error}") from None
        _check_policy(policy, layout.frame, REQUEST_PREFIX.rstrip("_"))
        conditional, unconditional = (
            VideoPlan(stream, policy, Positions(stream, self._window(policy), lumos.MM_ROPE_SCALE))
            for stream in (layout, lumos.unconditional_layout(layout))
        )
        return MaskedPlan(conditional, unconditional if made.guided else None, made, first_frame, options.frames)

    @staticmethod
    def _masked_layout(prompt_ids: Sequence[int], grid: tuple[int, int], condition_frames: int | None) -> VideoLayout:
        frame = lumos.frame_layout(grid)
        if grid[0] * grid[1] < 2:
            raise ValueError("a frame needs two visual tokens at least: one stays masked until the last step")
        if condition_frames is None:
            text = lumos.video_layout(prompt_ids, grid).condition_tokens
            condition_frames = (len(prompt_ids) - text) // frame.tokens_per_frame
        return lumos.video_layout(prompt_ids, grid, condition_frames)

    @property
    def _policy_options(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self.policy)}

    def _split(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options that are not the policy's, and those that are."""
        names = self._policy_options
        own = {name: value for name, value in given.items() if name not in names}
        return own, {name: value for name, value in given.items() if name in names}

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

    def _window(self, policy: Policy) -> int | None:
        return policy.history_window if self.positions == "rebase" else None

    def positions_of(self, layout: VideoLayout, policy: Policy) -> Positions:
        """Where the model sees a video under ``policy``.

        Raises:
            ValueError: the layout does not go with positions of three axes.
        """
        return Positions(layout, self._window(policy), self.layout.axis_scale if self.layout else None)

    def _request_layout(self, options: _RequestOptions, num_prompt_tokens: int) -> VideoLayout:
        base = self.layout or LayoutConfig()
        if options.grid is None and options.tokens_per_frame is None:
            if self.layout is None and options.policy != OPT_OUT:
                raise ConfigError(
                    f"{REQUEST_PREFIX}grid or {REQUEST_PREFIX}tokens_per_frame is needed: this server was started "
                    "without a layout"
                )
            merged = base if self.layout is not None else LayoutConfig(tokens_per_frame=1)
        elif options.grid is None:
            # A bare number says nothing of rows, and a grid of the server's need not fit it.
            merged = LayoutConfig(tokens_per_frame=options.tokens_per_frame)
        else:
            merged = base.model_copy(update={"grid": options.grid, "tokens_per_frame": options.tokens_per_frame})
        condition = num_prompt_tokens if options.condition_tokens is None else options.condition_tokens
        if condition > num_prompt_tokens:
            raise ConfigError(
                f"{REQUEST_PREFIX}condition_tokens is {condition}, but the prompt has {num_prompt_tokens} tokens: the "
                "condition is the part of the prompt before the first frame"
            )
        try:
            frame = merged.frame_layout()
            image = options.condition_image_tokens
            if image is None:
                # The server's number describes its usual prompt; a shorter one (text to video) has no such image.
                image = self._usual_image_tokens(frame)
                image = image if image <= condition else 0
            return VideoLayout(frame, condition, image)
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
        except ValidationError as error:
            raise ConfigError(_describe(error, f"{CONFIG_KEY}: layout.", list(LayoutConfig.model_fields), "")) from None
        except ValueError as error:
            raise ConfigError(f"{CONFIG_KEY}: layout: {error}") from None
        return parsed


_MASKED_OPTIONS = [field.name for field in dataclasses.fields(MaskedOptions)]
_RESERVED = {
    "layout",
    "positions",
    *_RequestOptions.model_fields,
    *_MaskedRequestOptions.model_fields,
    *_MASKED_OPTIONS,
}
"""What no policy can call its options."""
_MASKED_FLAGS = [field.name for field in dataclasses.fields(MaskedOptions) if field.type == "bool"]


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


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and mappings lie more than ``levels`` deep inside each other in ``value``."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return False
    return levels == 0 or any(_deeper(item, levels - 1) for item in value)


def _check_frames(prompt_ids: Sequence[int], layout: VideoLayout) -> None:
    """All frames that a prompt holds must be frames.

    Raises:
        ValueError: one is not.
    """
    assert layout.frame.grid is not None
    first = layout.condition_tokens - layout.condition_image_tokens
    for start in range(first, len(prompt_ids), layout.tokens_per_frame):
        lumos.codes_of_frame(prompt_ids[start : start + layout.tokens_per_frame], layout.frame.grid)


def masked_config_of(owner: Any) -> ServerConfig:
    """The same for the server of a masked model; not switched on, all is kept."""
    if not hasattr(owner, "_packcache_masked_config"):
        owner._packcache_masked_config = ServerConfig.of_masked_model(owner.vllm_config.additional_config)
    return owner._packcache_masked_config


def config_of(owner: Any) -> ServerConfig | None:
    """The configuration of an object of vLLM's that has a ``vllm_config``; None: not switched on.

    Parsed once and kept on the object: it is asked for in every step and with every request.
    """
    if not hasattr(owner, "_packcache_config"):
        owner._packcache_config = ServerConfig.from_additional_config(owner.vllm_config.additional_config)
    return owner._packcache_config


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
    return {"layout": options["layout"]} if "layout" in options else {}


def _layout_alone(option: str) -> str:
    """How to take the layout out of a configuration whose ``option`` is another policy's, as the end of a sentence."""
    owners = [policy.name for policy in _OWNERS if option in {field.name for field in dataclasses.fields(policy)}]
    return (
        f"; to take the layout alone, say {OWNER_KEY}: {owners[0]} beside it, or leave {option} out" if owners else ""
    )


_OWNERS = (PackCache, SlidingWindow, AttentionSink)

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
    if first["type"] == "extra_forbidden":
        names = ", ".join(prefix + name for name in known)
        return f"{start}{option} is no known option: known are {names}"
    message = first["msg"].removeprefix("Value error, ")
    if not option:
        return f"{start}{message}"
    if len(first["loc"]) > 1:
        message = f"Item {int(first['loc'][1]) + 1}: {message}"
    return f"{start}{option}: {message[0].lower()}{message[1:]}, not {shown(first['input'])}"


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
    retention = Retention(video, policy, max(16, video.frame_start(1) // _PROBE_BLOCKS))
    for frame in _PROBE_FRAMES:
        digest.update(retention.past(frame).tobytes())
        digest.update(b"|")
    digest.update(repr((retention.most_blocks(), policy.history_window)).encode())
    return digest.hexdigest()[:16]
