"""The pages for browsers: the playground at / and Swagger UI at /docs, files of this package.

They are public, and call the routes that other clients call, with the key that a person enters.
"""

import mimetypes
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.utils.errors import NotFoundError

# A page takes nothing from another server, and holds no script or style of its own.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_SENT = (".html", ".css", ".js", ".gz")


def playground_routes() -> list[Route]:
    """The playground, which talks to the model."""
    return _routes("/", "playground")


def documentation_routes() -> list[Route]:
    """Swagger UI, which shows /openapi.json."""
    return _routes("/docs", "docs")


def _routes(address: str, folder: str) -> list[Route]:
    """Routes of a folder's index.html and of the other files in it, which no document lists."""

    async def page(_: Request) -> Response:
        return _files(folder)["index.html"]

    async def file(request: Request) -> Response:
        found = _files(folder).get(request.path_params["name"])
        if found is None:
            raise NotFoundError
        return found

    _files(folder)
    return [
        Route(address, page, include_in_schema=False),
        Route(f"/{folder}/{{name:path}}", file, include_in_schema=False),
    ]


@cache
def _files(folder: str) -> dict[str, Response]:
    """The responses of a folder's files by their names; read once, so that no request reads."""
    root = Path(__file__).parent / folder
    return {
        path.relative_to(root).as_posix().removesuffix(".gz"): _response(path)
        for path in root.rglob("*")
        if path.suffix in _SENT
    }


def _response(path: Path) -> Response:
    kind, encoding = mimetypes.guess_type(path.name)
    headers = {"Content-Security-Policy": POLICY}
    if encoding:
        headers["Content-Encoding"] = encoding
    return Response(path.read_bytes(), media_type=kind, headers=headers)
