"""The page at ``/`` and its files under ``/web``: plain files of this package, no build step, nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent.parent / "web"
HEADERS = {
    "cache-control": "no-cache",  # kept, but asked about: the ETag answers 304
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src blob:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "permissions-policy": "camera=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Files(StaticFiles):
    """A folder's files with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file, or 304 where the client has it already."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


router = APIRouter(include_in_schema=False)
files = Files(directory=FOLDER)


@router.get("/")
async def page(request: Request) -> Response:
    """The page itself."""
    return await files.get_response("index.html", request.scope)


def install(app: FastAPI) -> None:
    """Serve the page with ``app``."""
    app.include_router(router)
    app.mount("/web", files)
