"""The process of a server: its socket, its limits on connections, and how it ends.

On SIGTERM nothing new is taken, what is under way may end, and what has not ended in time is told
so before the process does.
"""

import asyncio
import logging
import socket
from pathlib import Path

import uvicorn
from pydantic import Field
from starlette.types import ASGIApp

from flexolmo.config import Settings, is_loopback
from flexolmo.errors import ConfigError
from flexolmo.serving.app import create_app
from flexolmo.serving.gateway import Gateway
from flexolmo.serving.logs import log_as_json
from flexolmo.serving.upkeep import Upkeep

_KEEP_ALIVE_SECONDS = 75  # longer than a proxy's 60, so that it is the proxy which lets go
_LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]


class ServerSettings(Settings):
    """Settings of the process."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: any free one.")
    max_connections: int = Field(
        1000, ge=1, le=100_000, description="Connections at once, those that wait included."
    )
    drain_seconds: float = Field(
        30, ge=0, le=3600, description="Time that answers have to end when the server is stopped."
    )
    ssl_keyfile: Path | None = Field(None, description="Private key for TLS, PEM.")
    ssl_certfile: Path | None = Field(None, description="Certificates for TLS, PEM.")


class _Server(uvicorn.Server):
    """A server whose answers begin to end as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_seconds: float):
        super().__init__(config)
        self._gateway = gateway
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, and let what is under way end."""
        draining = asyncio.create_task(self._gateway.drain(self._drain_seconds))
        await super().shutdown(sockets)
        await draining


def check_address(settings: ServerSettings, *, is_open_to_all: bool) -> None:
    """Refuse (ConfigError) to let everybody in where others than this machine reach."""
    if is_open_to_all and not is_loopback(settings.host):
        raise ConfigError(
            f"On {settings.host} anybody could ask: --no-auth is for 127.0.0.1, ::1 and localhost. "
            "Give --auth FILE."
        )


def run_server(
    gateway: Gateway, upkeep: Upkeep, settings: ServerSettings, *, is_open_to_all: bool
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        is_open_to_all: True if nobody is asked who they are.

    Raises:
        ConfigError: open to all on an address that others reach.
        OSError: the address cannot be had.
    """
    check_address(settings, is_open_to_all=is_open_to_all)
    app = create_app(gateway, upkeep, [*_LOOPBACK, settings.host] if is_open_to_all else None)
    config = configure(app, settings)
    _Server(config, gateway, settings.drain_seconds).run(sockets=[listen(settings)])


def listen(settings: ServerSettings) -> socket.socket:
    """The socket that a server takes connections from; OSError if the address cannot be had."""
    log_as_json()
    listener = socket.create_server(
        (settings.host, settings.port),
        family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
        backlog=min(settings.max_connections, 2048),
    )
    logging.getLogger(__name__).info("listening", extra={"address": listener.getsockname()[:2]})
    return listener


def configure(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """Settings of the library's server, with limits on what a connection may take."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,  # beyond it: a bare 503
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        # Longer than answers have to end, so that they are told why they do.
        timeout_graceful_shutdown=round(settings.drain_seconds) + 5,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
