"""`flexolmo expert`: an owner's commands, and the coordinator's check of a bundle."""

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo.cli.anchor import Device, Overrides, Threads
from flexolmo.cli.keys import PassphraseFile, key, read_passphrase, revoke, rotate_key
from flexolmo.cli.trust import TrustDirectory
from flexolmo.numbers import format_duration, format_megabytes, format_percent
from flexolmo.terminal import PlainConsole, echo

app = typer.Typer(
    no_args_is_help=True,
    help="Train an expert on your own text, sign it into a bundle, check bundles.",
)


@app.command("train")
def train(
    anchor: Annotated[Path, typer.Option(help="Directory of the anchor.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Your set, prepared with the anchor's tokenizer (see flexolmo data prepare)."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the expert, for example math.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run. Default: NAME.run")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="TOML recipe, or one that comes with FlexOlmo: expert, expert_paper, "
            "expert_private, paper/expert, paper/expert_low_rank. What it leaves out has defaults."
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="Weights that training may change: all (FFN, attention, embedding and output "
            "head), ffn+head, or ffn (the paper's; the only one that exports to the stock format).",
            show_default="the recipe's",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Train the FFN as a delta of this rank to the anchor's: a smaller bundle. "
            "0 is a whole FFN.",
            show_default="the recipe's",
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train an FFN of this width, begun with the anchor's columns that your text "
            "uses most.",
            show_default="the recipe's",
        ),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="The prepared public set: to mix in the recipe's replay fraction of it, or for "
            "the discriminant router."
        ),
    ] = None,
    dp_epsilon: Annotated[
        float | None,
        typer.Option(
            help="Train under differential privacy, with this epsilon for weights and router's "
            "table together; the table gets a quarter, or what --set router.epsilon says.",
            show_default="no privacy, or the recipe's",
        ),
    ] = None,
    dp_delta: Annotated[
        float | None,
        typer.Option(
            help="Chance with which epsilon may be exceeded; needs --dp-epsilon.",
            show_default="1e-6",
        ),
    ] = None,
    dp_unit: Annotated[
        str | None,
        typer.Option(
            help="Text that is protected as one: document, sequence, or all texts of one value of "
            "data prepare --unit-field (unit, or that field's name, such as patient); needs "
            "--dp-epsilon.",
            show_default="document",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Train nothing: say what training would take (time, memory, bundle size, passes "
            "over your text), from a few steps timed on this machine.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan of --plan as JSON.")
    ] = False,
    overrides: Overrides = None,
    threads: Threads = None,
    device: Device = "cpu",
    anchor_digest: Annotated[
        str | None,
        typer.Option(help="Digest that the anchor must have, sha256:..., as agreed upon."),
    ] = None,
    trust_coordinator: Annotated[
        Path | None,
        typer.Option(help="The coordinator's public key, which must have signed the anchor."),
    ] = None,
) -> None:
    """Train one expert beside the frozen anchor. Nothing is sent; resumes after a kill.

    Example: flexolmo expert train --anchor anchor --data prepared/math --name math

    Small: flexolmo expert train --anchor anchor --data prepared/math --name math --rank 16

    First see what it will take: add --plan

    With one sequence in ten public: add --public prepared/public --set replay=0.1

    Differentially private: --recipe expert_private --dp-epsilon 8 --dp-unit document

    By several processes, with torchrun: docs/guides/many_processes.md
    """
    from flexolmo.bundle.release import Budget
    from flexolmo.config import find_recipe, read_recipe
    from flexolmo.data.batches import open_set
    from flexolmo.errors import ConfigError
    from flexolmo.model.checkpoint import check_anchor, load_anchor
    from flexolmo.model.parallel import are_several, processes
    from flexolmo.train.expert import ExpertRecipe, save_expert, train_expert
    from flexolmo.train.plan import plan_training

    with processes(device) as own_device:
        if as_json and not plan:
            raise ConfigError("--json goes with --plan, which was not given.")
        if dp_epsilon is None and (dp_delta is not None or dp_unit is not None):
            raise ConfigError("--dp-delta and --dp-unit go with --dp-epsilon, which was not given.")
        short = {
            "scope": scope,
            "rank": rank,
            "width": width,
            "privacy.epsilon": dp_epsilon,
            "privacy.delta": dp_delta,
            "router.delta": dp_delta,
            "privacy.unit": None if dp_unit is None else name_unit(dp_unit, data),
        }
        if dp_epsilon is not None and not any(
            o.startswith("router.epsilon=") for o in overrides or ()
        ):
            short["router.epsilon"] = dp_epsilon / 4
        settings = read_recipe(
            recipe and find_recipe(recipe),
            ExpertRecipe,
            [*(overrides or ()), *(f"{k}={v}" for k, v in short.items() if v is not None)],
        )
        if public is not None and not (settings.replay or settings.router.kind == "discriminant"):
            raise ConfigError(
                f"Found a public set, {public}, but replay is 0, so none of it would be "
                "read. Say how much: --set replay=0.1, or leave --public out."
            )
        if public is None and settings.replay:
            raise ConfigError(
                f"Replay is {settings.replay}, but no public set was given: add --public "
                "DIRECTORY, or --set replay=0."
            )
        start = load_anchor(anchor, is_mapped=are_several())
        check_anchor(start, anchor, anchor_digest, trust_coordinator)
        if not are_several():
            start.model.to(own_device)
        replayed = None if public is None else open_set(public, start.tokenizer.digest)
        own = open_set(data, start.tokenizer.digest)
        if plan:
            told = plan_training(start, own, name, settings, threads, replayed)
            if as_json:
                echo(json.dumps(told, indent=2))
            else:
                print_plan(name, told)
            return
        out = out or Path(f"{name}.run")
        trained = train_expert(start, own, name, settings, out, threads, public=replayed)
        save_expert(trained, out)
        if "budget" in trained.record:
            echo(f"private: {Budget.model_validate(trained.record['budget']).summary()}")
        echo(f"{out}: expert {name} is trained; sign it with flexolmo expert pack {out}")


