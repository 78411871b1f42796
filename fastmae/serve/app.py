"""The HTTP interface: a plain FastAPI app over a ``Service``. It knows nothing of Ray, so tests call it directly."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastmae.config.serve import ServeConfig
from fastmae.data.plan import central_share
from fastmae.data.sample import View
from fastmae.errors import UserError
from fastmae.evaluate.inpaint import Inpainting, count_tiles
from fastmae.evaluate.reconstruct import WHITE, touched
from fastmae.messages import logger
from fastmae.serve.answers import Ask, Service, Task
from fastmae.serve.metrics import CONTENT_TYPE, Metrics
from fastmae.serve.uploads import RefusedError, is_token, picture_of_upload, pixels_of_upload, size_of_upload

PAGE = Path(__file__).with_name("page.html")
PREFIX = "/v1/"
DECODERS = 2
"""Uploads that a replica decodes at once."""
MOST_K = 1000
MOST_HEADERS = 100
MOST_ROUNDS, MOST_TILES = 32, 512
"""Of a whole picture to inpaint: rounds, and tiles of all rounds together."""
PARTS = 4
"""Parts of a multipart form, at most."""
FORM = "multipart/form-data"
BEARER = HTTPBearer(auto_error=False, description="The token of the service, if it asks for one.")

Answer = Callable[[Ask], Awaitable[Any]]
K = Annotated[int, Query(ge=1, le=MOST_K, description="How many are answered.")]
Ratio = Annotated[float | None, Query(gt=0, lt=1, description="Share of the patches that is masked.")]
Seed = Annotated[int, Query(ge=0, lt=2**63, description="The number from which the mask follows.")]
Show = Annotated[
    Literal["original", "masked", "reconstructed", "all"],
    Query(description="Which pictures are answered; all: side by side."),
]
ShowFilled = Annotated[
    Literal["original", "masked", "reconstructed", "all", "whole"],
    Query(description="Of the crop that the model sees, or the whole picture, filled in tiles."),
]
Rounds = Annotated[int, Query(ge=1, le=MOST_ROUNDS, description="Predictions that are averaged for a whole picture.")]
ShowClasses = Annotated[Literal["map", "overlay"], Query(description="Numbers, or colours over the picture.")]


def alone(service: Service) -> Answer:
    """Returns what computes each image alone, in a thread."""

    async def answer(ask: Ask) -> Any:
        return (await asyncio.to_thread(service.answer, [ask]))[0]

    return answer


def _body(*names: str) -> dict[str, Any]:
    """Describes for the OpenAPI page what is uploaded: the bytes of a file, or a form."""
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": dict.fromkeys(names, binary), "required": list(names)}
    content: dict[str, Any] = {FORM: {"schema": form}}
    if len(names) == 1:
        content = {"application/octet-stream": {"schema": binary}, "image/*": {"schema": binary}} | content
    return {"requestBody": {"required": True, "content": content}}


_PNG: dict[str, Any] = {"responses": {200: {"content": {"image/png": {}}, "description": "A picture."}}}


def make_app(
    service: Service,
    answer: Answer,
    *,
    token: str | None = None,
    metrics: Metrics | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Returns the app.

    Args:
        answer: computes the answer to one image, with others of its time or alone.
        token: what requests must carry; None: nothing.
        is_stopping: whether the service takes no new requests, as it is about to end.
    """
    config, metrics = service.config, metrics or Metrics()
    app = FastAPI(
        title="fastmae", version="1", description="A masked autoencoder at work.", docs_url=None, redoc_url=None
    )
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    async def allowed(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        if token is None and not _is_of_this_machine(request):
            raise RefusedError(403, "the service has no token, so only its own machine may ask; give it one")
        if token is not None and (given is None or not is_token(given.credentials, token)):
            what = "no token was sent" if given is None else "the token is wrong"
            raise RefusedError(401, f"{what}; send the header Authorization: Bearer TOKEN")

    guarded: dict[str, Any] = {"dependencies": [Depends(allowed)], "tags": ["images"]}

    async def ask_of(request: Request, task: Task, **options: Any) -> Any:
        if task not in service.tasks:
            raise RefusedError(404, f"{task} is not served: {service.why_not(task)}")
        names = ("image", "mask") if task == "inpaint" else ("image",)
        files = await uploaded(request, names)
        loop = asyncio.get_running_loop()
        if options.get("show") == "whole":
            whole, hole = await loop.run_in_executor(
                pool, _whole_and_hole, service, files["image"], files["mask"], options["rounds"]
            )
            try:
                return await answer(Ask(task, whole, mask=hole, **options))
            except UserError as error:
                raise RefusedError(400, str(error)) from error
        if task == "inpaint":
            options["mask"] = await loop.run_in_executor(pool, _mask_of, service, files["image"], files["mask"])
        size, reading = service.model.img_size, service.reading
        if task == "segment":
            whole = await loop.run_in_executor(pool, picture_of_upload, files["image"], reading, config.max_pixels)
            return await answer(Ask(task, whole, **options))
        pixels = await loop.run_in_executor(pool, pixels_of_upload, files["image"], reading, size, config.max_pixels)
        return await answer(Ask(task, pixels, **options))

    @app.post(PREFIX + "embed", openapi_extra=_body("image"), **guarded)
    async def embed(request: Request) -> Any:
        """The features of an image."""
        return JSONResponse(await ask_of(request, "embed"))

    @app.post(PREFIX + "search", openapi_extra=_body("image"), **guarded)
    async def search(request: Request, k: K = 5) -> Any:
        """The images of the index that are most similar to an image, by the cosine of their features."""
        return JSONResponse(await ask_of(request, "search", k=k))

    @app.post(PREFIX + "classify", openapi_extra=_body("image"), **guarded)
    async def classify(request: Request, k: K = 5) -> Any:
        """The classes of an image, the likeliest first: of the classifier, or by the vote of the nearest images."""
        return JSONResponse(await ask_of(request, "classify", k=k))

    @app.post(PREFIX + "segment", openapi_extra=_body("image"), **_PNG, **guarded)
    async def segment(request: Request, show: ShowClasses = "map") -> Any:
        """The class of each pixel of a picture of any size: numbers with a palette, or colours over the picture."""
        return Response(await ask_of(request, "segment", show=show), media_type="image/png")

    @app.post(PREFIX + "reconstruct", openapi_extra=_body("image"), **_PNG, **guarded)
    async def reconstruct(request: Request, mask_ratio: Ratio = None, seed: Seed = 0, show: Show = "all") -> Any:
        """What the model makes of an image of which it sees some patches alone."""
        if mask_ratio is not None and "reconstruct" in service.tasks:
            try:
                service.visible(mask_ratio)
            except ValueError as error:
                raise RefusedError(422, f"mask_ratio {mask_ratio}: {error}; choose another ratio") from error
        png = await ask_of(request, "reconstruct", mask_ratio=mask_ratio, seed=seed, show=show)
        return Response(png, media_type="image/png")

    @app.post(PREFIX + "inpaint", openapi_extra=_body("image", "mask"), **_PNG, **guarded)
    async def inpaint(
        request: Request, show: ShowFilled = "reconstructed", rounds: Rounds = Inpainting.rounds, seed: Seed = 0
    ) -> Any:
        """What the model puts where the mask is white. The mask has the size of the image."""
        png = await ask_of(request, "inpaint", show=show, rounds=rounds, seed=seed)
        return Response(png, media_type="image/png")

    @app.get(PREFIX + "model", **guarded)
    async def model() -> Any:
        """What the model is, and what can be asked of it."""
        limits = {name: getattr(config, name) for name in ("max_bytes", "max_pixels", "timeout", "max_requests")}
        return service.about | {"limits": limits}

    @app.get("/health", tags=["service"])
    async def health() -> Any:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["service"])
    async def ready() -> Any:
        """Whether new requests are taken: 200, or 503 once the service is about to stop."""
        if is_stopping():
            raise RefusedError(503, "the service is stopping")
        return {"status": "ready"}

    @app.get("/metrics", tags=["service"], dependencies=[Depends(allowed)])
    async def figures() -> Any:
        """Figures for Prometheus."""
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> Any:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return _refusal(error.status, error.reason)

    @app.exception_handler(HTTPException)
    async def of_starlette(_: Request, error: HTTPException) -> Response:
        return _refusal(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def of_fastapi(_: Request, error: RequestValidationError) -> Response:
        said = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
        return _refusal(422, "; ".join(said))

    app.add_middleware(Gate, config=config, metrics=metrics, is_stopping=is_stopping)
    return app


_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
}


