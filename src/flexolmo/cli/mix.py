"""`flexolmo mix`: the coordinator's verbs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexolmo.cli.anchor import Precision
from flexolmo.cli.expert import MaxBytes
from flexolmo.cli.keys import PassphraseFile, read_passphrase
from flexolmo.cli.trust import TrustAny, TrustDirectory, Verify, trusted_owners
from flexolmo.terminal import echo

if TYPE_CHECKING:
    from flexolmo.data.batches import TokenSet
    from flexolmo.merge.certificate import Words
    from flexolmo.merge.importing import ImportPlan

app = typer.Typer(
    no_args_is_help=True,
    help="Check bundles, merge them into one mixture; add, remove, inspect, export, import; prove "
    "that an expert that is off leaves no trace.",
)
Model = Annotated[Path, typer.Argument(help="Directory of a mixture.")]
TopK = Annotated[
    int | None,
    typer.Option(
        min=1, help="Experts active per token, public included. Default: all enabled ones."
    ),
]
Public = Annotated[
    Path | None,
    typer.Option(
        help="The prepared public set: measure on it, on its text in other forms, and on text that "
        "the experts write, what each expert does to text that is not its owner's, and keep that "
        "in the mixture."
    ),
]
Require = Annotated[
    str | None,
    typer.Option(
        help="Refuse experts above these limits: public (loss on public text), forms (on public "
        "text in other forms), others (on text of other experts), claims (share of public text "
        "taken). For example public<=1%,forms<=3%,others<=3%,claims<=10%. Limits that the mixture "
        "keeps hold too, unless named here. Of the release report beside each bundle: extraction, "
        "membership_auc (of both the upper end of the interval counts), epsilon. For example "
        "extraction<=0.2%,membership_auc<=0.55,epsilon<=8."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Random seed of the text that is written to measure on. Default: drawn."),
]


def _limits(
    require: str | None, kept: dict[str, Any] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Limits of influence, those that a mixture keeps and those asked for in their place; and
    limits of release reports that are asked for."""
    from flexolmo.bundle.limits import parse_limits
    from flexolmo.bundle.release import DEMANDS, NO_PERCENT, UP_TO_ONE
    from flexolmo.bundle.release import EXAMPLE as OF_REPORTS
    from flexolmo.evaluation.influence import EXAMPLE, MEASURES

    known = [*MEASURES, *DEMANDS]
    asked = {}
    if require is not None:
        example = f"{EXAMPLE},{OF_REPORTS}"
        asked = parse_limits(require, known, example, up_to_one=UP_TO_ONE, no_percent=NO_PERCENT)
    of_reports = {k: v for k, v in asked.items() if k in DEMANDS}
    influence = {k: v for k, v in asked.items() if k in MEASURES}
    return (kept["limits"] if kept else {}) | influence, of_reports


def _open_public(public: Path, anchor: Path, kept: dict[str, Any] | None) -> "TokenSet":
    """The public set; ConfigError if `kept` was measured on another."""
    from flexolmo.data.batches import open_set
    from flexolmo.data.tokenizer import load_tokenizer
    from flexolmo.errors import ConfigError

    opened = open_set(public, load_tokenizer(anchor).digest)
    if kept and kept["public_digest"] != opened.digest:
        raise ConfigError(
            f"{public} has digest {opened.digest}, but the mixture's experts were measured on the "
            f"public set {kept['public_digest']}. Give that one, or build the mixture anew."
        )
    return opened


