"""All videos of a server: who asks for one is answered before it is made, and it is made whoever still listens.

Every API server of a host makes the videos that it was asked for, with its own way to the engine. What others must know
of them is in the store: a video that is deleted there is noticed here, and its request is taken from the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.server import OPT_OUT, REQUEST_PREFIX, ServerConfig
from vllm_packcache.config.videos import STORE_FLAG
from vllm_packcache.core.plan import VideoRequest
from vllm_packcache.core.policies import Full as KeepsAll
from vllm_packcache.hooks.roles import encoding_in
from vllm_packcache.media.processors.base import NEGATIVE, Asked, Prepared, VideoProcessor, processor_of
from vllm_packcache.videos.files import INPUT
from vllm_packcache.videos.living import Living
from vllm_packcache.videos.making import Making, kept
from vllm_packcache.videos.metrics import JobMetrics
from vllm_packcache.videos.objects import TERMINAL, video_object
from vllm_packcache.videos.request import VideoBody, asked
from vllm_packcache.videos.store import ID, Event, Job, Store, StoreError, StoreFull
from vllm_packcache.videos.webhooks import Webhooks
from vllm_packcache.web.refusals import Refusal

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.protocol import EngineClient

_LOOKS = 0.1
"""Seconds between two looks at whether the store has changed."""
_OWN_LOOKS = 1.0
"""Seconds between two looks at whether own videos are still wanted."""
_SWEEPS = 30.0
"""Seconds between two looks at what has expired, and at servers that have died."""
_WAIT = 5
"""Seconds after which a client that was sent away may ask again."""
_MAKERS = 2
"""Videos that are decoded and written at a time: more would take processors from the engine's own process."""
_ANSWERERS = 4
"""Questions to the store that are answered at a time, however long a video takes to be decoded."""

_Value = TypeVar("_Value")

logger = logging.getLogger("vllm.packcache")


def check(config: ServerConfig) -> None:
    """Check, before the model loads, that videos can be kept and that there is what makes ids of them.

    Raises:
        ConfigError: they cannot.
    """
    processor_of(config.videos.tokenizer, role=config.family.role, server=config)
    _store(config).close()


def _store(config: ServerConfig) -> Store:
    videos = config.videos
    assert videos.store is not None
    try:
        return Store(Path(videos.store), expire_seconds=videos.expire_seconds, quota_bytes=videos.quota_bytes)
    except OSError as error:
        raise ConfigError(f"{STORE_FLAG}: {error}") from None


