"""What a model family is: all that the rest of the package must know of the models of one kind.

A new family is one file with one class. An installed package adds its own through the entry-point group
``vllm_packcache.families``: the entry's name is the architecture, as a checkpoint's ``config.json`` has it, its object
a class that derives from `Family`.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.core.plan import Role, VideoRequest
from vllm_packcache.core.policies import Policy

Prompt = Sequence[int] | int
"""Token ids of a prompt; their number alone, where embeddings are sent or a family need not look at ids."""


class Server(Protocol):
    """What a family may ask of the server's configuration; see `vllm_packcache.config.server.ServerConfig`."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of a frame where a request gives none."""

    def read(self, extra_args: Mapping[str, Any] | None, *options: type) -> tuple[Policy, list[Any]]:
        """The policy of a request, and an object of each class of ``options``, of what the request says."""

    def window(self, policy: Policy) -> int | None:
        """The window of frames that positions are re-based to; None: they are absolute."""

    def check_policy(self, policy: Policy, frame: FrameLayout) -> None:
        """Check a request's policy against the shape of its frames."""

    def video(
        self,
        extra_args: Mapping[str, Any] | None,
        num_prompt_tokens: int,
        negative: Callable[[int], tuple[int, ...] | None] = ...,
    ) -> VideoRequest | None:
        """What a causal video makes and keeps, one that opts out included; None: it is none.

        Args:
            extra_args: of the request.
            num_prompt_tokens: of the request.
            negative: of the length of the condition, what guidance leads away from where nobody says it; None: nothing.
        """


class Family(ABC):
    """The models of one kind."""

    name: ClassVar[str]
    """For people, in messages and logs."""
    architectures: ClassVar[tuple[str, ...]] = ()
    """Names under which checkpoints of it are published."""
    model: ClassVar[str | None] = None
    """``module:class`` of its vLLM model; None: vLLM has one of its own."""
    config: ClassVar[str | None] = None
    """``module:class`` of its configuration, with the ``model_type`` of checkpoints; None: transformers has one."""
    role: ClassVar[Role] = "causal"
    """How frames are made."""
    streams: ClassVar[int] = 1
    """Most streams of a request. Where they are several, the model's layers have a KV cache group for each."""
    options: ClassVar[tuple[type, ...]] = ()
    """Classes whose fields a request may give besides the policy's: pydantic models, or dataclasses."""

    least_text_tokens: ClassVar[int] = 0
    """Tokens that the text of a prompt has without any words."""

    # It has no state: one is as good as another of the same class.
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def check_layout(self, frame: FrameLayout, axis_scale: tuple[int, int, int] | None) -> None:
        """Check the layout that a server of such a model is started with.

        Raises:
            ValueError: these models make no such frames; the message names the option and the remedy.
        """
        del frame, axis_scale

    def describes(self, frame: FrameLayout, axis_scale: tuple[int, int, int] | None) -> bool:
        """Whether only these models make such frames: by it a layout is known for theirs where no model is named."""
        del frame, axis_scale
        return False

    def other_layouts(self, layout: VideoLayout) -> tuple[VideoLayout, ...]:
        """The same video in the other streams of a request that has all of them."""
        del layout
        return ()

    @abstractmethod
    def request(self, server: Server, extra_args: Mapping[str, Any] | None, prompt: Prompt) -> VideoRequest | None:
        """What a request makes and keeps; None: it is no video, and keeps its whole cache.

        Must be a pure function: scheduler and worker ask it each for itself.

        Args:
            server: the server's configuration.
            extra_args: ``SamplingParams.extra_args`` of the request.
            prompt: of the request.

        Raises:
            ValueError: an option or the prompt is wrong; the message names it.
        """
