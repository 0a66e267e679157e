"""Webhooks: what is sent, how often it is tried, and that a restart loses none."""

from __future__ import annotations

import asyncio
import base64
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.videos.life import store_of
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.videos import VideosConfig, Webhook
from vllm_packcache.videos import webhooks as module
from vllm_packcache.videos.store import Job, Store, StoreBusy
from vllm_packcache.videos.webhooks import PAUSES, Webhooks, signed

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"fedcba9876543210").decode()
URL = "https://told.test/hook"
EVENT = "evt_" + "0" * 32


class Clock:
    now = 1_800_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with closing(store_of(tmp_path / "store", clock=clock, expire_seconds=None)) as store:
        yield store


def config_of(*webhooks: Webhook) -> VideosConfig:
    return VideosConfig(webhooks=webhooks)


HOOK = Webhook(url=URL, secret=SECRET)


def ended(store: Store, how: str = "completed") -> Job:
    job = store.create({}, 1, most_waiting=100)
    assert store.complete(job.id, {}) if how == "completed" else store.fail(job.id, "code", "message")
    return job


Answer = Callable[[httpx.Request], Any]


def delivered(hooks: Webhooks, answer: Answer, webhook: Webhook = HOOK) -> list[httpx.Request]:
    """What is sent to an address that answers like this."""
    requests: list[httpx.Request] = []

    async def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        answered = answer(request)
        return await answered if asyncio.iscoroutine(answered) else answered

    async def work() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle), follow_redirects=True) as client:
            await hooks.deliver(client, webhook)

    asyncio.run(asyncio.wait_for(work(), 30))
    return requests


def ok(request: httpx.Request) -> httpx.Response:
    return httpx.Response(204)


def unwrap(body: bytes, headers: dict[str, str], secret: str = SECRET) -> Any:
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    return client.webhooks.unwrap(body.decode(), headers, secret=secret)