def _is_of_this_machine(request: Request) -> bool:
    """Whether a request came from this machine. Files for ``serve deploy`` say by themselves where HTTP listens."""
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:  # no address: a socket of this machine
        return True
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _refusal(status: int, reason: str) -> JSONResponse:
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(status)
    return JSONResponse({"error": reason}, status, headers=headers)


async def uploaded(request: Request, names: Sequence[str]) -> dict[str, bytes]:
    """Reads the body of a request: a form with files of these names, or the bytes of the one file that is wanted.

    Raises:
        RefusedError: something else. Names that a client gives its files are never used.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM:
        if len(names) > 1:
            raise RefusedError(415, f"{' and '.join(names)} are sent as a form ({FORM})")
        if kind.startswith("text/") or kind == "application/json":
            raise RefusedError(415, f"{kind} is no image; send the bytes of an image file, or a form with `image`")
        return {names[0]: await request.body()}
    async with request.form(max_files=PARTS, max_fields=PARTS) as form:
        files = {}
        for name in names:
            part = form.get(name)
            if not isinstance(part, UploadFile):
                raise RefusedError(400, f"the form has no file named {name}; send it as {name}=@FILE")
            files[name] = await part.read()
        return files


def _white_of(mask: bytes, size: tuple[int, int]) -> np.ndarray:
    """Returns where a mask is white: bool [H, W].

    Raises:
        RefusedError: no picture of this size.
    """
    try:
        with Image.open(io.BytesIO(mask)) as picture:
            if (picture.height, picture.width) != size:
                held, needed = f"{picture.width}×{picture.height}", f"{size[1]}×{size[0]}"
                raise RefusedError(400, f"the mask has {held} pixels, the image {needed}; send one of its size")
            return np.asarray(picture.convert("L")) >= WHITE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RefusedError(400, f"the mask cannot be used ({error}); send a picture, white where masked") from error


def _whole_and_hole(service: Service, image: bytes, mask: bytes, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pixels of a picture [H, W, C], and where its holes are: bool [H, W].

    Raises:
        RefusedError: one of the two cannot be used, or filling it would take too long.
    """
    if service.reading.dtype != "uint8" or service.model.in_chans not in (1, 3):
        raise RefusedError(415, "whole pictures are answered in 8 bits, gray or RGB; this model reads others")
    picture = picture_of_upload(image, service.reading, service.config.max_pixels)
    white = _white_of(mask, picture.shape[:2])
    if white.all() or not white.any():
        raise RefusedError(400, "the mask is white everywhere or nowhere; some pixels must be, and some not")
    tiles = rounds * count_tiles(white, service.model.img_size)
    if tiles > MOST_TILES:
        problem = f"{tiles} tiles in {rounds} rounds, over the limit of {MOST_TILES}"
        raise RefusedError(413, f"{problem}; ask for fewer rounds, or send a part of the picture")
    return picture, white


