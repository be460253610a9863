"""The HTTP interface of an owner's index: `flexolmo trace serve`.

GET  /v1/trace    the rules (`questions.Offer`)
POST /v1/trace    a signed question; its answer
GET  /healthz     the process is alive
"""

import asyncio

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from flexolmo.serving.door import Door, error_response, receive
from flexolmo.serving.metrics import Metrics
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.server import ServerSettings, configure, listen
from flexolmo.serving.trace_desk import TraceDesk
from flexolmo.trace.questions import MAX_QUESTION_BYTES
from flexolmo.trace.remote import PATH

_STALL_SECONDS = 30.0


def create_trace_app(desk: TraceDesk) -> FastAPI:
    """The application around `desk`."""
    app = FastAPI(
        title="FlexOlmo trace",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # Else what it tells collectors, if the environment names one, holds words of exceptions.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )

    @app.get(PATH)
    async def rules() -> Response:
        return Response(desk.offer().model_dump_json(), media_type="application/json")

    @app.post(PATH)
    async def ask(request: Request) -> Response:
        data = await receive(request, MAX_QUESTION_BYTES, _STALL_SECONDS)
        answer = await asyncio.to_thread(desk.answer, data)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/healthz")
    async def health() -> Response:
        return Response('{"problems":[]}', media_type="application/json")

    def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refusal(error.status_code, "not_served", f"{error.detail}.")
        assert isinstance(error, Refusal)
        return error_response(error)

    app.add_exception_handler(Refusal, refuse)
    app.add_exception_handler(HTTPException, refuse)
    app.add_middleware(
        Door, metrics=Metrics(), paths=[PATH, "/healthz"], hosts=None, stall_seconds=_STALL_SECONDS
    )
    return app


def run_trace_server(desk: TraceDesk, settings: ServerSettings) -> None:
    """Answer until SIGTERM or SIGINT; OSError if the address cannot be had."""
    config = configure(create_trace_app(desk), settings)
    uvicorn.Server(config).run(sockets=[listen(settings)])
