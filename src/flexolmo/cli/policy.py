"""`flexolmo policy`: the deployer's policies, explained and tested."""

import datetime
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexolmo.cli.run import Only, Without, switches
from flexolmo.cli.trust import TrustDirectory
from flexolmo.errors import ConfigError
from flexolmo.inference.policy import parse_names
from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from flexolmo.serving.policy import Decision

app = typer.Typer(
    no_args_is_help=True, help="Explain and test who may use which source, for what and until when."
)
Model = Annotated[
    Path,
    typer.Option(
        "--model",
        "--experts",
        help="Directory of a mixture, or a file of facts about its experts, as `policy describe` "
        "prints them. Signatures are not checked here.",
    ),
]


@app.command("check")
def check(
    policy: Annotated[Path, typer.Option(help="Directory of policies, *.cedar.")],
    model: Model,
    subject: Annotated[str, typer.Option("--as", help="Name of whoever asks.")],
    groups: Annotated[str | None, typer.Option(help="Their groups, comma-separated.")] = None,
    roles: Annotated[str | None, typer.Option(help="Their roles, comma-separated.")] = None,
    purpose: Annotated[
        str | None, typer.Option(help="Purposes that they state, comma-separated. Default: none.")
    ] = None,
    only: Only = None,
    without: Without = None,
    at: Annotated[
        str | None,
        typer.Option(help="Time of the request, such as 2026-11-30T08:00:00Z. Default: now."),
    ] = None,
    trust: TrustDirectory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Explain which experts a request would get: the rules and terms that decide on each.

    With --trust also what their owners have revoked.

    Example: flexolmo policy check --policy policies --model model --as alice --groups clinic
    --purpose health-research
    """
    _require_cedar()
    from flexolmo.bundle.trust import ANY_SIGNER, TrustedOwners
    from flexolmo.serving.facts import read_facts
    from flexolmo.serving.policy import Policies, Principal, Wish

    policies = Policies.load(policy)
    experts = read_facts(model)
    principal = Principal(subject, _names(groups, "--groups"), _names(roles, "--roles"))
    chosen = switches(without, only)
    asked = None if chosen["only"] is None else tuple(chosen["only"])
    wish = Wish(asked, tuple(chosen["without"]))
    purposes: Any = _names(purpose, "--purpose")  # `decide` refuses those that there are not
    moment = _moment(at)
    owners = ANY_SIGNER if trust is None else TrustedOwners.load(trust)
    found = {n: owners.find_bar(n, facts, moment.date()) for n, facts in experts.items()}
    barred = {name: bar.why for name, bar in found.items() if bar is not None}
    decision = policies.decide(principal, purposes, wish, experts, moment, barred)
    if as_json:
        echo(json.dumps(_as_json(decision), indent=2))
        return
    noun = "policy" if len(policies.names) == 1 else "policies"
    echo(f"{len(policies.names)} {noun} in {policy}, {policies.digest}")
    print_decision(decision)


def print_decision(decision: "Decision") -> None:
    """Print a decision as a table."""
    from rich.table import Table

    table = Table("expert", "", "why", show_lines=True)
    for name, verdict in decision.verdicts.items():
        table.add_row(name, "on" if verdict.is_enabled else "off", "\n".join(verdict.reasons))
    PlainConsole().print(table)


@app.command("describe")
def describe(model: Annotated[Path, typer.Argument(help="Directory of a mixture.")]) -> None:
    """Print the facts about a mixture's experts that policies judge by, as JSON.

    With them policies can be checked and tested where the mixture is not.

    Example: flexolmo policy describe model > experts.json
    """
    from flexolmo.serving.facts import encode_facts, read_facts

    echo(encode_facts(read_facts(model)).decode(), end="")


@app.command("test")
def test(file: Annotated[Path, typer.Argument(help="Table of expectations, TOML.")]) -> None:
    """Test policies: each case of a table must get exactly the experts that it expects.

    Exit code 1 if one does not.

    Example: flexolmo policy test policies/expectations.toml
    """
    _require_cedar()
    from flexolmo.serving.expectations import try_expectations

    found = try_expectations(file)
    for case, differences in found.items():
        echo(f"{'FAILED' if differences else 'ok':<8}{case}")
        for line in differences:
            echo(f"        {line}")
    failed = sum(map(bool, found.values()))
    echo(f"{len(found) - failed} of {len(found)} cases hold.")
    if failed:
        raise typer.Exit(1)


def _require_cedar() -> None:
    if find_spec("cedarpy") is None:
        raise ConfigError("Policies need cedarpy, which is not here: pip install -e '.[serve]'.")


def _names(text: str | None, option: str) -> frozenset[str]:
    return frozenset() if text is None else frozenset(parse_names(text, option))


def _moment(text: str | None) -> datetime.datetime:
    """The moment given as `--at`, or now; ConfigError without a time zone."""
    if text is None:
        return datetime.datetime.now(datetime.UTC)
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ConfigError(
            f"--at {text!r} is no time with a zone. Expected one like 2026-11-30T08:00:00Z."
        )
    return moment


def _as_json(decision: "Decision") -> dict[str, Any]:
    return {
        "decided": decision.decided.isoformat(),
        "policy_digest": decision.policy_digest,
        "enabled": sorted(decision.enabled),
        "experts": {
            name: {
                "is_asked": verdict.is_asked,
                "is_enabled": verdict.is_enabled,
                "reasons": verdict.reasons,
            }
            for name, verdict in decision.verdicts.items()
        },
    }
