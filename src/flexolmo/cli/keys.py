"""`flexolmo expert key`, `rotate-key` and `revoke`: an owner's keys, and what they take back."""

import datetime
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo.terminal import echo

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="File whose first line is the key's passphrase; FLEXOLMO_KEY_PASSPHRASE too."
    ),
]


def read_passphrase(path: Path | None) -> str | None:
    """The first line of the file, or None if none was named; ConfigError if it cannot be read."""
    if path is None:
        return None
    from flexolmo.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The passphrase file {path} cannot be read: {e}.") from None


def key(
    path: Annotated[Path, typer.Argument(help="File for the private key.")],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Encrypt the key; asks for a passphrase.")
    ] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a signing key. Keep the private file; give PATH.pub to the coordinator.

    Example: flexolmo expert key hospital.pem

    Encrypted: flexolmo expert key hospital.pem --passphrase
    """
    from flexolmo.bundle.signing import PASSPHRASE_VARIABLE, create_key

    words = read_passphrase(passphrase_file)
    if passphrase and words is None:
        words = os.environ.get(PASSPHRASE_VARIABLE)
    if passphrase and words is None:
        words = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
    public = create_key(path, words)
    echo(f"{path} (keep it secret) and {public} (give it to the coordinator)")


def rotate_key(
    old: Annotated[Path, typer.Argument(help="Your private key so far.")],
    new: Annotated[Path, typer.Argument(help="Your new private key (see flexolmo expert key).")],
    owner: Annotated[str, typer.Option(help="Your name, as the coordinator knows you.")],
    valid_from: Annotated[
        datetime.datetime | None,
        typer.Option(
            formats=["%Y-%m-%d"],
            help="First day of the new key, the old one's last, UTC. Default: today",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: OWNER.from-DATE.rotation.json")
    ] = None,
    passphrase_file: PassphraseFile = None,
    new_passphrase_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the new key's passphrase.")
    ] = None,
) -> None:
    """State, signed by your old key and the new one, that the new one takes the old one's place.

    Send the file to the coordinator, who puts it among the trusted owners. What the old key signed
    before stays good; where it was stolen, revoke it too, with the new one.

    Example: flexolmo expert rotate-key hospital.pem hospital-2.pem --owner "St Mary"
    """
    from flexolmo.bundle.rotation import SUFFIX, sign_rotation
    from flexolmo.bundle.serials import carry_serials
    from flexolmo.bundle.signing import read_private_key
    from flexolmo.files import write_bytes

    now = datetime.datetime.now(datetime.UTC)
    day = (valid_from or now).date()
    keys = (
        read_private_key(old, read_passphrase(passphrase_file)),
        read_private_key(new, read_passphrase(new_passphrase_file)),
    )
    data = sign_rotation(*keys, owner, day)
    out = out or Path(f"{owner}.from-{day}{SUFFIX}")
    carry_serials(old, new)
    write_bytes(out, data)
    echo(f"{out}: from {day} on, {new} signs for {owner}. Send it to the coordinator.")


def revoke(
    key: Annotated[Path, typer.Option(help="Your private key.")],
    owner: Annotated[str, typer.Option(help="Your name, as the coordinator knows you.")],
    reason: Annotated[str, typer.Option(help="Reason, in a sentence; everybody can read it.")],
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="Bundle to revoke: its directory, or its digest. May be repeated."),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Expert to revoke by name; needs --up-to-serial.")
    ] = None,
    up_to_serial: Annotated[
        int | None, typer.Option(min=0, help="Last serial of --expert that is revoked.")
    ] = None,
    key_id: Annotated[
        list[str] | None,
        typer.Option(help="Key of yours to revoke, sha256:..., with all that it signed."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Your list, begun or made longer. Default: OWNER.revoked.json"),
    ] = None,
    signed_by: Annotated[
        Path | None,
        typer.Option(help="Public key that signed the list so far, if it was not this key's."),
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Withdraw a bundle, an expert up to a serial, or a key. It cannot be taken back.

    Makes your revocation list longer. Send it to every coordinator and deployer, by any way; they
    take it in with `mix refresh`. Keep the file: the next revocation makes it longer again.

    Example: flexolmo expert revoke --key hospital.pem --owner "St Mary" --expert hospital
    --up-to-serial 3 --reason "Consent was withdrawn."
    """
    from flexolmo.bundle.bundle import digest_of
    from flexolmo.bundle.revocation import SUFFIX, extend_list
    from flexolmo.bundle.signing import read_private_key
    from flexolmo.errors import ConfigError

    if (expert is None) != (up_to_serial is None):
        raise ConfigError("--expert and --up-to-serial go together: give both or neither.")
    today = str(datetime.datetime.now(datetime.UTC).date())
    entries: list[dict[str, Any]] = [
        *({"kind": "bundle", "bundle_digest": digest_of(b)} for b in bundle or ()),
        *({"kind": "key", "key_id": k} for k in key_id or ()),
    ]
    if expert is not None:
        entries.append({"kind": "expert", "name": expert, "up_to_serial": up_to_serial})
    if not entries:
        raise ConfigError("Say what to revoke: --bundle, --key-id, or --expert and --up-to-serial.")
    out = out or Path(f"{owner}{SUFFIX}")
    made = extend_list(
        out,
        read_private_key(key, read_passphrase(passphrase_file)),
        owner,
        [entry | {"date": today, "reason": reason} for entry in entries],
        None if signed_by is None else signed_by.read_bytes(),
    )
    echo(
        f"{out}: number {made.number}, {len(made.revoked)} revocations. Send it to whoever has a "
        "bundle of yours, for flexolmo mix refresh."
    )
