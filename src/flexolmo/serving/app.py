"""The HTTP interface: what OpenAI's clients speak, health, readiness and metrics.

Under /v1 it is asked first who asks, then the body is read. Errors have OpenAI's form and quote no
key, no token and no prompt.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from flexolmo.serving import replies
from flexolmo.serving.answer import Answer
from flexolmo.serving.composer import Composer
from flexolmo.serving.console import Trail, add_console
from flexolmo.serving.door import Door, error_body, error_response, internal_error, receive
from flexolmo.serving.forms import ChatForm, CompletionForm, Decode, Form
from flexolmo.serving.gateway import Gateway
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.replies import AnswerReply
from flexolmo.serving.requests import Body, BodyKind, ChatBody, CompletionBody, read_body
from flexolmo.serving.upkeep import Upkeep

LOOK_SECONDS = 1.0
Result = TypeVar("Result")


def create_app(
    gateway: Gateway, upkeep: Upkeep | None = None, hosts: list[str] | None = None
) -> FastAPI:
    """The application around `gateway`, which starts and stops with it.

    It has the console if the gateway's log is a `Trail`.

    Args:
        upkeep: Looked after about once a second; None: nothing changes while serving.
        hosts: Names by which clients may call the server; None: any.
    """

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        if upkeep is not None:
            await asyncio.to_thread(upkeep.look)  # fetches an issuer's keys, before anybody asks
        looking = asyncio.create_task(_look_after(upkeep))
        yield
        looking.cancel()
        await gateway.stop()

    app = FastAPI(
        title="FlexOlmo",
        description="A mixture whose sources are switched on or off for each request.",
        version="1",
        lifespan=live,
        docs_url=None,  # its page loads from another host
        redoc_url=None,
        # Else what it tells collectors, if the environment names one, holds words of exceptions.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    _add_routes(app, gateway)
    if isinstance(gateway.audit, Trail):
        add_console(app, gateway, gateway.audit)
    app.add_exception_handler(Refusal, _tell_refusal(gateway))
    app.add_exception_handler(HTTPException, _tell_refusal(gateway))
    paths = {str(getattr(route, "path", "")) for route in app.routes}
    app.add_middleware(
        Door,
        metrics=gateway.metrics,
        paths=paths,
        hosts=hosts,
        stall_seconds=gateway.limits.stall_seconds,
    )
    app.openapi = functools.partial(_describe, app)  # type: ignore[method-assign]
    return app


async def _look_after(upkeep: Upkeep | None) -> None:
    while upkeep is not None:
        await asyncio.sleep(LOOK_SECONDS)
        await asyncio.to_thread(upkeep.look)


def _tell_refusal(gateway: Gateway) -> Callable[[Request, Exception], Response]:
    """The handler that turns an exception meant for clients into a response."""

    def tell(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            code = HTTPStatus(error.status_code).name.lower()
            error = Refusal(error.status_code, code, f"{error.detail}.")
        assert isinstance(error, Refusal)
        gateway.metrics.refusals.labels(error.code).inc()
        return error_response(error)

    return tell


# --- routes -------------------------------------------------------------------------------------


def _body_of(kind: type[Body]) -> dict[str, Any]:
    """Description of a body that a route reads itself, after it has asked who sends it."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_routes(app: FastAPI, gateway: Gateway) -> None:
    refused = replies.errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
    events = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post(
        "/v1/completions",
        responses={200: {"model": replies.CompletionReply, "content": events}, **refused},
        openapi_extra=_body_of(CompletionBody),
    )
    async def completions(request: Request) -> Response:
        """Continue texts, or score them.

        With `stream` true, a reply of the same form for each part, as server-sent events.
        """
        return await _answer(gateway, request, CompletionBody, CompletionForm)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": replies.ChatReply, "content": events}, **refused},
        openapi_extra=_body_of(ChatBody),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a chat, if the model has a chat template.

        With `stream` true, a ChatChunkReply for each part, as server-sent events.
        """
        return await _answer(gateway, request, ChatBody, ChatForm)

    @app.get("/v1/models", responses=replies.errors(401, 503))
    async def models(request: Request) -> replies.ModelsReply:
        """The model, and the sources that it holds."""
        gateway.identity.identify(request.headers.get("authorization"))
        return replies.ModelsReply(data=[_describe_model(gateway)])

    @app.get("/v1/models/{name}", responses=replies.errors(401, 404, 503))
    async def model(name: str, request: Request) -> replies.ModelReply:
        """One model, and the sources that it holds."""
        gateway.identity.identify(request.headers.get("authorization"))
        _refuse_other_model(gateway, name)
        return _describe_model(gateway)

    @app.get("/healthz")
    async def health() -> replies.HealthReply:
        """The process is alive."""
        return replies.HealthReply(problems=[])

    @app.get("/readyz", responses={503: {"model": replies.HealthReply}})
    async def readiness(response: Response) -> replies.HealthReply:
        """Reasons why requests would be refused at present: none, if the status is 200."""
        found = gateway.problems()
        response.status_code = 503 if found else 200
        return replies.HealthReply(problems=found)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(gateway.metrics.expose(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _refuse_other_model(gateway: Gateway, name: str) -> None:
    if name != gateway.name:
        message = f"There is no such model; this server has {gateway.name!r}."
        raise Refusal(404, "model_not_found", message, field="model")


def _describe_model(gateway: Gateway) -> replies.ModelReply:
    facts = gateway.engine.facts
    barred = gateway.barred(facts)
    return replies.ModelReply(
        id=gateway.name,
        created=gateway.started,
        flexolmo=replies.ModelSourcesReply(
            model_digest=facts.digest,
            experts={
                name: replies.ExpertReply(
                    owner=expert.owner,
                    licence=expert.licence,
                    terms=expert.terms,
                    barred=barred[name].why if name in barred else None,
                )
                for name, expert in sorted(gateway.experts(facts).items())
            },
        ),
    )


async def _answer(
    gateway: Gateway, request: Request, kind: type[BodyKind], form: Callable[[Decode], Form]
) -> Response:
    """The response to a request for texts: identity, body, decision, answer."""
    principal = gateway.identity.identify(request.headers.get("authorization"))
    data = await receive(request, gateway.limits.max_body_bytes, gateway.limits.stall_seconds)
    body = read_body(data, kind)
    _refuse_other_model(gateway, body.model)
    ask = body.ask()
    answer = await gateway.begin(principal, ask)
    composer = Composer(
        answer,
        form(answer.tokenizer.decode),
        model=gateway.name,
        echoes=ask.echoes,
        tells_shares=gateway.tells_shares,
        trace=functools.partial(gateway.trace, answer),
    )
    receipt = answer.receipt
    headers = {
        "X-FlexOlmo-Decision": receipt.decision,
        "X-FlexOlmo-Entry": str(receipt.entry),
        "X-FlexOlmo-Enabled": ", ".join(receipt.sources),
        "X-FlexOlmo-Model": receipt.model_digest,
    }
    if body.stream:
        chunks = composer.chunks(body.includes_usage)
        return _EventResponse(answer, _encode_events(chunks, gateway), headers)
    try:
        reply = await _while_there(request, composer.whole())
    finally:
        answer.leave()
    return Response(reply.encode(), headers=headers, media_type="application/json")


async def _while_there(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which ends when the client goes away (then ClientDisconnect)."""

    async def wait_until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_until_gone())
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        working.cancel()


async def _encode_events(
    chunks: AsyncIterator[AnswerReply], gateway: Gateway
) -> AsyncIterator[bytes]:
    """Server-sent events. Source: HTML Living Standard, section 9.2."""
    try:
        async for chunk in chunks:
            yield b"data: " + chunk.encode() + b"\n\n"
    except Exception as e:  # a response that has begun can tell an error in no other way
        refusal = e if isinstance(e, Refusal) else internal_error(e)
        gateway.metrics.refusals.labels(refusal.code).inc()
        yield b"data: " + error_body(refusal).model_dump_json().encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


class _EventResponse(StreamingResponse):
    """A stream of an answer, which ends with the response, however that ends."""

    def __init__(self, answer: Answer, events: AsyncIterator[bytes], headers: dict[str, str]):
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; see ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


# --- the document -------------------------------------------------------------------------------


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        kinds: list[Any] = [(kind, "validation") for kind in (CompletionBody, ChatBody)]
        kinds += [(replies.ChatChunkReply, "serialization")]
        _, bodies = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= bodies["$defs"]
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path.startswith("/v1/"):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema
