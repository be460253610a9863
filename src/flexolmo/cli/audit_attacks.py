"""`flexolmo audit membership` and `extraction`: attacks on what a model remembers of its text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexolmo.cli.run import MixOption, Only, Without, parse_mix, switches
from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from flexolmo.audit.subjects import Subjects
    from flexolmo.data.batches import TokenSet

app = typer.Typer()
Model = Annotated[
    Path, typer.Option(help="Directory of a mixture, an anchor, or a stock Hugging Face model.")
]
Data = Annotated[Path, typer.Option(help="The prepared set that was trained on; it stays here.")]
Expert = Annotated[
    str | None,
    typer.Option(help="The mixture's expert that was trained on it. Default: the set's name."),
]
Seed = Annotated[int, typer.Option(min=0, help="Random seed of drawn documents and samples.")]


@app.command("membership")
def membership(
    model: Model,
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Directory for membership.json, page.html and stays_here.json.")
    ],
    expert: Expert = None,
    without: Without = None,
    only: Only = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="The model that it was trained from, of one that is no mixture."),
    ] = None,
    mix: MixOption = "states",
    max_tokens: Annotated[int, typer.Option(min=20, help="Tokens of a document to read.")] = 256,
    max_documents: Annotated[
        int, typer.Option(min=1, help="Documents to read at most, members and others each.")
    ] = 1000,
    seed: Seed = 0,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
) -> None:
    """Attack membership: can your documents be told from others that were not trained on?

    Your expert is attacked alone, as whoever has the bundle can; the mixture with it on and off;
    and the anchor. The reference that two of the attacks need is the same mixture with your expert
    off. What the attacker would find most certain is written to stays_here.json, for you
    alone.

    Example: flexolmo audit membership --model model --data prepared/code --out membership
    """
    from flexolmo.audit.membership import audit_membership
    from flexolmo.files import write_json
    from flexolmo.report.membership_page import write_membership_page
    from flexolmo.runtime import set_up

    set_up(seed)
    subjects, token_set = open_attack(
        model, data, trust, trust_any_signer, expert, without, only, reference, mix
    )
    found, stays = audit_membership(
        subjects, token_set, max_tokens=max_tokens, max_documents=max_documents, seed=seed
    )
    write_json(out / "stays_here.json", stays, is_private=True)
    write_json(out / "membership.json", found, is_private=True)
    page = write_membership_page(found, out)
    print_membership(found)
    echo(f"{page}, with membership.json beside it; stays_here.json quotes your text")


@app.command("extraction")
def extraction(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for extraction.json, page.html and stays_here.json; the same command "
            "goes on where it was."
        ),
    ],
    expert: Expert = None,
    without: Without = None,
    only: Only = None,
    mix: MixOption = "states",
    max_documents: Annotated[
        int, typer.Option(min=1, help="Training documents to attack at most; the paper's 10,000.")
    ] = 10_000,
    samples: Annotated[
        int, typer.Option(min=0, help="Samples of each; 0 samples none and computes probabilities.")
    ] = 10,
    prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens the model is given.")] = 32,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens it must write.")] = 256,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.")
    ] = 50,
    top_p: Annotated[
        float, typer.Option(help="Choose among tokens that together have this probability.")
    ] = 0.95,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 1.0,
    threshold: Annotated[
        float, typer.Option(help="Similarity from which a document counts as extracted.")
    ] = 0.9,
    near_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Search for text with so many tokens replaced too. It takes as long again."
        ),
    ] = 0,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Sample the first documents, say how long all take, stop."),
    ] = False,
    seed: Seed = 0,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
) -> None:
    """Attack by extraction: does the model write your documents when given their beginnings?

    As in the paper, by sampling; and for every document the probability that sampling writes it,
    which gives the attempts that an attacker needs. Your expert is attacked alone, as whoever has
    the bundle can; the mixture with it on and off; and the anchor.

    Example: flexolmo audit extraction --model model --data prepared/code --out extraction
    """
    from flexolmo.audit.extraction import ExtractionSettings, audit_extraction
    from flexolmo.config import parse_settings
    from flexolmo.files import write_json
    from flexolmo.report.extraction_page import write_extraction_page
    from flexolmo.runtime import set_up

    settings = parse_settings(
        {
            "prefix_tokens": prefix_tokens,
            "continuation_tokens": continuation_tokens,
            "samples": samples,
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "threshold": threshold,
            "near_tokens": near_tokens,
            "max_documents": max_documents,
            "seed": seed,
        },
        ExtractionSettings,
        "the command line",
    )
    set_up(seed)
    subjects, token_set = open_attack(
        model, data, trust, trust_any_signer, expert, without, only, None, mix
    )
    made = audit_extraction(
        subjects,
        token_set,
        settings,
        out / "parts",
        say=lambda line: echo(line, err=True),
        plan_only=plan,
    )
    if made is None:
        return
    found, stays = made
    write_json(out / "stays_here.json", stays, is_private=True)
    write_json(out / "extraction.json", found, is_private=True)
    page = write_extraction_page(found, out)
    print_extraction(found)
    echo(f"{page}, with extraction.json beside it; stays_here.json and parts quote your text")


def open_attack(
    model: Path,
    data: Path,
    trust: Path | None,
    trust_any_signer: bool,
    expert: str | None,
    without: str | None,
    only: str | None,
    reference: Path | None,
    mix: str,
) -> "tuple[Subjects, TokenSet]":
    """The models under attack, and the set that was trained on."""
    from flexolmo.audit.subjects import open_subjects
    from flexolmo.data.batches import open_set

    token_set = open_set(data)
    subjects = open_subjects(
        model,
        token_set,
        trusted_owners(trust, trust_any_signer),
        expert=expert,
        **switches(without, only),
        reference=reference,
        mix=parse_mix(mix),
    )
    return subjects, token_set


def print_membership(found: dict[str, Any]) -> None:
    """The figures of `audit_membership` as a table, for a terminal."""
    from rich.table import Table

    from flexolmo.audit.results import ATTACKS, SUBJECTS

    counts = found["documents"]
    echo(f"{counts['members']:,} members and {counts['others']:,} others.")
    table = Table("model", "attack", "AUC", "95 % interval", "found at 1 % false alarms")
    for subject, by_attack in found["subjects"].items():
        for attack in ATTACKS:
            if attack in by_attack:
                x = by_attack[attack]
                low, high = x["interval"]
                caught = f"{x['caught']['0.01']['share']:.1%}"
                row = (f"{x['auc']:.3f}", f"{low:.3f} to {high:.3f}", caught)
                table.add_row(SUBJECTS[subject], ATTACKS[attack], *row)
    PlainConsole().print(table)
    _print_control(found)


def print_extraction(found: dict[str, Any]) -> None:
    """The figures of `audit_extraction` as a table, for a terminal."""
    from rich.table import Table

    from flexolmo.audit.results import SUBJECTS

    table = Table("model", "extracted", "95 % interval", "word for word in 1,000 attempts, p 0.9")
    for subject, x in found["subjects"].items():
        row = ["not sampled", ""]
        if "extracted" in x:
            low, high = x["extracted"]["interval"]
            row = [f"{x['extracted']['share']:.1%}", f"{low:.1%} to {high:.1%}"]
        exact = x["exact"]
        at = exact["attempts"].index(1000)
        table.add_row(SUBJECTS[subject], *row, f"{exact['discoverable']['0.9'][at]['share']:.1%}")
    PlainConsole().print(table)
    _print_control(found)


def _print_control(found: dict[str, Any]) -> None:
    if found["off_equals_anchor"] is not None:
        is_met = found["off_equals_anchor"]
        said = "every number is" if is_met else "NOT every number is"
        echo(f"Control: with the expert off, {said} the anchor's, to the bit.")
