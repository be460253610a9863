"""`flexolmo audit`: attacks on what leaves an owner's house, more of them in audit_attacks
and audit_canaries; and a server's log, see audit_log."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexolmo.cli import audit_attacks, audit_canaries, audit_log, audit_report, audit_summary
from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from flexolmo.data.batches import TokenSet

app = typer.Typer(
    no_args_is_help=True, help="Attack what leaves your house; check what a server has logged."
)
app.add_typer(audit_log.app)
app.add_typer(audit_attacks.app)
app.add_typer(audit_canaries.app)
app.add_typer(audit_report.app)
app.add_typer(audit_summary.app)


@app.command("statistics")
def statistics(
    expert: Annotated[
        Path, typer.Argument(help="A bundle, NAME.bundle, or the run of `expert train`.")
    ],
    anchor: Annotated[Path, typer.Option(help="Directory of the anchor it was trained beside.")],
    data: Annotated[Path, typer.Option(help="The prepared set it was trained on.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the results as JSON, for you alone.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of drawn text and of intervals.")] = 0,
) -> None:
    """Attack what an expert tells of its text besides what it learnt.

    Four attacks on its table of token statistics and on its embedding and head: how often a token
    occurs, which rare tokens occur, which words of one document can be spelled, and which documents
    it was trained on. Each comes with its 95 % interval.

    Example: flexolmo audit statistics outbox/code.bundle --anchor anchor --data prepared/code
    """
    from flexolmo.audit.statistics import about_expert, audit_statistics, open_expert
    from flexolmo.data.batches import open_set
    from flexolmo.files import write_json
    from flexolmo.model.checkpoint import load_anchor
    from flexolmo.runtime import set_up

    set_up(seed, None)
    base = load_anchor(anchor)
    opened = open_expert(expert)
    found = {"audit": "statistics", "about": about_expert(expert)} | audit_statistics(
        base, opened, open_set(data, base.tokenizer.digest), seed
    )
    if out is not None:
        write_json(out, found, is_private=True)
    print_audit(found)
    if out is not None:
        echo(str(out))


@app.command("curve")
def curve(
    experts: Annotated[
        list[Path], typer.Argument(help="Bundles, NAME.bundle, or runs of `expert train`.")
    ],
    anchor: Annotated[Path, typer.Option(help="Directory of the anchor they were trained beside.")],
    data: Annotated[
        list[Path],
        typer.Option(help="A prepared set; give --data for each expert's and for public text."),
    ],
    out: Annotated[Path, typer.Option(help="Directory for curve.json and curve.png.")],
    k: Annotated[
        str, typer.Option("--k", help="Values of router.min_documents to try, with no noise.")
    ] = "1,5,20,80",
    epsilon: Annotated[str, typer.Option(help="Values of router.epsilon to try.")] = "1,2,4,8",
    split: Annotated[
        str, typer.Option(help="Split that is read: heldout, or validation to choose by.")
    ] = "heldout",
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of text to read at most of each set.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of noise, which protects nobody here.")
    ] = 0,
) -> None:
    """Measure what hiding more of the owners' texts costs the mixture.

    For a researcher who has the sets of all owners, as after the demo; no owner could measure it.
    The tables are made again with each value of router.min_documents and router.epsilon, the
    experts stay as they are. Bits per byte: mean over the owners' sets, of each other set, and of
    text that turns from set to set.

    Example: flexolmo audit curve a.bundle b.bundle --anchor anchor --data public --data a --data b
    --out curve
    """
    from flexolmo.audit.curve import quality_curve
    from flexolmo.audit.statistics import open_expert
    from flexolmo.config import parse_settings
    from flexolmo.data.batches import open_set
    from flexolmo.errors import ConfigError
    from flexolmo.files import write_json
    from flexolmo.model.checkpoint import load_anchor
    from flexolmo.model.statistics import EvidenceSettings
    from flexolmo.report.drawing import save_figure
    from flexolmo.report.plots import plot_quality_curve
    from flexolmo.runtime import set_up

    if split not in ("heldout", "validation"):
        raise ConfigError(f"Split {split!r} is not known; heldout and validation are.")
    set_up(seed, None)
    base = load_anchor(anchor)
    opened = [open_expert(path) for path in experts]
    routers = [e.router.model_dump(exclude={"min_documents", "epsilon", "delta"}) for e in opened]
    if routers[0]["kind"] != "evidence" or any(r != routers[0] for r in routers):
        raise ConfigError(
            f"These experts' routers are {routers}; a curve needs one router of kind evidence."
        )
    tried = [("min_documents", "--k", k), ("epsilon", "--epsilon", epsilon)]
    choices = [
        parse_settings({**routers[0], name: value}, EvidenceSettings, option)
        for name, option, values in tried
        for value in values.split(",")
    ]
    sets = _by_name([open_set(path, base.tokenizer.digest) for path in data])
    found = quality_curve(base, opened, sets, choices, split=split, max_bytes=max_bytes, seed=seed)
    write_json(out / "curve.json", found, is_private=True)
    save_figure(plot_quality_curve(found), out / "curve.png", is_private=True)
    print_quality(found)
    echo(f"{out / 'curve.json'} and {out / 'curve.png'}")


@app.command("access")
def access(
    model: Annotated[Path, typer.Option(help="Directory of a mixture.")],
    data: Annotated[
        list[Path],
        typer.Option(help="The prepared set of an expert's owner; give --data once for each."),
    ],
    out: Annotated[
        Path, typer.Option(help="Directory for access.json, page.html and its picture.")
    ],
    max_documents: Annotated[
        int, typer.Option(min=10, help="Documents to read at most, trained and unseen each.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Random seed of drawn documents and intervals.")] = 0,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
) -> None:
    """Measure what the switch of a source does, as somebody sees who asks the model.

    Two measures, after PermLLM: can an observer tell from the answers whether the source was on
    (and which documents it was trained on, with the source on and off), and what does somebody
    lose who may not use it.

    Example: flexolmo audit access --model model --data prepared/code --out access
    """
    from flexolmo.audit.access import audit_access
    from flexolmo.data.batches import open_set
    from flexolmo.files import write_json
    from flexolmo.merge.mixture import load_mixture
    from flexolmo.report.access_page import write_access_page
    from flexolmo.runtime import set_up

    set_up(seed, None)
    mixture = load_mixture(model, trusted_owners(trust, trust_any_signer))
    sets = _by_name([open_set(path, mixture.tokenizer.digest) for path in data])
    found = audit_access(mixture, sets, max_documents=max_documents, seed=seed)
    write_json(out / "access.json", found, is_private=True)
    page = write_access_page(found, out)
    print_access(found)
    echo(f"{page}, with access.json beside it")


def _by_name(sets: "Sequence[TokenSet]") -> "dict[str, TokenSet]":
    """The sets by name; ConfigError if two have one name."""
    from flexolmo.errors import ConfigError

    found = {s.name: s for s in sets}
    if len(found) < len(sets):
        where = ", ".join(str(s.directory) for s in sets)
        raise ConfigError(f"Two of {where} hold sets of one name; give each set once.")
    return found


def print_access(found: dict[str, Any]) -> None:
    """The measures of `audit_access` as a table, for a terminal."""
    from rich.table import Table

    table = Table("source", "on or off told, AUC", "membership on", "off", "utility gap")
    for name, x in found["experts"].items():
        if "too_few" in x:
            table.add_row(name, "too few documents")
            continue
        figures = [x["distinguishability"]["calibrated"], *x["membership"].values()]
        told, on, off = (f"{f['auc']:.3f}" for f in figures)
        table.add_row(name, told, on, off, f"{x['utility_gap']['gap']:.1%}")
    PlainConsole().print(table)


def print_quality(found: dict[str, Any]) -> None:
    """The points of `quality_curve` as a table, for a terminal."""
    from rich.table import Table

    others = [s for s in found["anchor"]["sets"] if s not in found["experts"].values()]
    table = Table("tables", "owners' sets, mean", *others)
    for point in [found["anchor"], *found["points"]]:
        values = [point["own"], *(point["sets"][s] for s in others)]
        table.add_row(point["name"], *(f"{x:.4f}" for x in values))
    PlainConsole().print(table)


def print_audit(found: dict[str, Any]) -> None:
    """The results of `audit_statistics` as a table, for a terminal."""
    from rich.table import Table

    from flexolmo.audit.statistics import rows_of

    tokens, documents = found["tokens"], f"{found['documents']:,} documents"
    how = f"each in at least {found['min_documents']} of {documents}"
    if found["epsilon"] is not None:
        how = f"of {documents}, noised to epsilon {found['epsilon']:g}, delta {found['delta']:g}"
    echo(
        f"Expert {found['expert']}: its table tells of {tokens['told']:,} tokens and "
        f"{tokens['pairs']:,} pairs, {how}."
    )
    table = Table("attack", "found", "95 % interval", "by chance")
    for row in rows_of(found):
        table.add_row(*row)
    PlainConsole().print(table)
