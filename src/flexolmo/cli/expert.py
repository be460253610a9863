"""`flexolmo expert`: an owner's verbs, and the coordinator's look at a bundle."""

import datetime
from pathlib import Path
from typing import Annotated

import typer

from flexolmo.cli.anchor import Overrides, Threads

app = typer.Typer(no_args_is_help=True,
                  help="Train an expert on your own text, sign it into a bundle, check bundles.")
TrustDirectory = Annotated[Path | None, typer.Option(
    "--trust", help="Directory of trusted owners' public keys, one OWNER.pub each.")]


@app.command("train")
def train(
    anchor: Annotated[Path, typer.Option(help="Directory of the anchor.")],
    data: Annotated[Path, typer.Option(
        help="Your set, prepared with the anchor's tokenizer (see flexolmo data prepare).")],
    name: Annotated[str, typer.Option(help="Name of the expert, for example math.")],
    out: Annotated[Path | None, typer.Option(
        help="Directory of the run. Default: NAME.run")] = None,
    recipe: Annotated[Path | None, typer.Option(
        help="TOML recipe; what it leaves out has defaults.")] = None,
    overrides: Overrides = None,
    threads: Threads = None,
) -> None:
    """Train one expert beside the frozen anchor. Nothing leaves; resumes after a kill.

    Example: flexolmo expert train --anchor anchor --data prepared/math --name math
    """
    from flexolmo.config import read_recipe
    from flexolmo.data.batches import open_set
    from flexolmo.model.checkpoint import load_anchor
    from flexolmo.train.expert import ExpertRecipe, save_expert, train_expert

    settings = read_recipe(recipe, ExpertRecipe, overrides or ())
    start = load_anchor(anchor)
    out = out or Path(f"{name}.run")
    save_expert(train_expert(start, open_set(data, start.tokenizer.digest), name, settings, out,
                             threads), out)
    typer.echo(f"{out}: expert {name} is trained; sign it with flexolmo expert pack {out}")


@app.command("key")
def key(path: Annotated[Path, typer.Argument(help="File for the private key.")]) -> None:
    """Make a signing key. Keep the private file; give PATH.pub to the coordinator.

    Example: flexolmo expert key hospital.pem
    """
    from flexolmo.bundle.signing import create_key

    typer.echo(f"{path} (keep it secret) and {create_key(path)} (give it to the coordinator)")


@app.command("pack")
def pack(
    run: Annotated[Path, typer.Argument(help="Directory of a finished expert run.")],
    key: Annotated[Path, typer.Option(help="Your private key (see flexolmo expert key).")],
    owner: Annotated[str, typer.Option(help="Who you are, as the coordinator knows you.")],
    licence: Annotated[str, typer.Option(
        help="SPDX expression, or LicenseRef-NAME for terms of your own.")],
    terms: Annotated[str, typer.Option(help="What the coordinator may do with it, in a sentence.")
                     ] = "No terms beyond the licence.",
    expires: Annotated[datetime.datetime | None, typer.Option(
        formats=["%Y-%m-%d"], help="Last day of use.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: NAME.bundle")] = None,
) -> None:
    """Sign a trained expert into a bundle, the only thing that leaves your house.

    Example: flexolmo expert pack math.run --key math.pem --owner "Math Institute" --licence MIT
    """
    from flexolmo.train.expert import load_expert, pack_expert

    expert = load_expert(run)
    path = pack_expert(expert, out or Path(f"{expert.name}.bundle"), key, owner=owner,
                       licence=licence, terms=terms, expires=expires and expires.date())
    size = sum(f.stat().st_size for f in path.iterdir())
    typer.echo(f"{path}: {size / 1e6:.1f} MB. Read what it says: flexolmo expert inspect {path}")


@app.command("inspect")
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Directory NAME.bundle.")],
    trust: TrustDirectory = None,
) -> None:
    """Print everything a bundle claims, and whether it holds up, as JSON."""
    import json

    from flexolmo.bundle.bundle import inspect_bundle
    from flexolmo.bundle.signing import TrustedOwners

    trusted = TrustedOwners.load(trust) if trust else None
    typer.echo(json.dumps(inspect_bundle(bundle, trusted), indent=2, default=str))


@app.command("verify")
def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory NAME.bundle.")],
    trust: TrustDirectory = None,
    trust_any_signer: Annotated[bool, typer.Option(
        help="Accept a signer you do not know; its key is printed.")] = False,
) -> None:
    """Check a bundle: files, signature, signer, tensors, terms. Exits 2 when it is refused.

    Example: flexolmo expert verify math.bundle --trust trusted/
    """
    from flexolmo.bundle.bundle import open_bundle
    from flexolmo.bundle.signing import TrustedOwners

    trusted = TrustedOwners.load(trust) if trust else None
    found = open_bundle(bundle, trusted, allow_unknown_signer=trust_any_signer)
    signer = f"trusted owner {found.signer}" if found.signer else f"unknown key {found.key_id}"
    typer.echo(f"{bundle}: whole, signed by {signer}; expert {found.manifest.name} for anchor "
               f"{found.manifest.anchor_digest}")