def _judges(
    anchor: Path,
    public: Path | None,
    require: str | None,
    seed: int | None,
    kept: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The judge that these options, and the limits that a mixture keeps, ask for, and what is
    demanded of release reports, as `build_mixture` takes them."""
    from flexolmo.errors import ConfigError
    from flexolmo.evaluation.influence import admission

    limits, demands = _limits(require, kept)
    judges: dict[str, Any] = {"admission": None, "demands": demands}
    if public is not None:
        judges["admission"] = admission(_open_public(public, anchor, kept), limits, seed)
    elif limits and not kept:
        raise ConfigError(f"{', '.join(limits)} are measured on public text: give --public.")
    return judges


@app.command("check")
def check(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles, as they came from their owners.")],
    public: Annotated[Path, typer.Option(help="The prepared public set.")],
    anchor: Annotated[
        Path | None, typer.Option(help="Directory of the anchor. Default: the mixture's.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The mixture that they would join; its limits hold.")
    ] = None,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    require: Require = None,
    top_k: TopK = None,
    max_bytes: MaxBytes = None,
    out: Annotated[Path | None, typer.Option(help="File for all figures, as JSON.")] = None,
    seed: Seed = None,
) -> None:
    """Measure what bundles do to text that is not their owners', before they are merged.

    Every expert is switched on beside the anchor on public text, and on public text in other forms
    (questions, lists, mail, tables and more), and beside other experts on text that each of them
    writes. Fails if one is above a limit. Every check of `mix build` or `mix add` is made too, and
    nothing is changed.

    Example: flexolmo mix check code.bundle --model model --public public --require "others<=3%"
    """
    from flexolmo.errors import ConfigError
    from flexolmo.evaluation.influence import check_bundles, refuse_excess
    from flexolmo.files import write_json
    from flexolmo.merge.index import read_about

    kept = None
    if model is not None:
        kept = read_about(model)["influence"]
        anchor = model / "anchor"
    if anchor is None:
        raise ConfigError("Give the anchor (--anchor), or a mixture (--model).")
    limits, demands = _limits(require, kept)
    found = check_bundles(
        bundles,
        _open_public(public, anchor, kept),
        trusted_owners(trust, trust_any_signer),
        anchor_dir=anchor,
        model_dir=model,
        top_k=top_k,
        max_bytes=max_bytes,
        seed=seed,
        demands=demands,
    )
    if out is not None:
        write_json(out, found | {"limits": limits})
    print_influence(found)
    refuse_excess(found, limits, found["newcomers"])


def print_influence(found: dict[str, Any]) -> None:
    """Print the findings of `measure_influence` as a table."""
    from rich.table import Table

    from flexolmo.evaluation.influence import MEASURES, values_of
    from flexolmo.terminal import PlainConsole

    table = Table("expert", *MEASURES)
    for name, influence in (found["experts"] | {"(all at once)": found["together"]}).items():
        table.add_row(name, *values_of(influence).values())
    PlainConsole().print(table)
    for measure, meaning in MEASURES.items():
        echo(f"{measure}: {meaning}")


@app.command("build")
def build(
    anchor: Annotated[Path, typer.Argument(help="Directory of the anchor.")],
    bundles: Annotated[list[Path], typer.Argument(help="Bundles, in any order.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the mixture.")],
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    top_k: TopK = None,
    max_bytes: MaxBytes = None,
    public: Public = None,
    require: Require = None,
    seed: Seed = None,
    verify: Verify = False,
) -> None:
    """Check bundles and merge them. Nothing is trained.

    Example: flexolmo mix build anchor math.bundle code.bundle --trust trusted/ -o model
    """
    from flexolmo.merge.mixture import build_mixture

    trusted = trusted_owners(trust, trust_any_signer)
    about = build_mixture(
        anchor,
        bundles,
        out,
        trusted,
        top_k=top_k,
        max_bytes=max_bytes,
        **_judges(anchor, public, require, seed),
        verify=verify,
    )
    if about["influence"]:
        print_influence(about["influence"])
    echo(f"{out}: public + {', '.join(about['experts'])}")


@app.command("add")
def add(
    model: Model,
    bundles: Annotated[list[Path], typer.Argument(help="Bundles to add.")],
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    max_bytes: MaxBytes = None,
    public: Public = None,
    require: Require = None,
    seed: Seed = None,
    verify: Verify = False,
) -> None:
    """Add owners' bundles to a mixture, within the limits that it keeps."""
    from flexolmo.merge.index import read_about
    from flexolmo.merge.mixture import add_experts

    trusted = trusted_owners(trust, trust_any_signer)
    kept = read_about(model)["influence"]
    judges = _judges(model / "anchor", public, require, seed, kept)
    about = add_experts(model, bundles, trusted, max_bytes=max_bytes, **judges, verify=verify)
    if about["influence"]:
        print_influence(about["influence"])
    echo(f"{model}: public + {', '.join(about['experts'])}")


@app.command("remove")
def remove(
    model: Model,
    names: Annotated[list[str], typer.Argument(help="Experts to remove, by name.")],
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    verify: Verify = False,
) -> None:
    """Remove owners' experts, files and all. Those who stay must be trusted."""
    from flexolmo.merge.mixture import remove_experts

    trusted = trusted_owners(trust, trust_any_signer)
    about = remove_experts(model, names, trusted, verify=verify)
    echo(f"{model}: public + {', '.join(about['experts']) or 'no owner'}")


@app.command("refresh")
def refresh(
    model: Model,
    revocations: Annotated[
        Path, typer.Option(help="Directory of revocation lists, OWNER.revoked.json.")
    ],
    trust: TrustDirectory = None,
) -> None:
    """Take in owners' newer revocation lists, and remove the experts that they revoke.

    Lists need no trusted way: each counts by its owner's signature. An older one never takes the
    place of a newer. Exits 2 if a list was refused, after all others have been taken in.

    Example: flexolmo mix refresh model --revocations inbox --trust trusted/
    """
    from flexolmo.bundle.refresh import take_lists
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.errors import ConfigError, SignatureError
    from flexolmo.merge.mixture import remove_revoked

    if trust is None:
        raise ConfigError("Lists are kept among the trusted owners: give --trust DIR.")
    found = take_lists(trust, revocations)
    for line in found.done:
        echo(line)
    gone = remove_revoked(model, TrustedOwners.load(trust))
    for why in gone.values():
        echo(why)
    echo(f"{model}: {', '.join(gone) or 'no expert'} removed")
    if found.refused:
        raise SignatureError("Lists were refused:\n  " + "\n  ".join(found.refused))


@app.command("inspect")
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print mixture.json, all of it.")] = False,
) -> None:
    """Print what a mixture is built from: experts, owners, licences, terms."""
    import json

    from flexolmo.cli.shown import print_mixture
    from flexolmo.merge.index import read_about

    about = read_about(model)
    if as_json:
        echo(json.dumps(about, indent=2))
    else:
        print_mixture(about)


