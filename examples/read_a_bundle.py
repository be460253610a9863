"""What a bundle says, checked against its signature; no torch is loaded.

python examples/read_a_bundle.py BUNDLE [TRUSTED_DIRECTORY]
"""

import sys
from pathlib import Path

import flexolmo as fo


def main(bundle: str, trusted: str | None = None) -> None:
    owners = fo.TrustedOwners.load(Path(trusted)) if trusted else None
    found = fo.open_bundle(Path(bundle), owners, allow_unknown_signer=trusted is None)
    manifest = found.manifest
    print(f"expert   {manifest.name}, of {manifest.owner}")
    print(f"signer   {found.signer or 'unknown'}, key {found.key_id}")
    print(f"serial   {manifest.serial}")
    print(f"licence  {manifest.licence}; {manifest.terms.text}")
    print(f"terms    {manifest.terms.summary()}")
    print(f"anchor   {manifest.anchor_digest}")
    for name, entry in sorted(manifest.tensors.items()):
        print(f"  {name:<44} {entry.dtype:<5} {list(entry.shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
