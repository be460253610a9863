"""`flexolmo serve`: a mixture behind identity, policy and audit; and its API keys."""

import datetime
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexolmo.cli.trust import TrustAny, TrustDirectory, Verify
from flexolmo.errors import ConfigError
from flexolmo.inference.policy import parse_names
from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from flexolmo.data.tokenizer import Tokenizer
    from flexolmo.inference.engine import Engine
    from flexolmo.inference.opening import Opening
    from flexolmo.serving.chat import ChatTemplate
    from flexolmo.serving.tracing import Tracer
    from flexolmo.trace.index import Index
    from flexolmo.trace.questions import Level

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)
key_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
app.add_typer(key_app, name="key")

KeyFile = Annotated[
    Path, typer.Option("--keys", help="File of hashed keys, which auth.toml names as api_keys.")
]


@app.callback()
def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="Directory of a mixture.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Directory of policies, *.cedar.")] = None,
    audit: Annotated[Path | None, typer.Option(help="Directory of the audit log.")] = None,
    auth: Annotated[
        Path | None, typer.Option(help="TOML file that says who is let in: keys, tokens.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody on this machine in, as local.")
    ] = False,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    verify: Verify = False,
    experts: Annotated[
        str | None,
        typer.Option(
            help="Experts to load, comma-separated; the others are in no memory. Default: all."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests. Default: its directory's.")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja template of chats. Default: the tokenizer's own, if it has one."),
    ] = None,
    report_shares: Annotated[
        bool, typer.Option("--report-shares", help="Tell clients each source's share of an answer.")
    ] = False,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=INDEX",
            help="Index of an expert's training text, a directory or a URL; may be repeated.",
        ),
    ] = None,
    trace_level: Annotated[
        Literal["yes", "count", "document", "text"],
        typer.Option(help="Told of a span in an index on this machine: see flexolmo trace serve."),
    ] = "document",
    trace_key: Annotated[
        Path | None, typer.Option(help="Your private key, which signs questions to a URL.")
    ] = None,
    engine: Annotated[
        Literal["own", "vllm"],
        typer.Option(help="Engine: our own, exact to the bit; or vLLM, for many texts at once."),
    ] = "own",
    engine_python: Annotated[
        Path | None,
        typer.Option(help="Python of vLLM's environment, with --engine vllm. Default: this one."),
    ] = None,
    memory_bytes: Annotated[
        int, typer.Option(help="Memory for keys and values of texts under way.")
    ] = 1 << 30,
    max_requests: Annotated[
        int, typer.Option(help="Requests under way at once; others are told to wait.")
    ] = 256,
    max_texts_each: Annotated[
        int, typer.Option(help="Texts under way at once of one person, told to wait with more.")
    ] = 32,
    max_texts: Annotated[int, typer.Option(help="Texts of one request: its prompts times n.")] = 32,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prompt. Default: as many as the model takes.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request.")] = 2 << 20,
    max_seconds: Annotated[float, typer.Option(help="Time that one answer may take.")] = 300,
    stall_seconds: Annotated[
        float, typer.Option(help="Time in which a client must send, or take, something.")
    ] = 60,
    drain_seconds: Annotated[
        float, typer.Option(help="Time that answers have to end when the server is stopped.")
    ] = 30,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Private key for TLS, PEM; else a proxy does TLS.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificates for TLS, PEM.")] = None,
) -> None:
    """Serve a mixture: OpenAI's interface, with each source on or off per request.

    Every decision is in the audit log before its answer begins. Changed policies, keys, trust and
    models are taken over while serving. docs/serving.md leads there in ten minutes.

    Example: flexolmo serve --model model --policy policies --audit audit --auth auth.toml
    """
    if context.invoked_subcommand is not None:
        return
    if model is None or policy is None or audit is None:
        raise ConfigError("Give --model, --policy and --audit. See flexolmo serve --help.")
    if (auth is not None) == no_auth:
        raise ConfigError(
            "Give --auth FILE, which says who is let in, or --no-auth for this machine alone."
        )
    require_packages()
    from flexolmo.config import parse_settings
    from flexolmo.data.tokenizer import load_tokenizer
    from flexolmo.inference.opening import Opening
    from flexolmo.serving.audit_log import AuditLog
    from flexolmo.serving.chat import ChatTemplate, find_template
    from flexolmo.serving.console import Trail
    from flexolmo.serving.gateway import Gateway, Limits
    from flexolmo.serving.identity import NoIdentity, ProvenIdentity
    from flexolmo.serving.policy import Policies
    from flexolmo.serving.prompts import TextModel
    from flexolmo.serving.server import ServerSettings, check_address, run_server
    from flexolmo.serving.upkeep import Sources, Upkeep, look_at

    server = parse_settings(
        {
            "host": host,
            "port": port,
            "drain_seconds": drain_seconds,
            "ssl_keyfile": ssl_keyfile,
            "ssl_certfile": ssl_certfile,
        },
        ServerSettings,
        "the command line",
    )
    limits = parse_settings(
        {
            "max_requests": max_requests,
            "max_texts_each": max_texts_each,
            "max_texts": max_texts,
            "max_prompt_tokens": max_prompt_tokens,
            "max_body_bytes": max_body_bytes,
            "max_seconds": max_seconds,
            "stall_seconds": stall_seconds,
        },
        Limits,
        "the command line",
    )
    check_address(server, is_open_to_all=auth is None)
    identity = NoIdentity() if auth is None else ProvenIdentity(auth)
    anchor = model / "anchor"

    def read_texts() -> "tuple[Tokenizer, ChatTemplate | None]":
        tokenizer = load_tokenizer(anchor)
        source = chat_template.read_text("utf-8") if chat_template else find_template(anchor)
        return tokenizer, None if source is None else ChatTemplate(source, tokenizer)

    chosen = None if experts is None else tuple(parse_names(experts, "--experts"))
    opening = parse_settings(
        {
            "model": model,
            "trust": trust,
            "trusts_any_signer": trust_any_signer,
            "verify": verify,
            "experts": chosen,
            "memory_bytes": memory_bytes,
        },
        Opening,
        "the command line",
    )
    watched = [model / "mixture.json", *([trust] if trust else [])]
    sources = Sources(policy, watched, read_texts, opening.read_owners)
    seen = look_at(identity, sources)
    policies = Policies.load(policy)
    running = open_engine_of(engine, opening, engine_python)
    tokenizer, chat = read_texts()
    gateway = Gateway(
        name=name or model.resolve().name,
        engine=running,
        texts=TextModel(running.facts.digest, tokenizer, chat),
        policies=policies,
        audit=Trail(AuditLog.open(audit)),
        identity=identity,
        limits=limits,
        tells_shares=report_shares,
        tracer=open_tracer(trace, trace_level, trace_key, anchor) if trace else None,
    )
    run_server(gateway, Upkeep(gateway, sources, seen), server, is_open_to_all=auth is None)