@app.command("export")
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the checkpoint.")],
    to: Annotated[str, typer.Option(help="Format: hf (transformers).")] = "hf",
    code: Annotated[
        bool,
        typer.Option(
            "--code",
            help="Put the code of the mixture beside its weights: any mixture is then exact, and "
            "experts can be switched. It is loaded with trust_remote_code=True.",
        ),
    ] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prepared sets to refit the router on (their validation split) and to measure the "
            "cost on (their held-out split). Default: text the mixture itself writes."
        ),
    ] = None,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    verify: Verify = False,
) -> None:
    """Write a checkpoint that transformers loads.

    With --code, exactly, whatever it is made of. Without, as its FlexOlmoForCausalLM, whose router
    is linear without bias: a mixture with another router gets the best such router in closed form,
    and the cost in bits per byte is printed.

    Example: flexolmo mix export model --to hf --code -o model-hf
    """
    from flexolmo.data.batches import evaluation_windows, open_set
    from flexolmo.errors import ConfigError
    from flexolmo.evaluation.likelihood import read_windows
    from flexolmo.inference.own_text import own_windows
    from flexolmo.merge.export import (
        export_stock,
        is_stock_router,
        refit_router,
        refuse_more_than_ffn,
        with_stock_router,
    )
    from flexolmo.merge.export_code import export_code
    from flexolmo.merge.mixture import load_mixture

    if to != "hf":
        raise ConfigError(f"Format {to!r} is not known; hf is.")
    if code and data:
        raise ConfigError("--data refits a router for stock; with --code nothing is refit.")
    mixture = load_mixture(
        model, trusted_owners(trust, trust_any_signer), is_mapped=True, verify=verify
    )
    if code:
        export_code(mixture, out)
        echo(f"{out}: exact, with its code beside it; README.md there says how to load it")
        return
    refuse_more_than_ffn(mixture.model)
    if mixture.model.config.document_mask:
        echo(
            f"{out}: stock transformers has no document mask. One text gives the same logits; give "
            "it no window of several texts."
        )
    if is_stock_router(mixture.model):
        export_stock(mixture, mixture.model, out, {"exact": True})
        echo(f"{out}: exact, the router is of the stock kind")
        return
    seq_len = min(256, mixture.model.config.max_seq_len - 1)
    if data:
        sets = [open_set(d, mixture.tokenizer.digest) for d in data]
        fit = [w for s in sets for w in evaluation_windows(s, "validation", seq_len, 60_000)]
        held = {s.name: list(evaluation_windows(s, "heldout", seq_len, 60_000)) for s in sets}
    else:
        fit = [w for own in own_windows(mixture, seed=0).values() for w in own]
        written = own_windows(mixture, sequences=4, seed=1)
        held = {"text of its own": [w for own in written.values() for w in own]}
    stock = with_stock_router(mixture.model, refit_router(mixture.model, fit))
    cost = {}
    echo("bits per byte    ours   stock")
    for name, windows in held.items():
        ours = read_windows(mixture.model, windows).bits_per_byte
        theirs = read_windows(stock, windows).bits_per_byte
        cost[name] = {"ours": ours, "stock": theirs}
        echo(f"{name:<15} {ours:6.3f}  {theirs:6.3f}   ({theirs / ours - 1:+.1%})")
    export_stock(mixture, stock, out, {"exact": False, "bits_per_byte": cost})
    echo(
        f"{out}: the stock format has no place for the {mixture.model.settings.kind} "
        "router; the table shows what its closest linear router costs"
    )


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a stock FlexOlmoForCausalLM checkpoint.")
    ],
    names: Annotated[
        str | None,
        typer.Option(
            help="Names of its experts after the first (public), in order, comma-separated."
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Your private key: you vouch for the import.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory for the mixture.")
    ] = None,
    owner: Annotated[str, typer.Option(help="Your name.")] = "importer",
    licence: Annotated[str, typer.Option(help="Licence of the checkpoint.")] = "Apache-2.0",
    dtype: Precision = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be made, or why nothing would be, and write nothing. Reads the "
            "config, the index and headers, no weights; files of weights may still be missing.",
        ),
    ] = False,
) -> None:
    """Make a mixture from a stock FlexOlmo checkpoint.

    --names, --key and --out are needed, but for a dry run.

    Example: flexolmo mix import FlexOlmo-7x7B/ --dry-run

    Example: flexolmo mix import FlexOlmo-7x7B/ --names math,code --key me.pem -o model
    """
    from flexolmo.bundle.terms import make_terms
    from flexolmo.errors import ConfigError
    from flexolmo.merge.importing import import_stock, plan_import

    chosen = None if names is None else [n.strip() for n in names.split(",") if n.strip()]
    if dry_run:
        print_import_plan(checkpoint, plan_import(checkpoint, chosen, dtype))
        return
    if chosen is None or key is None or out is None:
        raise ConfigError(
            "An import needs --names, --key and --out. Without them: --dry-run, which says what "
            "would be made."
        )
    import_stock(
        checkpoint,
        chosen,
        out,
        key,
        owner=owner,
        licence=licence,
        terms=make_terms(f"As licensed by the checkpoint: {licence}.", ["any"]),
        dtype=dtype,
    )
    echo(f"{out}: imported; with its linear router, without bias")


