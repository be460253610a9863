"""`flexolmo audit summary`: what a publisher says of the text that a mixture was trained on."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo.cli.run import Only, Without, switches
from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.terminal import echo

app = typer.Typer()


@app.command("summary")
def summary(
    model: Annotated[Path, typer.Option(help="Directory of a mixture.")],
    out: Annotated[Path, typer.Option(help="Directory for page.html, page.md and summary.json.")],
    about: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of what only you know: tables provider, model, processing, and "
            "sources.NAME for each source. The guide has an example."
        ),
    ] = None,
    without: Without = None,
    only: Only = None,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
) -> None:
    """Write the public summary of training content, for exactly the sources that are on.

    For whoever publishes a mixture. It has the structure of the European Commission's template for
    Article 53(1)(d) of the AI Act, filled from signed bundles, release reports, the anchor's record
    and --about. What nobody told is written as not stated, with whom to ask. Sources that are off
    are listed by name and digest, and nothing else is said of them. No legal advice.

    Example: flexolmo audit summary --model model --without code --trust trusted --about about.toml
    --out summary
    """
    from flexolmo.audit.summary import About, find_unstated, make_summary
    from flexolmo.config import read_recipe
    from flexolmo.errors import ConfigError
    from flexolmo.files import write_json
    from flexolmo.report.summary_page import write_summary_page

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, expected a directory. Choose another place.")
    said = About() if about is None else read_recipe(about, About)
    trusted = trusted_owners(trust, trust_any_signer)
    found = make_summary(model, trusted, said, **switches(without, only))
    write_json(out / "summary.json", found)
    page = write_summary_page(found, out)
    echo(f"On: {', '.join(found['sources'])}. Off: {', '.join(found['held']['off']) or 'none'}.")
    for who, what in find_unstated(found).items():
        echo(f"Not stated: ask {who}: {', '.join(what)}")
    echo(f"{page}, with page.md and summary.json beside it")
