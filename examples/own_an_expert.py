"""An owner's whole part: train an expert beside the anchor, sign it, look at what leaves.

python examples/own_an_expert.py ANCHOR PREPARED_SET NAME [STEPS]
"""

import sys
from pathlib import Path

import flexolmo as fo


def main(anchor_directory: str, prepared: str, name: str, steps: str = "40") -> None:
    anchor = fo.load_anchor(Path(anchor_directory))
    data = fo.open_set(Path(prepared), anchor.tokenizer.digest)
    warmup = min(20, int(steps))
    seq_len = min(256, anchor.config.max_seq_len - 1)
    train = fo.TrainSettings(steps=int(steps), warmup_steps=warmup, seq_len=seq_len)
    expert = fo.train_expert(anchor, data, name, fo.ExpertRecipe(train=train))

    key = Path(f"{name}.pem")
    if not key.exists():
        fo.create_key(key)
    bundle = fo.pack_expert(
        expert,
        Path(f"{name}.bundle"),
        key,
        owner=f"{name} house",
        licence="LicenseRef-Private",
        terms=fo.make_terms("For this example.", ["education", "methods-research"]),
    )
    claims = fo.inspect_bundle(bundle)["claims"]
    print(f"{bundle}: {claims['tokens_seen']:,} tokens seen, {len(claims['tensors'])} tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
