"""The pages for browsers: the playground at / and Swagger UI at /docs, files of this package.

They are public, and call the routes that other clients call, with the key that a person enters.
"""

from functools import cache
from pathlib import Path

from fastapi import Response
from fastapi.routing import APIRoute

from app.utils.errors import NotFoundError

# A page takes nothing from another server, and holds no script or style of its own.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def playground_routes() -> list[APIRoute]:
    """The playground, which talks to the model."""
    return _routes("/", "playground")


def documentation_routes() -> list[APIRoute]:
    """Swagger UI, which shows /openapi.json."""
    return _routes("/docs", "docs")


def _routes(address: str, folder: str) -> list[APIRoute]:
    """Routes of a folder's index.html and of the other files in it, which no document lists."""
    files = _files(folder)

    async def page() -> Response:
        return files["index.html"]

    async def file(name: str) -> Response:
        if name not in files:
            raise NotFoundError
        return files[name]

    return [
        APIRoute(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)
        for path, endpoint in ((address, page), (f"/{folder}/{{name:path}}", file))
    ]


@cache
def _files(folder: str) -> dict[str, Response]:
    """The responses of a folder's files by their names; read once, so that no request reads."""
    root = Path(__file__).parent / folder
    found = {}
    for path in root.rglob("*.*"):
        # Large files are packed, and sent so.
        name = path.relative_to(root).as_posix().removesuffix(".gz")
        if kind := _KINDS.get(Path(name).suffix):
            headers = {"Content-Security-Policy": POLICY}
            if path.suffix == ".gz":
                headers["Content-Encoding"] = "gzip"
            found[name] = Response(path.read_bytes(), media_type=kind, headers=headers)
    return found