def name_unit(asked: str, data: Path) -> str:
    """The unit of privacy that is meant, where the set's own field stands for `unit`.

    Raises ConfigError for another word.
    """
    from typing import get_args

    from flexolmo.data.prepared import read_card
    from flexolmo.data.units import Unit
    from flexolmo.errors import ConfigError

    if asked in get_args(Unit):
        return asked
    field = read_card(data).get("unit_field")
    if asked == field:
        return "unit"
    has = "it was prepared without one" if field is None else f"which is {field!a}"
    raise ConfigError(
        f"--dp-unit {asked!a}: expected document, sequence, unit, or the field of {data} that "
        f"`data prepare --unit-field` named ({has})."
    )


def print_plan(name: str, plan: dict[str, Any]) -> None:
    """A plan of `plan_training` as a table, for a terminal."""
    from rich.table import Table

    from flexolmo.bundle.release import Budget

    table = Table("", f"training {name} would take")
    time = format_duration(plan["seconds"])
    table.add_row("time", f"about {time}, {plan['steps']:,} steps of {plan['step_seconds']:.3g} s")
    table.add_row("memory", f"{format_megabytes(plan['memory_bytes'])} MB at the peak")
    table.add_row("bundle", f"{plan['weights_bytes']:,} bytes of weights, and a manifest")
    table.add_row("parameters", f"{plan['parameters']:,}")
    in_the_mean = "" if plan["budget"] is None else " in the mean"
    table.add_row("tokens", f"{plan['tokens']:,}{in_the_mean}")
    table.add_row("your text", f"{plan['own_tokens']:,} tokens, read {plan['passes']:.1f} times")
    if plan["budget"] is not None:
        budget = Budget.model_validate(plan["budget"])
        table.add_row("privacy", budget.summary())
        share = format_percent(budget.sampling_rate, 0)
        table.add_row(
            "noise of a step", f"{budget.noise:.2f} clipping norms; it reads {share} of all"
        )
    PlainConsole().print(table)


