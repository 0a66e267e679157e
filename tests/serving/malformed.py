"""Requests that are all wrong, or nearly right, made by a seed; and what each may be answered with.

What is valid is stated here once more, apart from the package: an option that is not, and is served, was ignored.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

PREFIX = "packcache_"
ALLOWED = (400, 404, 405, 413, 422, 501)
"""Answers that refuse. An endpoint that a model does not have is 404, or 501."""


# True arrives as 1: of vllm_xargs vLLM makes numbers.
def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, bool) and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, bool, float) and low <= value <= high


def _grid(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(type(side) is int and side >= 1 for side in value)


POLICY: dict[str, Callable[[Any], bool]] = {
    "window": _integer(1, 256),
    "history_frames": _number(5e-324, 2**20),
    "decay": _number(5e-324, 1),
    "gamma_text": _number(0, 1),
    "gamma_condition": _number(0, 1),
    "selection": lambda value: type(value) is str and value in ("spatial", "rows", "tail", "random", "changed"),
    "changed_tokens": _integer(1, 2**20),
    "episodes": _integer(0, 64),
    "policy": lambda value: type(value) is str and value in ("packcache", "full"),
    "grid": _grid,
    "frames": _integer(1, 2**20),
}
CAUSAL = {
    **POLICY,
    "tokens_per_frame": _integer(1, 2**20),
    "condition_tokens": _integer(0, 10**6),
    "condition_image_tokens": _integer(0, 10**6),
}
MASKED = {
    **POLICY,
    "condition_frames": _integer(0, 10**6),
    "seed": _integer(0, 2**64 - 1),
    "steps": _integer(1, 1000),
    "guidance": _number(-1000, 1000),
    "temperature": _number(0, 1000),
    "remask": _number(0, 1),
    "reset_temperature": lambda value: value in (0, 1),
    "share_history": lambda value: value in (0, 1),
    "refresh": _integer(1, 1000),
    "reuse": _number(0, 1),
    "guidance_interval": _integer(1, 1000),
    "guidance_from": _number(0, 1),
    "guidance_until": _number(0, 1),
}
SAMPLING: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 2.5, -1, "a", None],
    "top_k": [5, 0, -1, -7, 1.5],
    "top_p": [0.5, 1, 0, 7],
    "min_p": [0.1, 0],
    "seed": [1, 2**70, None],
    "repetition_penalty": [1.2, 1.0, 0, -1],
    "presence_penalty": [1, 0, 9],
    "frequency_penalty": [-1, 0],
    "min_tokens": [0, 3, 10**6],
    "stop_token_ids": [[5], [], ["a"], [-1]],
    "logit_bias": [{"5": 10}, {}, {"a": 1}],
    "allowed_token_ids": [[5, 6], [-1], []],
    "logprobs": [0, 3, -5, 10**6],
    "n": [1, 2, 0, 10**9],
    "bad_words": [["a"], [""]],
    "ignore_eos": [True, 3],
}
SILENT: dict[str, tuple[Any, ...]] = {
    "temperature": (1, None), "top_k": (0, -1), "top_p": (1,), "min_p": (0,), "seed": (None,),
    "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "min_tokens": (0,),
    "stop_token_ids": ([],), "logit_bias": ({},), "allowed_token_ids": ([],), "n": (1,), "ignore_eos": (True, False),
}  # fmt: skip
"""Values with which a masked model may take them."""


def _nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 256, 257, 10**6, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, 1.5, -0.0, 1e308,
    5e-324, float("nan"), float("inf"), "", "4", "packcache", "nope", "é中\u202e", "\ud800", "\x00\n", "x" * 5000,
    [], [5], [5, 9], [5, 9, 2], [0, 9], [-5, 9], [1.0, 9], ["5", "9"], [None, 9], [10**5, 10**5], [7] * 3000,
    {}, {"rows": 5}, _nested(3), _nested(100), [[5, 9]],
]  # fmt: skip


GOOD: dict[str, list[Any]] = {
    "window": [1, 2, 4],
    "history_frames": [1, 1.5, 2],
    "decay": [0.5, 1],
    "gamma_text": [0.5, 0],
    "gamma_condition": [1, 0.3],
    "selection": ["spatial", "tail", "changed"],
    "changed_tokens": [1],
    "episodes": [0],
    "policy": ["packcache", "full"],
    "frames": [1, 2, 3],
    "tokens_per_frame": [19, 45],
    "condition_tokens": [0, 20],
    "condition_frames": [0],
    "seed": [0, 2**64 - 1],
    "steps": [1, 2],
    "guidance": [1, 2.5],
    "remask": [0, 0.7],
    "reset_temperature": [0, 1],
    "share_history": [True, False],
    "refresh": [1, 3],
    "reuse": [0, 0.2],
    "guidance_interval": [1, 2],
    "guidance_from": [0, 0.5],
    "guidance_until": [0.5, 1],
}
"""Values that are served, beside which the others are tried."""


@dataclass(frozen=True)
class Request:
    """One request, and what is known of it.

    Args:
        path: the endpoint.
        body: as sent.
        must_refuse: why serving it would be wrong; empty: it may be served.
        tokens: how many an answer has, where that is certain.
    """

    path: str
    body: bytes
    must_refuse: tuple[str, ...]
    tokens: int | None


class Requests:
    """An endless supply.

    Args:
        seed: of all of them.
        prompts: token ids that begin a video, and where frames are ``frame`` tokens long.
        frame: tokens of a frame of the server's layout.
        is_masked: whether the model is.
        endpoints: which are tried.
    """

    def __init__(
        self, seed: int, prompts: list[list[int]], frame: int, *, is_masked: bool, endpoints: tuple[str, ...]
    ) -> None:
        self._random = random.Random(seed)
        self._prompts, self._frame, self._is_masked, self._endpoints = prompts, frame, is_masked, endpoints
        self._valid = MASKED if is_masked else CAUSAL

    def __next__(self) -> Request:
        choose = self._random
        path = choose.choice(self._endpoints)
        why: list[str] = []
        options: dict[str, Any] = {f"{PREFIX}frames": 1}
        if self._is_masked:
            options[f"{PREFIX}steps"] = 1
        for _ in range(choose.choice([0, 1, 1, 2, 4])):
            name = choose.choice(sorted(self._valid))
            options[PREFIX + name] = choose.choice(GOOD[name] if name in GOOD and choose.random() < 0.7 else ODD)
        if choose.random() < 0.1:
            options[PREFIX + choose.choice(["gird", "", "ünï", "x" * 300, "\ud800"])] = choose.choice(ODD)
        if choose.random() < 0.1:
            name = choose.choice([name for name in self._valid if name != "seed" or self._is_masked])
            options[choose.choice([name, f"PackCache_{name}", f"packcache-{name}", f"packcache{name}"])] = 1
            why.append("a name that is nobody's")
        for key, value in options.items():
            name = key.removeprefix(PREFIX)
            known = self._valid.get(name)
            # null says nothing.
            if key.startswith(PREFIX) and (known is None or not (known(value) or value is None)):
                why.append(f"{key} is {value!r:.80}")
        body, tokens = self._body(path, options, why)
        return Request(path, json.dumps(body).encode(), tuple(why), None if why else tokens)

    def _body(self, path: str, options: dict[str, Any], why: list[str]) -> tuple[dict[str, Any], int | None]:
        choose = self._random
        ids = choose.choice(self._prompts)
        sampling: dict[str, Any] = {}
        for name in choose.sample(sorted(SAMPLING), choose.choice([0, 0, 0, 0, 1, 2])):
            sampling[name] = choose.choice(SAMPLING[name])
            if self._is_masked and path in ("/v1/completions", GENERATE):
                said = any(type(sampling[name]) is type(v) and sampling[name] == v for v in SILENT.get(name, ()))
                if not said and sampling[name] not in SILENT.get(name, ()):
                    why.append(f"{name} is {sampling[name]!r}")
        elsewhere = ("grid", "tokens_per_frame", "condition_tokens", "condition_frames", "policy")
        known = not any(f"{PREFIX}{name}" in options for name in elsewhere)
        frames = options[f"{PREFIX}frames"]
        tokens = frames * self._frame if known and type(frames) is int and not sampling else None
        length = choose.choice([None, self._frame, 7, 0, -1, 10**12, "a", 1.5]) if choose.random() < 0.4 else None
        if length is not None and path in ("/v1/completions", GENERATE):
            sampling["max_tokens"] = length
            if type(length) is not int or (
                type(frames) is int and frames >= 1 and known and length != frames * self._frame
            ):
                why.append(f"max_tokens is {length}, frames {frames}")
        if path == GENERATE:
            body = {"token_ids": ids, "sampling_params": {**sampling, "extra_args": options}}
            if choose.random() < 0.1:
                body["vllm_xargs"] = body["sampling_params"].pop("extra_args")
                why.append("options beside sampling_params")
            return body, tokens
        body = {"model": "m", **sampling, "vllm_xargs": options}
        if path == "/v1/completions":
            body |= {"prompt": ids, "return_token_ids": True}
            if choose.random() < 0.1:
                body["prompt"], tokens = [ids, ids], None
        elif path == "/v1/responses":
            body["input"] = "a b c"
        else:
            batch = path.endswith("/batch")
            body["messages"] = [{"role": "user", "content": choose.choice(["a b", "", "\ud800", "é"])}]
            body["messages"] = [body["messages"]] if batch else body["messages"]
            body.setdefault("max_tokens", 50) if path == "/v1/messages" else None
        if path != "/v1/completions":
            tokens = None
        kind = choose.random()
        if kind < 0.1:
            body["use_beam_search"] = True
            why.extend(["beam search"] if path in ("/v1/completions", "/v1/chat/completions") else [])
        elif kind < 0.2:
            moved = choose.choice(sorted(options))
            body[moved] = options.pop(moved)
            why.append("an option beside vllm_xargs")
        elif kind < 0.3 and path == "/v1/completions":
            body["stream"] = True
        elif kind < 0.35:
            body["vllm_xargs"] = choose.choice([[1], "packcache_grid", {"packcache_grid": {"a": {"b": [5, 9]}}}, 7])
            why.append("options of another kind")
        return body, tokens


GENERATE = "/inference/v1/generate"


async def judge(client: httpx.AsyncClient, request: Request) -> str:
    """Send a request; returns "served" or "refused".

    Raises:
        AssertionError: it was answered with what it must not be.
    """
    headers = {"Content-Type": "application/json"}
    answer = await client.post(request.path, content=request.body, headers=headers)
    about = f"{request.path} {request.body[:600]!r} {request.must_refuse}: {answer.status_code} {answer.text[:600]}"
    if answer.status_code != 200:
        assert answer.status_code in ALLOWED, about
        assert len(answer.text) < 6000, about
        return "refused"
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    whole: list[Mapping[str, Any]] = [json.loads(event) for event in events] or [answer.json()]
    if errors := [event["error"] for event in whole if event.get("error")]:
        assert errors[0]["code"] == 400, about
        return "refused"
    assert not request.must_refuse, about
    if request.tokens is not None:
        made = [token for event in whole for choice in event["choices"] for token in choice.get("token_ids") or ()]
        assert len(made) == request.tokens, about
    return "served"


async def send(client: httpx.AsyncClient, requests: Requests, count: int) -> Counter[str]:
    """Judge ``count`` requests one after another; how many were answered how."""
    ended: Counter[str] = Counter()
    for _ in range(count):
        request = next(requests)
        ended[await judge(client, request)] += 1
        ended[request.path] += 1
    return ended