def print_import_plan(checkpoint: Path, plan: "ImportPlan") -> None:
    """Print what an import of `checkpoint` would make, and what it would not."""
    from rich.table import Table

    from flexolmo.numbers import format_count
    from flexolmo.terminal import PlainConsole

    def row(name: str, parameters: int, size: int) -> tuple[str, str, str]:
        return name, format_count(parameters), f"{size:,}"

    table = Table("", "parameters", "bytes of weights")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, parameters in plan.parameters.items():
        place = "anchor" if name == "public" else f"{name}.bundle"
        table.add_row(*row(place, parameters, plan.weights_bytes[name]))
    whole = row("mixture", sum(plan.parameters.values()), sum(plan.weights_bytes.values()))
    table.add_row(*whole)
    there = len(plan.files) - len(plan.absent_files)
    echo(
        f"{checkpoint}: {len(plan.parameters)} experts in {plan.num_layers} layers, {plan.top_k} "
        f"active per token; {plan.dtype}; {there} of {len(plan.files)} files of weights are there"
    )
    PlainConsole().print(table)
    if plan.absent_files:
        echo("The index names these, whose shapes are taken from the config: ", end="")
        echo(", ".join(plan.absent_files))
    if plan.changes:
        echo("An export back to the stock format would have other tensors:")
        echo("\n".join(f"  {line}" for line in plan.changes))
    else:
        echo("An export back to the stock format would have the same names and shapes.")
    echo("Nothing was written and no weight read: the import alone sees whether all are finite.")


