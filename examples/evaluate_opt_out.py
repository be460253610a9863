"""Bits per byte of held-out text, with everybody on and with each owner off in turn.

python examples/evaluate_opt_out.py MIXTURE TRUSTED_DIRECTORY PREPARED_SET...
"""

import sys
from pathlib import Path

import flexolmo as fo


def main(mixture: str, trusted: str, *prepared: str) -> None:
    model = fo.load_mixture(Path(mixture), fo.TrustedOwners.load(Path(trusted)))
    sets = [fo.open_set(Path(directory), model.tokenizer.digest) for directory in prepared]
    table = fo.evaluate_mixture(model, {s.name: s for s in sets}, "heldout", max_bytes=20_000)
    for arrangement, row in table["bits_per_byte"].items():
        numbers = "  ".join(f"{name} {bits:.3f}" for name, bits in row.items())
        print(f"{arrangement:<24} {numbers}")


if __name__ == "__main__":
    main(*sys.argv[1:])