def _mask_of(service: Service, image: bytes, mask: bytes) -> np.ndarray:
    """Returns which patches the white of a mask touches: bool [rows, columns].

    Raises:
        RefusedError: no picture of the size of the image, or nothing or everything is white.
    """
    white = _white_of(mask, size_of_upload(image, service.reading, service.config.max_pixels))
    shape = service.model.img_size
    view = View(shape, service.reading, central_share=central_share("folder", shape))
    patches = touched(white, view, service.model.grid_size)
    if patches.all() or not patches.any():
        problem = f"the mask covers {int(patches.sum())} of the {patches.size} patches that the model sees"
        raise RefusedError(400, f"{problem}; at least one must be masked and one visible")
    return patches


class Gate:
    """What every request passes first and last: limits of number, bytes and time, and the figures for Prometheus."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, is_stopping: Callable[[], bool]) -> None:
        self.app, self.config, self.metrics, self.is_stopping = app, config, metrics, is_stopping
        self.in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.in_work += 1
        self.metrics.in_work.inc()
        try:
            await self._bounded(scope, receive, watched, lambda: status != 0)
        finally:
            self.in_work -= 1
            self.metrics.in_work.dec()
            name = scope["path"].removeprefix(PREFIX)
            task = name if name in KNOWN else "other"
            self.metrics.requests.labels(task, str(status or 499)).inc()
            self.metrics.seconds.labels(task).observe(time.perf_counter() - begun)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, has_begun: Callable[[], bool]) -> None:
        """Answers a request within the limits; what is beyond them gets a status and a line."""
        refusal: tuple[int, str] | None = None
        if len(scope["headers"]) > MOST_HEADERS:
            refusal = 431, f"{len(scope['headers'])} headers, over the limit of {MOST_HEADERS}"
        elif self.is_stopping():
            refusal = 503, "the service is stopping; ask again later"
        elif self.in_work > self.config.max_requests:
            refusal = 503, f"{self.config.max_requests} requests are in work; come again"
        else:
            try:
                async with asyncio.timeout(self.config.timeout):
                    await self.app(scope, _limited(scope, receive, self.config.max_bytes), send)
            except TimeoutError:
                refusal = 504, f"the request took longer than {self.config.timeout:g} seconds"
            except RefusedError as error:
                refusal = error.status, error.reason
            except Exception as error:  # one line to the client; the whole error to the log
                logger.error("a request ended in an error", exc_info=error)
                refusal = 500, "an error in fastmae; its log has the details"
        if refusal is not None and not has_begun():
            with contextlib.suppress(OSError):
                await _refusal(*refusal)(scope, receive, send)


KNOWN = ("embed", "search", "classify", "segment", "reconstruct", "inpaint", "model")


def _limited(scope: Scope, receive: Receive, max_bytes: int) -> Receive:
    """Wraps what gives the body, so that it ends with an error at ``max_bytes``, whatever its header claims."""
    reason = f"more than {max_bytes} bytes; send a smaller file"
    claimed = dict(scope["headers"]).get(b"content-length", b"")
    is_large = claimed.isdigit() and (len(claimed) > 18 or int(claimed) > max_bytes)
    count = 0

    async def receive_some() -> Message:
        nonlocal count
        if is_large:
            raise RefusedError(413, reason)
        message = await receive()
        count += len(message.get("body", b""))
        if count > max_bytes:
            raise RefusedError(413, reason)
        return message

    return receive_some
