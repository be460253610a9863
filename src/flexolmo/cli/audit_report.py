"""`flexolmo audit report` and `verify-report`: what a data-protection officer reads and checks."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo.cli.keys import PassphraseFile, read_passphrase
from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.terminal import echo

app = typer.Typer()


@app.command("report")
def report(
    bundle: Annotated[Path, typer.Argument(help="Your signed bundle, NAME.bundle.")],
    data: Annotated[Path, typer.Option(help="The prepared set it was trained on; it stays here.")],
    key: Annotated[Path, typer.Option(help="Your private key, which signed the bundle.")],
    stays: Annotated[
        Path, typer.Option(help="Directory for the copy that quotes your text and must not leave.")
    ],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Results of an attack: the --out of flexolmo audit membership, extraction, "
            "canaries measure, relearning or statistics. Give --results once for each."
        ),
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            help="Results of the same attack on an expert that knows its text by heart, which show "
            "that the attack works."
        ),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(help="The prepared public set: measure how far your text is from it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory for the copy that may leave. Default: NAME.report beside "
            "the bundle, where flexolmo mix build looks for it.",
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Write the release report of a bundle, for your data-protection officer, and sign it.

    It says what was trained, what is promised of privacy and what is not, what each attack found
    with its intervals and controls, which attacks were not made, which personal data patterns find
    in your text, and how far it is from public text. The copy that may leave holds figures alone;
    the one that stays lists the documents that attacks hit worst and what is known by heart.

    Example: flexolmo audit report code.bundle --data prepared/code --key code.pem
    --results audits/membership --results audits/extraction --stays audits/report
    """
    from flexolmo.audit.release import make_findings
    from flexolmo.audit.results import read_results
    from flexolmo.bundle.bundle import open_bundle
    from flexolmo.bundle.release import place_of, write_release
    from flexolmo.bundle.signing import encode_public, key_id, read_private_key
    from flexolmo.data.batches import open_set
    from flexolmo.errors import ConfigError
    from flexolmo.files import write_bytes, write_json
    from flexolmo.report.release_page import make_shown, render_release

    out = out or place_of(bundle)
    if stays.exists() and not stays.is_dir():
        raise ConfigError(f"--stays {stays} is a file, expected a directory. Choose another place.")
    kept = stays.resolve()
    for leaving in (bundle, out):
        place = leaving.resolve()
        beside = {place.parent, leaving.parent.resolve()}  # two if it is a link
        if kept == place or place in kept.parents or kept in beside:
            raise ConfigError(
                f"Files of --stays {stays} would lie in {leaving}, which may leave, or right "
                "beside it. Give a directory elsewhere, such as one beside your attacks."
            )
    private = read_private_key(key, read_passphrase(passphrase_file))
    opened = open_bundle(bundle, None, allow_unknown_signer=True, judges_days=False)
    own = key_id(encode_public(private))
    if own != opened.key_id:
        raise ConfigError(
            f"{bundle} was signed by the key {opened.key_id}; {key} is {own}. Sign the report with "
            "the bundle's own key, or pack the bundle again with this one."
        )
    made = make_findings(
        opened,
        open_set(data),
        [read_results(path) for path in results or ()],
        controls=[read_results(path) for path in control or ()],
        public=None if public is None else open_set(public),
    )
    findings = made.report.findings
    shown = make_shown(made.report, opened.manifest)
    write_json(
        stays / "report.json",
        {"report": made.report.model_dump(mode="json")} | made.stays,
        is_private=True,
    )
    page = render_release(made.report, made.stays).encode()
    write_bytes(stays / "page.html", page, is_private=True)
    told = f"{out}, in place of the one before" if out.exists() else str(out)
    digest = write_release(out, made.report, shown, private)
    for attack in findings["attacks"]:  # type: ignore[union-attr]
        echo(f"{attack['question']} {attack['verdict']}")  # type: ignore[index,call-overload]
    for name in findings["not_made"]:  # type: ignore[union-attr]
        echo(f"Not made: {name}")
    echo(f"{told}: may leave, signed, {digest}")
    echo(f"{stays / 'page.html'}: STAYS HERE, quotes your text")


@app.command("verify-report")
def verify_report(
    path: Annotated[Path, typer.Argument(metavar="REPORT", help="The directory NAME.report.")],
    bundle: Annotated[Path, typer.Option(help="The bundle that it is to be of.")],
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    require: Annotated[
        str | None,
        typer.Option(help="Limits to hold it against, such as extraction<=1%,membership_auc<=0.6."),
    ] = None,
) -> None:
    """Check a release report: signed by the bundle's key, of this bundle, and not altered.

    With --require it fails, too, if the report is above a limit: the upper end of an interval
    counts. It warns if page or cards are not those that report.json makes.

    Example: flexolmo audit verify-report code.report --bundle code.bundle --trust trusted/
    """
    from flexolmo.bundle.bundle import open_bundle
    from flexolmo.bundle.limits import parse_limits
    from flexolmo.bundle.release import (
        DEMANDS,
        EXAMPLE,
        MISSING,
        NO_PERCENT,
        UP_TO_ONE,
        check_release,
        demanded_values,
        find_excess,
        refuse_excess,
        show_value,
    )
    from flexolmo.errors import SignatureError
    from flexolmo.report.release_page import find_unlike

    trusted = trusted_owners(trust, trust_any_signer)
    if trusted is None:
        raise SignatureError("Nobody was said to be trusted. Give --trust DIR.")
    opened = open_bundle(bundle, trusted, trusted.allows_unknown, judges_days=False)
    found = check_release(path, opened)
    values = demanded_values(found, opened.manifest)
    for name, meaning in DEMANDS.items():
        value = values[name]
        told = f"none, {MISSING[name]}" if value is None else show_value(name, value)
        echo(f"{name}: {told} ({meaning})")
    if require is not None:
        limits = parse_limits(require, DEMANDS, EXAMPLE, up_to_one=UP_TO_ONE, no_percent=NO_PERCENT)
        refuse_excess(find_excess(found.report.name, values, limits))
    unlike = find_unlike(found, opened.manifest)
    if unlike:
        echo(
            f"Warning: in {path}, {', '.join(unlike)} is not what this release of FlexOlmo makes "
            "of report.json: another release wrote it, or its owner did. Believe report.json, "
            "which the figures above are from.",
            err=True,
        )
    signer = opened.signer or "an unknown signer"
    echo(f"{path}: holds, of {bundle}, signed by {signer} ({found.key_id})")
