"""The engine's process: `python -m flexolmo_vllm NUMBER`, started by `flexolmo serve`.

NUMBER is of an open socket, its end of the line to the gateway.
"""

import os
import socket
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from flexolmo.errors import ConfigError, FlexOlmoError
from flexolmo.inference.messages import Line, write_error
from flexolmo.inference.opening import Opening

if TYPE_CHECKING:
    from flexolmo_vllm.host import Host


def main(number: str) -> int:
    """Serve until the gateway is gone; the exit status."""
    line = Line(socket.socket(fileno=int(number)))
    word, values = next(line.messages())
    assert word == "open", word
    with tempfile.TemporaryDirectory(prefix="flexolmo-vllm-") as directory:
        try:
            _refuse_other_version(values[0])
            host = open_host(Opening.model_validate(values[1]), Path(directory), line)
        except Exception as e:
            line.send("failed", 0, *write_error(_explain(e)))
            return 2
        host.run()
    return 0


def open_host(opening: Opening, directory: Path, line: Line) -> "Host":
    """An engine of vLLM's on a mixture; `directory` is for what vLLM reads of it beside."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from flexolmo_vllm.arguments import engine_arguments

        arguments = engine_arguments(opening, directory)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as e:
        raise ConfigError(
            f"{sys.executable} has no vLLM that fits ({e}). docs/guides/vllm.md says how to make "
            "its environment; give its Python with --engine-python."
        ) from None
    from flexolmo_vllm import register
    from flexolmo_vllm.host import Host

    register()
    return Host(LLMEngine.from_engine_args(EngineArgs(**arguments)), line)


def _refuse_other_version(gateways: str) -> None:
    if (own := version("flexolmo")) != gateways:
        raise ConfigError(
            f"The server is flexolmo {gateways}, the engine's environment has {own}: install the "
            "server's there."
        )


def _explain(error: Exception) -> Exception:
    """The error of ours that stands behind one of vLLM's, if there is one."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, FlexOlmoError):
            return found
        found = found.__cause__ or found.__context__
    return ConfigError(f"vLLM could not be started: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
