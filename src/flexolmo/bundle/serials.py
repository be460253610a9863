"""The owner's record of serials: no two bundles of one name are ever signed with the same one.

It lies beside the private key, as KEY.serials.json, and holds the last serial by owner and name.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from flexolmo.errors import BundleError, SignatureError
from flexolmo.files import hold_directory, read_json, write_json

_Record = dict[str, dict[str, Annotated[int, Field(ge=1, strict=True)]]]
_RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)


def record_of(private_key: Path) -> Path:
    """The file beside the key that says which serials were taken."""
    private_key = Path(private_key)
    return private_key.with_name(f"{private_key.name}.serials.json")


def take_serial(private_key: Path, owner: str, name: str, serial: int | None = None) -> int:
    """A serial to pack the expert `name` with: the next one, or `serial` if it is higher than all
    before. It is recorded before it is used, so that a stop in between wastes it.

    BundleError for a lower one, or if the record cannot be read; SignatureError if there is no such
    key; FlexOlmoError if its directory cannot be locked.
    """
    if not Path(private_key).is_file():
        raise SignatureError(
            f"There is no private key {private_key}. Make one: flexolmo expert key."
        )
    record = record_of(private_key)
    with hold_directory(record.parent):
        taken = _read(record)
        last = taken.get(owner, {}).get(name, 0)
        if serial is not None and serial <= last:
            raise BundleError(
                f"Serial {serial} is not higher than {last}, with which {name} of {owner} was "
                f"packed before ({record}). Leave it out to take {last + 1}."
            )
        serial = last + 1 if serial is None else serial
        taken.setdefault(owner, {})[name] = serial
        write_json(record, taken, is_private=True)
    return serial


def carry_serials(old_key: Path, new_key: Path) -> None:
    """Let the new key's record begin where the old key's ends."""
    with hold_directory(record_of(new_key).parent):
        old = _read(record_of(old_key))
        new = _read(record_of(new_key))
        for owner, serials in old.items():
            held = new.setdefault(owner, {})
            held |= {name: max(last, held.get(name, 0)) for name, last in serials.items()}
        write_json(record_of(new_key), new, is_private=True)


def _read(record: Path) -> _Record:
    if not record.exists():
        return {}
    try:
        return _RECORD.validate_python(read_json(record, BundleError))
    except ValidationError as e:
        raise BundleError(
            f"{record} is no record of serials: {e.errors()[0]['msg']}. Put a copy of it back; or "
            "remove it, and give a --serial above the last that was signed."
        ) from None
