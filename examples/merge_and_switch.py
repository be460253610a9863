"""Merge bundles into a mixture and let one prompt be continued with each owner off in turn.

python examples/merge_and_switch.py ANCHOR TRUSTED_DIRECTORY PROMPT BUNDLE...
"""

import sys
from pathlib import Path

import flexolmo as fo


def main(anchor: str, trusted: str, prompt: str, *bundles: str) -> None:
    owners = fo.TrustedOwners.load(Path(trusted))
    fo.build_mixture(Path(anchor), [Path(b) for b in bundles], Path("mixture"), owners)
    model = fo.load_mixture(Path("mixture"), owners)

    # one batch; each sequence has its own choice of experts
    without = [[], *([name] for name in model.expert_names)]
    sampling = fo.Sampling(max_new_tokens=24, temperature=0.0)
    texts = fo.generate(model, [prompt] * len(without), without=without, sampling=sampling)
    for names, text in zip(without, texts, strict=True):
        print(f"--- without {', '.join(names) or 'nobody'}\n{prompt}{text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