@app.command("compress")
def compress(
    run: Annotated[Path, typer.Argument(help="Directory of a finished expert run.")],
    anchor: Annotated[Path, typer.Option(help="Directory of the anchor it was trained beside.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for the smaller expert's run; of a curve, for curve.json and curve.png."
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the FFN's difference to the anchor's at this rank."),
    ] = None,
    attention_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep what it changes in attention at this rank; needs --rank. Default: as it is.",
        ),
    ] = None,
    embedding_rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep what it changes in the embedding at this rank; needs --rank."
        ),
    ] = None,
    head_rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep what it changes in the output head at this rank; needs --rank."
        ),
    ] = None,
    heal: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train the smaller expert for this many steps afterwards, which restores much of "
            "what was cut; needs --data. 40 is a good start.",
        ),
    ] = 0,
    half: Annotated[
        bool,
        typer.Option(
            "--half", help="Keep low-rank deltas in bfloat16, half the bytes; needs --heal."
        ),
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Keep this many of the FFN's columns, those your text uses most."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your prepared set: says which columns and directions matter (with --rank, do "
            "give it), and is what a curve is measured on."
        ),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve", help="Make no expert: measure what several ranks and widths would cost."
        ),
    ] = False,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes of text to read at most for --curve. Default: all."),
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Make a trained expert smaller, or see first what that would cost.

    See: flexolmo expert compress math.run --anchor anchor --curve --data prepared/math --out curve

    By rank: flexolmo expert compress math.run --anchor anchor --rank 44 --attention-rank 52
    --embedding-rank 40 --head-rank 80 --data prepared/math --heal 40 --half --out math-small.run

    By width: flexolmo expert compress math.run --anchor anchor --width 128 --data prepared/math
    --out math-small.run

    The new run is packed like any other; its record and its bundle say what it was made of.
    """
    from flexolmo.data.batches import open_set
    from flexolmo.errors import ConfigError
    from flexolmo.evaluation.curve import measure_curve
    from flexolmo.files import write_json
    from flexolmo.model.checkpoint import load_anchor
    from flexolmo.report.drawing import save_figure
    from flexolmo.report.plots import plot_compression
    from flexolmo.runtime import choose_device, set_up
    from flexolmo.train.expert import load_expert, save_expert
    from flexolmo.train.shrink import compress_expert, count_bytes, heal_expert

    if sum((rank is not None, width is not None, curve)) != 1:
        raise ConfigError(
            "Say how, in one way: --rank R, --width W --data SET, or --curve --data SET."
        )
    given = {
        "attention_rank": attention_rank,
        "embedding_rank": embedding_rank,
        "head_rank": head_rank,
    }
    ranks = {k: v for k, v in given.items() if v is not None}
    if ranks and rank is None:
        name, value = next(iter(ranks.items()))
        raise ConfigError(
            f"--{name.replace('_', '-')} {value} goes with --rank, which was not given."
        )
    if data is None and rank is None:
        raise ConfigError("This reads text: add --data with your prepared set.")
    if heal and (data is None or curve):
        raise ConfigError(f"--heal {heal} trains: give the prepared set, --data, and no --curve.")
    if half and not heal:
        raise ConfigError("--half goes with --heal, which was not given.")
    if max_bytes is not None and not curve:
        raise ConfigError(f"--max-bytes {max_bytes} is for --curve, which was not given.")
    if not curve and (out / "expert.json").exists():
        raise ConfigError(f"{out} holds a finished expert already; give another --out.")
    expert = load_expert(run)
    base = load_anchor(anchor)
    base.model.to(choose_device(device))
    own = None if data is None else open_set(data, base.tokenizer.digest)
    set_up(0, threads)
    if own is not None and curve:
        found = measure_curve(base, expert, own, max_bytes=max_bytes)
        write_json(out / "curve.json", found, is_private=True)
        save_figure(plot_compression(found), out / "curve.png", is_private=True)
        print_curve(found)
        echo(f"{out / 'curve.json'} and {out / 'curve.png'}")
        return
    small = compress_expert(
        base, expert, rank=rank, delta_rank=ranks or None, width=width, data=own
    )
    if heal and own is not None:
        small = heal_expert(
            base, small, own, heal, has_half_deltas=half, run_dir=out, num_threads=threads
        )
    save_expert(small, out)
    before = count_bytes(expert.tensors)
    after = count_bytes(small.tensors)
    echo(
        f"{out}: expert {small.name}, {before:,} bytes before, {after:,} after "
        f"({100 * after / before:.0f} %); sign it with flexolmo expert pack {out}"
    )


def print_curve(curve: dict[str, Any]) -> None:
    """The points of `measure_curve` as a table, for a terminal."""
    from rich.table import Table

    bits, whole = curve["bits_per_byte"], curve["whole_bytes"]
    gain = bits["anchor"] - bits["whole"]
    table = Table(
        "anchor + expert", "bytes", "of whole", f"bits per byte, {curve['set']}", "of gain kept"
    )

    def row(label: str, size: int, found: float) -> None:
        kept = f"{(bits['anchor'] - found) / gain:.0%}" if gain > 0 else "none to keep"
        table.add_row(label, f"{size:,}", f"{size / whole:.0%}", f"{found:.4f}", kept)

    row("anchor alone", 0, bits["anchor"])
    for p in curve["points"]:
        size = f"rank {p['rank']}" if "rank" in p else f"width {p['width']}"
        row(f"{p['series']}, {size}", p["bytes"], p["bits_per_byte"])
    row("the expert as it is", whole, bits["whole"])
    PlainConsole().print(table)


MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Bytes of weights to accept at most; larger ones are refused unread.",
        show_default="32 GiB",
    ),
]


app.command("key")(key)
app.command("rotate-key")(rotate_key)
app.command("revoke")(revoke)


@app.command("pack")
def pack(
    run: Annotated[Path, typer.Argument(help="Directory of a finished expert run.")],
    key: Annotated[Path, typer.Option(help="Your private key (see flexolmo expert key).")],
    owner: Annotated[str, typer.Option(help="Your name, as the coordinator knows you.")],
    licence: Annotated[
        str, typer.Option(help="SPDX expression, or LicenseRef-NAME for terms of your own.")
    ],
    purpose: Annotated[
        list[str],
        typer.Option(
            help="Purpose that you permit; may be repeated: any, clinical-care, commercial, "
            "education, general-research, health-research, methods-research, non-commercial, "
            "population-research, public-information, training. Meanings: flexolmo expert purposes"
        ),
    ],
    prohibit: Annotated[
        list[str] | None,
        typer.Option(
            help="Purpose that you prohibit, also within a permitted one; may be repeated."
        ),
    ] = None,
    audience: Annotated[
        list[str] | None,
        typer.Option(
            help="Group of people, as deployers name it, that alone may use the expert; may be "
            "repeated. Default: anybody."
        ),
    ] = None,
    terms: Annotated[
        str, typer.Option(help="Terms of use in a sentence, for people.")
    ] = "No terms beyond the licence.",
    valid_from: Annotated[
        datetime.datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day of use, UTC.")
    ] = None,
    valid_until: Annotated[
        datetime.datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day of use, UTC.")
    ] = None,
    attribution: Annotated[
        str | None, typer.Option(help="Credit that every answer made with the expert must show.")
    ] = None,
    serial: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of this bundle, above all before of your name and the expert's. Default: "
            "the next, by the record beside the key (KEY.serials.json).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Path of the bundle. Default: NAME.bundle")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a trained expert into a bundle, the only thing that leaves the owner's premises.

    Example: flexolmo expert pack math.run --key math.pem --owner "Math Institute" --licence MIT
    --purpose general-research --prohibit commercial --valid-until 2030-12-31
    """
    from flexolmo.bundle.terms import make_terms
    from flexolmo.train.expert import load_expert, pack_expert

    stated = make_terms(
        terms,
        purpose,
        prohibited=prohibit or (),
        audience=audience or (),
        valid_from=valid_from and valid_from.date(),
        valid_until=valid_until and valid_until.date(),
        attribution=attribution,
    )

    expert = load_expert(run)
    path = pack_expert(
        expert,
        out or Path(f"{expert.name}.bundle"),
        key,
        owner=owner,
        licence=licence,
        terms=stated,
        serial=serial,
        passphrase=read_passphrase(passphrase_file),
    )
    size = sum(f.stat().st_size for f in path.iterdir())
    echo(f"{path}: {format_megabytes(size)} MB. Read what it says: flexolmo expert inspect {path}")