@contextmanager
def listening(*answers: int) -> Iterator[tuple[str, queue.Queue[tuple[dict[str, str], bytes]]]]:
    """A server that answers so, and then 200: where it is, and what it is sent."""
    sent: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue()
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            sent.put(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(left.pop(0) if left else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", sent
        server.shutdown()


@asynccontextmanager
async def running(hooks: Webhooks) -> AsyncIterator[None]:
    task = asyncio.create_task(hooks.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("how", ["completed", "failed"])
def test_the_official_client_takes_what_is_sent(tmp_path: Path, how: str) -> None:
    # By the clock of this machine, since the client looks at it.
    with closing(store_of(tmp_path)) as store, listening() as (url, sent):
        hooks = Webhooks(store, config_of(Webhook(url=url, secret=SECRET)))
        job = ended(store, how)
        assert store.get(job.id).webhooks_due == [url]

        async def work() -> tuple[dict[str, str], bytes]:
            async with running(hooks):
                received = await asyncio.to_thread(sent.get, timeout=20)
                while store.get(job.id).webhooks_due:
                    await asyncio.sleep(0)
                return received

        headers, body = asyncio.run(asyncio.wait_for(work(), 30))
        event = unwrap(body, headers)
        assert (event.type, event.data.id, event.object) == (f"video.{how}", job.id, "event")
        assert event.id == headers["webhook-id"]
        assert event.id.startswith("evt_")
        assert event.created_at == store.get(job.id).completed_at
        assert headers["content-type"] == "application/json"
        assert set(json.loads(body)) == {"id", "object", "type", "created_at", "data"}
        for wrong in ((body + b" ", headers, SECRET), (body, {**headers, "webhook-id": "evt_1"}, SECRET)):
            with pytest.raises(openai.InvalidWebhookSignatureError):
                unwrap(*wrong)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrap(body, headers, OTHER_SECRET)
        assert sent.empty()


def test_the_signature_is_that_of_the_standard() -> None:
    # By another implementation: printf %s 'evt_1.1700000000.{}' | openssl dgst -sha256 -hmac 0123456789abcdef -binary
    assert signed(SECRET, "evt_1", 1_700_000_000, b"{}") == {
        "content-type": "application/json",
        "webhook-id": "evt_1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": "v1,5/6qDyjZnwbEUs9I9I8i7BGKidfp/4yA/2sCbBGqvwc=",
    }


def test_it_is_tried_five_times_within_about_an_hour(store: Store, clock: Clock) -> None:
    hooks = Webhooks(store, config_of(HOOK))
    job = ended(store)
    begun, tries = clock.now, []
    for pause in (*PAUSES, None):
        (request,) = delivered(hooks, lambda request: httpx.Response(500))
        tries.append((request.headers["webhook-id"], request.content, request.headers["webhook-timestamp"]))
        assert int(request.headers["webhook-timestamp"]) == int(clock.now)
        if pause is not None:
            assert store.get(job.id).webhooks_due == [URL]
            clock.now += pause - 1
            assert delivered(hooks, ok) == []
            clock.now += 1
    assert store.get(job.id).webhooks_due == []
    assert len(tries) == 5
    # The event is the same each time, and each is signed anew.
    assert len({event for event, *_ in tries}) == len({body for _, body, _ in tries}) == 1
    assert len({timestamp for *_, timestamp in tries}) == 5
    assert 3000 < clock.now - begun <= 3600
    clock.now += 10**5
    assert delivered(hooks, ok) == []


def test_one_that_comes_through_later_ends_it(store: Store, clock: Clock) -> None:
    hooks = Webhooks(store, config_of(HOOK))
    job = ended(store)
    assert len(delivered(hooks, lambda request: httpx.Response(503))) == 1
    clock.now += PAUSES[0]
    assert len(delivered(hooks, ok)) == 1
    assert store.get(job.id).webhooks_due == []
    clock.now += 10**5
    assert delivered(hooks, ok) == []


async def silent(request: httpx.Request) -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody listens", request=request)


def unspeakable(request: httpx.Request) -> httpx.Response:
    # As Python looks up a host whose name has too long a part.
    ("x" * 70).encode("idna")
    raise AssertionError


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda request: httpx.Response(404), "it answered 404"),
        (lambda request: httpx.Response(307, headers={"location": "https://elsewhere.test/"}), "it answered 307"),
        (refuse, "nobody listens"),
        (silent, "it did not answer within"),
        (unspeakable, "label"),
    ],
)
def test_what_goes_wrong_is_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, logged: list[str], answer: Answer, said: str
) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.05)
    hooks = Webhooks(store, config_of(HOOK))
    job = ended(store)
    requests = delivered(hooks, answer)
    # Nobody else is told, wherever the answer points to.
    assert [str(request.url) for request in requests] == [URL]
    (line,) = logged
    assert said in line
    assert f"{job.id} was not delivered" in line
    assert "again in 10 s" in line
    assert store.get(job.id).webhooks_due == [URL]


def test_only_what_an_address_wants_is_sent(store: Store) -> None:
    failures = Webhook(url="https://other.test/", secret=OTHER_SECRET, events=("video.failed",))
    hooks = Webhooks(store, config_of(HOOK, failures))
    good, bad = ended(store), ended(store, "failed")
    both, one = delivered(hooks, ok), delivered(hooks, ok, failures)
    assert [json.loads(request.content)["data"]["id"] for request in both] == [good.id, bad.id]
    assert [json.loads(request.content)["data"]["id"] for request in one] == [bad.id]
    # The same event, signed for each.
    assert both[1].headers["webhook-id"] == one[0].headers["webhook-id"] != both[0].headers["webhook-id"]
    assert both[1].headers["webhook-signature"] != one[0].headers["webhook-signature"]