Mixture = Annotated[Path, typer.Option("--model", help="Directory of a mixture.")]


@app.command("prove-optout")
def prove_optout(
    model: Mixture,
    without: Annotated[str, typer.Option(help="The expert that is to have left no trace.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the certificate, JSON.")],
    key: Annotated[Path, typer.Option(help="Your private key: you vouch for what is found.")],
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    subsets: Annotated[
        str, typer.Option(help="Choices of the other experts to compare: how many, or all.")
    ] = "64",
    num_random: Annotated[
        int,
        typer.Option(
            "--random",
            min=1,
            max=100_000,
            help="Sequences of random tokens to compare, and as many of the tokens that the expert "
            "claims most.",
        ),
    ] = 8,
    texts: Annotated[
        Path | None,
        typer.Option(help="File of texts to compare too, one a line. They stay where they are."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Random seed of what is compared. Default: drawn.")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Prove that an expert that is off leaves no trace, and sign a certificate of it.

    The mixture is built anew from the other owners' bundles. It and the whole one with the expert
    off must hold the same numbers and compute the same, bit for bit; and no other bundle may depend
    on the expert. Exits 1, and signs nothing, if that is not so.

    Example: flexolmo mix prove-optout --model model --without hospital --key me.pem -o cert.json
    """
    from flexolmo.errors import ConfigError
    from flexolmo.merge.prove import prove_optout

    if subsets != "all" and not (subsets.isascii() and subsets.isdigit() and int(subsets)):
        raise ConfigError(f"--subsets {subsets!r} is neither a number from 1 nor all.")
    certificate = prove_optout(
        model,
        without,
        out,
        trusted_owners(trust, trust_any_signer),
        key,
        most_subsets=None if subsets == "all" else int(subsets),
        num_random=num_random,
        seed=seed,
        texts=texts,
        passphrase=read_passphrase(passphrase_file),
    )
    print_words(certificate.words)
    echo(f"{out}: signed. To check it: flexolmo mix verify-optout {out} --model {model}")


@app.command("verify-optout")
def verify_optout(
    certificate: Annotated[Path, typer.Argument(help="The certificate.")],
    model: Mixture,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    signer: Annotated[
        Path | None,
        typer.Option(
            help="Public key that must have signed the certificate. Default: any in --trust."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="The file of texts that were compared, to compare them again."),
    ] = None,
) -> None:
    """Check a certificate that an expert leaves no trace, and repeat its comparison here.

    The mixture may hold the expert, or not any more; all other files must be those of the
    certificate. Exits 1, and says why, if anything does not hold.

    Example: flexolmo mix verify-optout cert.json --model model --signer coordinator.pub
    """
    from flexolmo.merge.prove import verify_optout

    trusted = trusted_owners(trust, trust_any_signer)
    found = verify_optout(certificate, model, trusted, signer=signer, texts=texts)
    name = found.certificate.findings.expert
    print_words(found.certificate.words)
    echo(f"{certificate}: holds, signed by {found.signer or 'the key'} ({found.key_id})")
    state = "no longer holds" if found.is_removed else "still holds"
    echo(f"{model}: {state} {name}; all else is what the certificate was made of")
    echo(f"Compared again here, bit for bit: after {found.compared.positions:,} positions")
    for kind in found.not_repeated:
        why = f"{model} has no table of {name}" if kind == "claimed" else "--texts was not given"
        echo(f"Not compared again: the {kind} sequences, as {why}")
    same = "the very numbers" if found.has_same_logits else "other numbers than those"
    echo(f"Both mixtures compute here {same} that they did where the certificate was made.")


def print_words(words: "Words") -> None:
    """Print the words of a certificate."""
    from textwrap import fill

    parts = {
        "Proven by this comparison": words.proven,
        "Declared by the other owners": words.declared,
        "Not covered": words.not_covered,
    }
    for title, sentences in parts.items():
        echo(f"{title}:")
        for sentence in sentences or ["nothing"]:
            echo(fill(sentence, 96, initial_indent="- ", subsequent_indent="  "))
        echo()