def open_engine_of(
    kind: Literal["own", "vllm"], opening: "Opening", python: Path | None
) -> "Engine":
    """The engine of that kind; vLLM's runs in a process of its own, with `python`."""
    if kind == "vllm":
        from flexolmo.inference.apart import ApartEngine, vllm_command

        return ApartEngine(vllm_command(python), opening)
    if python is not None:
        raise ConfigError("--engine-python is for --engine vllm.")
    from flexolmo.inference.batching import EngineSettings  # brings torch
    from flexolmo.inference.open_engine import open_engine
    from flexolmo.runtime import leave_a_core

    leave_a_core()
    settings = EngineSettings(memory_bytes=opening.memory_bytes)
    return open_engine(
        opening.model, opening.read_owners, settings, experts=opening.experts, verify=opening.verify
    )


def open_tracer(sources: Sequence[str], level: "Level", key: Path | None, anchor: Path) -> "Tracer":
    """The tracer of sources given as NAME=INDEX or NAME=URL, which ranks by public text of the
    anchor in that directory; ConfigError for any other word."""
    from flexolmo.bundle.signing import read_private_key
    from flexolmo.serving.tracing import Tracer, read_public_bits
    from flexolmo.trace.index import open_index
    from flexolmo.trace.remote import RemoteIndex

    opened: dict[str, Index | RemoteIndex] = {}
    for source in sources:
        name, is_named, place = source.partition("=")
        if not (name and is_named and place) or name in opened:
            raise ConfigError(f"--trace {source!r}: expected NAME=INDEX or NAME=URL, a name once.")
        if "://" not in place:
            opened[name] = open_index(Path(place))
        elif key is None:
            raise ConfigError(f"--trace {source} is served: give --trace-key too.")
        else:
            opened[name] = RemoteIndex(name, place, read_private_key(key))
    return Tracer(opened, level, read_public_bits(anchor))


def require_packages() -> None:
    """ConfigError if a package that serving needs is missing."""
    packages = {"fastapi": "fastapi", "uvicorn": "uvicorn", "jwt": "PyJWT", "cedarpy": "cedarpy"}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"Serving needs {', '.join(missing)}, not here: pip install 'flexolmo[serve]'."
        )


@key_app.command("add")
def add(
    keys: KeyFile,
    subject: Annotated[str, typer.Option(help="Name of the person or program it stands for.")],
    groups: Annotated[str | None, typer.Option(help="Their groups, comma-separated.")] = None,
    roles: Annotated[str | None, typer.Option(help="Their roles, comma-separated.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="Last day of use in UTC, such as 2027-01-31. Default: none.")
    ] = None,
) -> None:
    """Make an API key and print it, once: the file keeps its hash alone.

    Example: flexolmo serve key add --keys keys.json --subject alice --groups clinic
    """
    from flexolmo.serving.keys import add_key

    text = add_key(
        keys,
        subject,
        parse_names(groups, "--groups") if groups is not None else (),
        parse_names(roles, "--roles") if roles is not None else (),
        _read_day(expires),
    )
    echo("Give this key to whom it is for; it is shown once:", err=True)
    echo(text)


@key_app.command("list")
def list_keys(keys: KeyFile) -> None:
    """List the API keys: ids, people, days; never a key itself.

    Example: flexolmo serve key list --keys keys.json
    """
    from rich.table import Column, Table

    from flexolmo.serving.keys import read_keys

    table = Table(
        Column("id", no_wrap=True), "subject", "groups", "roles", "created", "expires", "revoked"
    )
    for key in read_keys(keys).values():
        days = (key.created, key.expires, key.revoked)
        names = (", ".join(key.groups), ", ".join(key.roles))
        table.add_row(key.id, key.subject, *names, *(str(day or "") for day in days))
    PlainConsole().print(table)


@key_app.command("revoke")
def revoke(
    keys: KeyFile, id_: Annotated[str, typer.Argument(metavar="ID", help="Id of the key.")]
) -> None:
    """Revoke an API key; a running server refuses it within about a second.

    Example: flexolmo serve key revoke --keys keys.json 1f2e3d4c5b6a
    """
    from flexolmo.serving.keys import revoke_key

    key = revoke_key(keys, id_)
    echo(f"Key {key.id} of {key.subject} is revoked as of {key.revoked}.")


def _read_day(text: str | None) -> datetime.date | None:
    from flexolmo.bundle.terms import read_date

    try:
        return None if text is None else read_date(text)
    except ValueError:
        raise ConfigError(f"--expires {text!r} is no day: expected one like 2027-01-31.") from None
