"""Pages of the package: files with headers under which they load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.resources.abc import Traversable

from fastapi import FastAPI
from fastapi.responses import Response

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def headers(**sources: str) -> dict[str, str]:
    """Of a file of a page.

    Args:
        sources: more than the page's own server from which something comes, such as ``img="data: blob:"``.
    """
    own = "'self'"
    allowed = {"script": own, "style": own, "img": own, "connect": own}
    allowed |= {kind: f"{allowed.get(kind, '')} {more}".strip() for kind, more in sources.items()}
    policy = "".join(f"{kind}-src {allowed[kind]}; " for kind in allowed)
    return {
        # Nothing from elsewhere, nothing within the page itself, and in no frame of another page.
        "Content-Security-Policy": (
            f"default-src 'none'; {policy}base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # A server of another version has another page.
        "Cache-Control": "no-cache",
    }


def page_of(folder: Traversable, page: str, path: str) -> dict[str, tuple[str, str]]:
    """The files of a page: their paths and what they are.

    Args:
        folder: where they are.
        page: the file that is at ``path`` itself; the others are beneath.
        path: of the page.
    """
    names = sorted(file.name for file in folder.iterdir() if file.name.rpartition(".")[2] in _KINDS)
    return {name: (path if name == page else f"{path}/{name}", _KINDS[name.rpartition(".")[2]]) for name in names}


def add_page(app: FastAPI, folder: Traversable, page: Mapping[str, tuple[str, str]], more: Mapping[str, str]) -> None:
    """Serve the files of a page.

    Each has one path of its own: no name of a client's becomes that of a file.

    Args:
        app: of the server.
        folder: where the files are.
        page: of each file its path and what it is.
        more: headers of each answer.
    """
    for name, (path, kind) in page.items():
        answer = _file(folder.joinpath(name).read_bytes(), kind, more)
        app.add_api_route(path, answer, methods=["GET"], response_model=None, include_in_schema=False)


def _file(content: bytes, kind: str, more: Mapping[str, str]) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=dict(more))

    return answer