def test_each_is_taken_by_one_server(store: Store, clock: Clock) -> None:
    with closing(store_of(store.folder, clock=clock)) as other:
        for each in (store, other):
            Webhooks(each, config_of(HOOK))
        jobs = {ended(each).id for each in (store, other) for _ in range(20)}
        taken: list[str] = []

        def take(each: Store) -> None:
            for _ in range(40):
                taken.extend(delivery.video for delivery in each.due(URL, limit=3))

        threads = [threading.Thread(target=take, args=(each,)) for each in (store, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == sorted(jobs)


def test_what_a_dead_server_had_taken_is_taken_again(store: Store, clock: Clock) -> None:
    Webhooks(store, config_of(HOOK))
    job = ended(store)
    with closing(store_of(store.folder, clock=clock)) as other:
        (first,) = store.due(URL)
        assert other.due(URL) == []
        clock.now += 60
        (second,) = other.due(URL)
        assert (second.event, second.tries) == (first.event, first.tries + 1)
        # Whoever was too slow changes nothing any more.
        store.done(first)
        store.done(first, again=0)
        assert other.due(URL) == []
        assert store.get(job.id).webhooks_due == [URL]
        other.done(second)
        assert store.get(job.id).webhooks_due == []


def test_a_restart_loses_none(tmp_path: Path, clock: Clock) -> None:
    with closing(store_of(tmp_path, clock=clock)) as store:
        Webhooks(store, config_of(HOOK))
        done, begun = ended(store), store.create({}, 1, most_waiting=9)
    with closing(store_of(tmp_path, clock=clock)) as store:
        hooks = Webhooks(store, config_of(HOOK))
        # That the server has stopped is told, too.
        assert store.sweep().stopped == [begun.id]
        events = [json.loads(request.content) for request in delivered(hooks, ok)]
        assert [(event["type"], event["data"]["id"]) for event in events] == [
            ("video.completed", done.id),
            ("video.failed", begun.id),
        ]


def test_what_nobody_is_told_any_more_goes(store: Store, clock: Clock) -> None:
    Webhooks(store, config_of(HOOK))
    deleted, old = ended(store), ended(store)
    store.delete(deleted.id)
    assert [delivery.video for delivery in store.due(URL)] == [old.id]
    clock.now += 86_399
    store.sweep()
    assert store.get(old.id).webhooks_due == [URL]
    clock.now += 2
    store.sweep()
    assert store.get(old.id).webhooks_due == []


def test_an_address_that_is_silent_keeps_no_other_one_waiting(tmp_path: Path) -> None:
    with (
        closing(store_of(tmp_path)) as store,
        socket.create_server(("127.0.0.1", 0)) as silent,
        listening() as (url, sent),
    ):
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        silent.settimeout(20)
        hooks = Webhooks(store, config_of(Webhook(url=dead, secret=SECRET), Webhook(url=url, secret=SECRET)))

        async def work() -> None:
            async with running(hooks):
                # It is asked, and does not answer.
                ended(store)
                connection, _ = await asyncio.to_thread(silent.accept)
                with connection:
                    await asyncio.to_thread(sent.get, timeout=20)
                    later = ended(store)
                    _, body = await asyncio.to_thread(sent.get, timeout=20)
                    assert json.loads(body)["data"]["id"] == later.id

        asyncio.run(asyncio.wait_for(work(), 40))


def test_a_store_that_cannot_be_read_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(module, "_LOOKS", 0.001)
    with closing(store_of(tmp_path)) as store, listening(500) as (url, sent):
        hooks = Webhooks(store, config_of(Webhook(url=url, secret=SECRET)))
        ended(store)
        due, refused = store.due, iter(range(3))

        def sometimes(address: str) -> Any:
            if next(refused, None) is not None:
                raise StoreBusy("kept locked")
            return due(address)

        monkeypatch.setattr(store, "due", sometimes)

        async def work() -> None:
            async with running(hooks):
                await asyncio.to_thread(sent.get, timeout=20)

        asyncio.run(asyncio.wait_for(work(), 30))
        assert sum("Webhooks have to wait: kept locked" in line for line in logged) == 1


def test_without_addresses_nothing_is_kept(store: Store) -> None:
    hooks = Webhooks(store, config_of())
    assert store.get(ended(store).id).webhooks_due == []

    async def work() -> None:
        async with running(hooks):
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_an_address_is_named_once(store: Store) -> None:
    with pytest.raises(ConfigError, match="is named twice"):
        Webhooks(store, config_of(HOOK, Webhook(url=URL, secret=OTHER_SECRET)))
