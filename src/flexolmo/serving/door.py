"""The outermost layer of the HTTP interface: request ids, safe headers, times, and errors.

Whatever happens inside, a client hears an error in OpenAI's form or nothing, never a traceback; and
a client that takes nothing for too long is let go.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexolmo.serving.metrics import Metrics
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.replies import ErrorDetail, ErrorReply

_log = logging.getLogger(__name__)
_SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_GONE = 499  # in figures: the client went away before anything was sent
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(refusal: Refusal) -> ErrorReply:
    """A refusal, as OpenAI's clients read errors."""
    usual = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return ErrorReply(
        error=ErrorDetail(
            message=str(refusal),
            type=_TYPES.get(refusal.status, usual),
            param=refusal.field,
            code=refusal.code,
        )
    )


def error_response(refusal: Refusal) -> Response:
    """The response that tells a refusal, and clients whether to try again."""
    headers = {}
    if refusal.retry_seconds is not None:
        headers["Retry-After"] = str(refusal.retry_seconds)
    elif refusal.status >= 500:
        headers["X-Should-Retry"] = "false"  # read by OpenAI's clients
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        error_body(refusal).model_dump_json(),
        refusal.status,
        headers,
        media_type="application/json",
    )


def internal_error(error: BaseException) -> Refusal:
    """The refusal for a defect of ours, logged by its kind and place: its words may quote a
    prompt."""
    _log.error("internal error", exc_info=error)
    return Refusal(500, "internal_error", "An error of the server; its log says which.")


async def receive(request: Request, max_bytes: int, stall_seconds: float) -> bytes:
    """The body of `request`; Refusal (408, 413, 415) if it is too slow, too large or not JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # A web page may send any other type to this machine without asking first.
        raise Refusal(415, "unsupported_media_type", "Content-Type: application/json is expected.")
    data = bytearray()
    try:
        async with asyncio.timeout(stall_seconds):
            async for piece in request.stream():
                data += piece
                if len(data) > max_bytes:
                    raise Refusal(413, "body_too_large", f"A body has at most {max_bytes} bytes.")
    except TimeoutError:
        raise Refusal(408, "body_too_slow", "The body did not come in time.") from None
    return bytes(data)


class Door:
    """The layer itself, around `app`.

    Args:
        paths: Paths that have figures of their own.
        hosts: Names by which the server may be called; None: any.
        stall_seconds: Time in which a client must take what is sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        paths: Collection[str],
        hosts: Collection[str] | None,
        stall_seconds: float,
    ):
        self.app = app
        self._metrics = metrics
        self._paths = paths
        self._hosts = hosts
        self._stall_seconds = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; see ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number = uuid.uuid4().hex
        begun = time.monotonic()
        status = 0  # until a response has begun

        async def send_in_time(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = number
            async with asyncio.timeout(self._stall_seconds):
                await send(message)

        try:
            inner = self.app if self._is_called_right(scope) else _WRONG_HOST
            await inner(scope, receive, send_in_time)
        except ClientDisconnect:
            status = _GONE
        except TimeoutError:
            _log.warning("client stalled", extra={"request_id": number})
        except Exception as e:
            response = error_response(internal_error(e))
            if not status:
                await response(scope, receive, send_in_time)
        finally:
            seconds = time.monotonic() - begun
            route = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.responses.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            said = {"request_id": number, "route": route, "method": scope["method"]}
            said |= {"status": status, "seconds": round(seconds, 4)}
            _log.info("response", extra=said)

    def _is_called_right(self, scope: Scope) -> bool:
        """True unless a page of another name, resolved to this machine, makes a browser ask."""
        host = Headers(scope=scope).get("host", "")
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        return self._hosts is None or name in self._hosts


_WRONG_HOST = error_response(
    Refusal(400, "wrong_host", "This server is not called by that name in the header Host.")
)