class Jobs:
    """The videos that this API server makes, and a way to all others of the host.

    Args:
        engine: of the server.
        config: of the server.
        model: name under which the model is served.

    Raises:
        ConfigError: videos cannot be kept, or the tokenizer cannot be used.
    """

    def __init__(self, engine: EngineClient, config: ServerConfig, model: str) -> None:
        self.engine, self.config, self.model = engine, config, model
        self.limits = config.videos
        self.processor: VideoProcessor = processor_of(
            config.videos.tokenizer,
            role=config.family.role,
            server=config,
            max_model_len=engine.vllm_config.model_config.max_model_len,
        )
        self.store = _store(config)
        self.metrics = JobMetrics(self.model)
        self._webhooks = Webhooks(self.store, config.videos)
        self._makers = ThreadPoolExecutor(_MAKERS, thread_name_prefix="videos made")
        self._answerers = ThreadPoolExecutor(_ANSWERERS, thread_name_prefix="videos answered")
        self._making: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, Making] = {}
        self._helpers: list[asyncio.Task[None]] = []
        self._generation, self._changed = 0, asyncio.Event()
        self._followers, self._followed = 0, asyncio.Event()

    async def start(self) -> None:
        """Mend what an earlier server has left behind, and begin to look after what is there."""
        await self._sweep_once()
        self._helpers = [asyncio.create_task(run()) for run in (self._watch, self._sweep, self._webhooks.run)]

    async def stop(self) -> None:
        """The server stops: what is being made fails."""
        tasks = [*self._helpers, *self._making.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._makers.shutdown()
        self._answerers.shutdown()
        self.store.close()

    def admitted(self, names: Sequence[str]) -> None:
        """The engine has admitted requests.

        Args:
            names: the engine's own, which it has appended to.
        """
        for name in names:
            video = name.rpartition("-")[0]
            if (making := self._waiting.pop(video, None)) is not None:
                making.start()
            if ID.fullmatch(video):
                # Whoever's it is: what the engine says reaches one of several API servers.
                asyncio.get_running_loop().run_in_executor(self._answerers, self._begun, video)

    def _begun(self, video: str) -> None:
        # The first token says the same.
        with contextlib.suppress(StoreError):
            self.store.start(video)

    # What clients ask for.

    def about(self) -> dict[str, Any]:
        """What a page needs to know to ask for a video."""
        vllm_config, policy = self.engine.vllm_config, self.config.policy
        options = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in dataclasses.asdict(policy).items()
        }
        layout = self.config.layout
        return {
            "object": "playground",
            "model": self.model,
            "policy": self.config.name,
            "policies": {self.config.name: options, OPT_OUT: {}},
            "positions": self.config.positions,
            "tokenizer": self.processor.about(),
            "block_size": vllm_config.cache_config.block_size,
            "tokens_per_frame": None if layout is None else layout.frame_layout().tokens_per_frame,
        }

    async def create(self, body: VideoBody) -> Job:
        """Take a video on.

        Raises:
            Refusal: it cannot be made (400), or the engine takes nothing on (503).
            StoreError: there is no room for it.
        """
        wanted = await self._thread(partial(asked, body))
        prepared = await self._prepared(lambda: self.processor.prepare(wanted))
        return await self._take(body, wanted, prepared)

    async def extend(self, id: str, body: VideoBody) -> Job:
        """Take on a video that continues one that is there.

        Raises:
            Refusal: as `create`, or there is none such (404), or it is not finished (409).
        """
        job = await self._found(id)
        if job.status != "completed":
            raise Refusal(409, f"only a finished video can be continued, and this one is {job.status}", param="video")
        wanted = await self._thread(partial(asked, body))

        def longer() -> Prepared:
            try:
                before = kept(self.store, id)
            except OSError:
                raise ValueError("the files of this video are gone: create a new one") from None
            return self.processor.extend(before, wanted)

        prepared = await self._prepared(longer)
        if not body.prompt:
            body = body.model_copy(update={"prompt": job.request["prompt"]})
        return await self._take(body, wanted, prepared, extended=job)

    async def remix(self, id: str, prompt: str) -> Job:
        """Take on a video like another one, of another sentence: same seed, same picture, same options.

        Raises:
            Refusal: as `create`, or there is none such (404), or it cannot be made so (400).
        """
        job = await self._found(id)
        known = job.request.get("asked")
        if job.request.get("extended_from") or known is None:
            raise Refusal(400, "a video that continues another one cannot be made anew of a prompt: remix that one")
        picture = None
        if known.pop("picture"):
            try:
                picture = await self._thread(lambda: np.array(Image.open(self.store.path(id, INPUT)).convert("RGB")))
            except OSError:
                raise Refusal(
                    400, "the picture that this video began with is not there any more: create a new video"
                ) from None
        body = VideoBody.model_validate_json(json.dumps({**known, "prompt": prompt}))
        wanted = dataclasses.replace(await self._thread(partial(asked, body)), picture=picture)
        prepared = await self._prepared(lambda: self.processor.prepare(wanted))
        return await self._take(body, wanted, prepared, remixed=job)

    async def _found(self, id: str) -> Job:
        """A video that another one is to be made of.

        Raises:
            Refusal: there is none (404), or another model has made it (400).
        """
        job = await self._thread(lambda: self.store.get(id))
        if job is None:
            raise Refusal(404, "there is no video of this id: it was never asked for, deleted, or has expired")
        if job.request.get("model") != self.model:
            made_by = shown(job.request.get("model"))
            raise Refusal(400, f"this video was made by {made_by}, and {self.model} is served here: create a new one")
        return job

    def shown(self, job: Job) -> dict[str, Any]:
        """A video as clients see it."""
        return video_object(job)

    async def delete(self, id: str) -> bool:
        """Forget a video, and stop making it; whether there was one."""
        there = await self._thread(lambda: self.store.delete(id))
        self._leave(id)
        return there

    async def follow(self, id: str, after: int) -> AsyncGenerator[Event | None, None]:
        """What happens to a video, from behind event ``after`` on; None now and then, where nothing does.

        It ends with the video's end, or when it is deleted.
        """
        self._followers += 1
        self._followed.set()
        try:
            while True:
                generation = self._generation
                # In this order: what is said of a job that has ended by now is among the events.
                job = await self._thread(partial(self.store.get, id))
                events = await self._thread(partial(self.store.events, id, after))
                if job is None or events is None:
                    return
                for event in events:
                    after = event.seq
                    yield event
                    if event.kind in TERMINAL:
                        return
                if events:
                    continue
                if job.ended:
                    return
                if not await self._changes(generation):
                    yield None
        finally:
            self._followers -= 1

    async def _changes(self, generation: int) -> bool:
        """Whether the store changes before a sign of life is due."""
        deadline = time.monotonic() + self.limits.heartbeat_seconds
        while self._generation == generation:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                return False
        return True

    # How a video is taken on.

    async def _prepared(self, prepare: Callable[[], Prepared]) -> Prepared:
        try:
            return await self._thread(prepare)
        except ValueError as error:
            raise Refusal(400, _one_line(error)) from None
        except OSError as error:
            raise Refusal(400, f"input_reference: {' '.join(str(error).split())}", param="input_reference") from None

    async def _take(
        self, body: VideoBody, wanted: Asked, prepared: Prepared, *, remixed: Job | None = None,
        extended: Job | None = None,
    ) -> Job:  # fmt: skip
        try:
            params = self._params(prepared)
            made = self.config.request_of(params, prepared.prompt_ids, len(prepared.prompt_ids))
            assert made is not None, "every video has options of one"
            vllm_config = self.engine.vllm_config
            encoding = encoding_in(vllm_config, self.config)
            living = Living(made, prepared.prompt_ids, vllm_config.cache_config.block_size, encoding)
            await self._check(prepared, params)
        except ValueError as error:
            raise Refusal(400, _one_line(error)) from None
        request = {
            "model": self.model,
            "prompt": body.prompt,
            "size": "x".join(map(str, prepared.size)) if prepared.pictures else None,
            "seconds": f"{prepared.frames / prepared.fps:g}",
            "fps": prepared.fps,
            "frames": prepared.frames,
            "options": {"policy": self._policy_of(made), **_guidance_of(made, body, extended), **body.options},
            "notes": list(prepared.notes),
            "remixed_from": None if remixed is None else remixed.id,
            "extended_from": None if extended is None else extended.id,
            "asked": _again(body, wanted),
        }
        total = prepared.made * prepared.tokens_per_frame
        most = self.limits.most_unfinished
        job: Job = await self._thread(lambda: self.store.create(request, total, most_waiting=most))
        making = Making(self.store, job.id, prepared, self.processor.decoder(prepared), living)
        try:
            await self._thread(partial(making.note, wanted.picture))
        except OSError:
            await self._thread(partial(self.store.delete, job.id))
            raise
        task = asyncio.create_task(self._make(job.id, prepared, params, making))
        self._making[job.id], self._waiting[job.id] = task, making
        self._followed.set()
        task.add_done_callback(partial(self._forget, job.id))
        return job

    def _policy_of(self, made: VideoRequest) -> str:
        """The policy of a request: the server's, or none."""
        return OPT_OUT if type(made.streams[0].plan.policy) is KeepsAll else self.config.name

    def _params(self, prepared: Prepared) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **prepared.sampling,
            max_tokens=prepared.made * prepared.tokens_per_frame,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=prepared.tokens_per_frame,
            extra_args={f"{REQUEST_PREFIX}{name}": value for name, value in prepared.options.items()},
        )

    async def _check(self, prepared: Prepared, params: SamplingParams) -> None:
        """Ask vLLM what it would say of the request, and with it our own plan: afterwards nobody could be told.

        Raises:
            ValueError: it is refused.
            Refusal: the engine is full, or has stopped.
        """
        from vllm.inputs.engine import tokens_input

        engine: Any = self.engine
        if engine.errored:
            raise Refusal(503, "the engine has stopped: the server has to be started again", wait=_WAIT)
        tasks = await engine.get_supported_tasks()
        engine.input_processor.process_inputs(
            "video", tokens_input(list(prepared.prompt_ids)), params.clone(), supported_tasks=tasks
        )
        try:
            engine.check_admission()
        except Exception as error:  # Of classes that vLLM does not publish.
            raise Refusal(503, _one_line(error), wait=_WAIT) from None

    # How it is made.

    async def _make(self, name: str, prepared: Prepared, params: SamplingParams, making: Making) -> None:
        queued = time.monotonic()
        try:
            why = await self._made(name, prepared, params, making, queued)
        except asyncio.CancelledError:
            # Nobody wants it any more, or the server stops: a video that is deleted has no row to be told of it.
            await self._fail(name, "server_stopped", "the server was stopped while this video was made")
            raise
        except Exception as error:
            why = _why(error)
            if why[0] == "server_error":
                logger.exception("Video %s failed", name)
        finally:
            await self._thread(making.close, self._makers)
        if why is not None:
            await self._fail(name, *why)
        await self._count()

    async def _made(
        self, name: str, prepared: Prepared, params: SamplingParams, making: Making, queued: float
    ) -> tuple[str, str] | None:
        """Make a video.

        Returns:
            Why it failed: a code and a sentence; None: it did not, or nobody wants it.
        """
        from vllm.inputs.engine import tokens_input

        if not await self._going_on(making.begin):
            return None
        size, begun = prepared.tokens_per_frame, False
        ids: list[int] = []
        made = 0
        frames: asyncio.Queue[tuple[list[int], float] | None] = asyncio.Queue()
        writing = asyncio.create_task(self._write(frames, making))
        outputs = self.engine.generate(tokens_input(list(prepared.prompt_ids)), params, name)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if not begun:
                        begun = True
                        making.start()
                        self.metrics.began(time.monotonic() - queued)
                        # The first frame says it too.
                        with contextlib.suppress(StoreError):
                            await self._thread(lambda: self.store.start(name))
                    ids += output.outputs[0].token_ids
                    if output.outputs[0].finish_reason in ("error", "abort"):
                        return "engine_error", "the engine gave this video up: see the server's log"
                    while len(ids) >= size:
                        frames.put_nowait((ids[:size], time.monotonic()))
                        del ids[:size]
                        made += 1
                    if writing.done():
                        break
            frames.put_nowait(None)
            if not await writing:
                return None
        finally:
            if not writing.done():
                writing.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await writing
        if made < prepared.made:
            return "engine_error", f"the engine ended this video after {made} of {prepared.made} frames"
        if await self._going_on(making.finish):
            self.metrics.ended("completed", time.monotonic() - queued)
        return None

    async def _write(self, frames: asyncio.Queue[tuple[list[int], float] | None], making: Making) -> bool:
        """Write frames as they come; False: nobody wants them any more."""
        last: float | None = None
        while (frame := await frames.get()) is not None:
            ids, arrived = frame
            if not await self._going_on(partial(making.add, ids, arrived)):
                return False
            if last is not None:
                self.metrics.frame(arrived - last)
            last = arrived
        return True

    async def _fail(self, name: str, code: str, message: str) -> None:
        try:
            if await self._thread(lambda: self.store.fail(name, code, message)):
                self.metrics.ended("failed", None)
        except StoreError as error:
            # A later look at what is to be mended writes it.
            logger.warning("Video %s failed (%s), which could not be written: %s", name, message, error)

    # What is looked after.

    async def _watch(self) -> None:
        """See changes of the store, whoever makes them, while anybody waits for some."""
        version, looked = -1, 0.0
        while True:
            if not self._followers and not self._making:
                self._followed.clear()
                await self._followed.wait()
            # A disk that is full or a store that is locked is told to who asks.
            with contextlib.suppress(StoreError):
                now = await self._thread(self.store.version)
                if now != version:
                    version = now
                    self._generation += 1
                    self._changed.set()
                    self._changed = asyncio.Event()
                if self._making and time.monotonic() - looked > _OWN_LOOKS:
                    looked = time.monotonic()
                    for name in list(self._making):
                        if not await self._thread(partial(self.store.exists, name)):
                            self._leave(name)
                    await self._count()
            await asyncio.sleep(_LOOKS)

    def _forget(self, name: str, task: object) -> None:
        del task
        self._making.pop(name, None)
        self._waiting.pop(name, None)

    def _leave(self, name: str) -> None:
        """Stop making a video."""
        task = self._making.get(name)
        if task is not None:
            task.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEPS)
            await self._sweep_once()

    async def _sweep_once(self) -> None:
        try:
            swept = await self._thread(self.store.sweep)
        except (StoreError, OSError) as error:
            logger.warning("Videos cannot be looked after: %s", _one_line(error))
            return
        for _ in swept.stopped:
            self.metrics.ended("failed", None)
        if swept.stopped:
            logger.warning(
                "%d videos failed, whose server is gone: %s", len(swept.stopped), ", ".join(swept.stopped[:8])
            )
        await self._count()

    async def _count(self) -> None:
        """Tell what the store has, for who watches; what cannot be known now is told later."""
        with contextlib.suppress(StoreError):
            self.metrics.counted(await self._thread(self.store.counts))

    # Threads.

    async def _thread(self, call: Callable[[], _Value], pool: ThreadPoolExecutor | None = None) -> _Value:
        """Call what may block. It is waited for even if nobody waits any more: it may hold files."""
        future = asyncio.get_running_loop().run_in_executor(pool or self._answerers, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await future
            raise

    async def _going_on(self, call: Callable[[], bool]) -> bool:
        """Call what makes a video go on; False: it is gone, and so are its files."""
        try:
            return await self._thread(call, self._makers)
        except FileNotFoundError:
            return False


def _why(error: Exception) -> tuple[str, str]:
    """Why a video failed: a code for programs and a sentence for people."""
    from vllm.v1.engine.exceptions import EngineDeadError

    said = _one_line(error)[:200]
    if isinstance(error, EngineDeadError):
        return "engine_dead", "the engine stopped while this video was made: see the server's log"
    if isinstance(error, StoreFull):
        return "storage_full", said
    if isinstance(error, OSError):
        return "storage_failed", f"the video could not be written: {error.strerror or said}"
    if isinstance(error, StoreError):
        return "storage_failed", said
    if isinstance(error, ValueError):
        return "invalid_frame", said
    return "server_error", f"{type(error).__name__}: {said}"


def _guidance_of(made: VideoRequest, body: VideoBody, extended: Job | None) -> dict[str, Any]:
    """What guides a causal video, for who looks at it: not only what its own request says."""
    if made.guidance == 1:
        return {}
    negative = body.negative_prompt
    if not negative and extended is not None and NEGATIVE not in body.options:
        negative = extended.request["options"].get("negative_prompt")
    return {"guidance": made.guidance, **({"negative_prompt": negative} if negative else {})}


def _again(body: VideoBody, wanted: Asked) -> dict[str, Any] | None:
    """What it takes to make the same of another prompt; None: a file that is gone by then."""
    if wanted.clip is not None:
        return None
    said = body.model_dump(mode="json", exclude={"prompt", "picture", "clip", "model"}, exclude_none=True)
    return {**said, "picture": wanted.picture is not None}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