@app.command("purposes")
def purposes() -> None:
    """List the purposes that terms permit or prohibit, and what each means.

    A permitted purpose permits those within it; a prohibited one prohibits those within it.
    """
    from rich.table import Table

    from flexolmo.bundle.terms import PURPOSES

    table = Table("purpose", "meaning", "within", "taken from")
    for name, purpose in PURPOSES.items():
        table.add_row(name, purpose.meaning, purpose.within or "", purpose.source)
    PlainConsole().print(table)


@app.command("inspect")
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory NAME.bundle.")],
    trust: TrustDirectory = None,
    max_bytes: MaxBytes = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every entry, each tensor's too, as JSON.")
    ] = False,
) -> None:
    """Print what a bundle claims, and whether it holds up.

    Example: flexolmo expert inspect math.bundle --trust trusted/
    """
    from flexolmo.bundle.bundle import inspect_bundle
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.cli.shown import print_bundle

    trusted = TrustedOwners.load(trust) if trust else None
    found = inspect_bundle(bundle, trusted, max_bytes=max_bytes)
    if as_json:
        echo(json.dumps(found, indent=2, default=str))
    else:
        print_bundle(found)


@app.command("verify")
def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory NAME.bundle.")],
    trust: TrustDirectory = None,
    trust_any_signer: Annotated[
        bool, typer.Option(help="Accept a signer you do not know; its key is printed.")
    ] = False,
    max_bytes: MaxBytes = None,
) -> None:
    """Check a bundle: files, signature, signer, tensors, terms. Exits 2 when it is refused.

    Example: flexolmo expert verify math.bundle --trust trusted/
    """
    from flexolmo.bundle.bundle import open_bundle
    from flexolmo.bundle.trust import TrustedOwners

    trusted = TrustedOwners.load(trust) if trust else None
    found = open_bundle(bundle, trusted, allow_unknown_signer=trust_any_signer, max_bytes=max_bytes)
    signer = f"trusted owner {found.signer}" if found.signer else f"unknown key {found.key_id}"
    echo(
        f"{bundle}: whole, signed by {signer}; expert {found.manifest.name} for anchor "
        f"{found.manifest.anchor_digest}"
    )
