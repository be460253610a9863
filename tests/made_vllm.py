"""A mark of tests that need vLLM, and mixtures that are served on it."""

import itertools
import random
from importlib.util import find_spec

import pytest

from flexolmo.merge.mixture import build_mixture
from flexolmo.model.statistics import EvidenceSettings

NAMES = ("amber", "basalt", "coral", "flint", "zinc")
SETS = [c for n in range(len(NAMES) + 1) for c in itertools.combinations(NAMES, n)]
EOS = 0
# a directory called vllm, such as a checkout of it, would be found too, but holds no vllm.engine
has_vllm = find_spec("vllm") is not None and find_spec("vllm.engine") is not None
needs_vllm = pytest.mark.skipif(
    not has_vllm,
    reason="vLLM is not installed here: make test-vllm makes an environment for it and runs these",
)


def build_rich(house, where):
    """A mixture of NAMES, of all removable parts: whole and low-rank in turn, of unequal widths."""
    wild, settings = house.wild, EvidenceSettings()
    bundles = []
    for i, (name, shape) in enumerate(wild.rich_shapes(settings, NAMES).items()):
        sizes = shape.model_dump() | ({} if shape.rank else {"d_ff": 20 + 14 * i})
        tensors = wild.expert(settings, sum(name.encode()), **sizes)
        bundles.append(house.write(where, name, tensors, "evidence"))
    build_mixture(house.anchor_dir, bundles, where / "model", house.trusted)
    return where / "model"


def prompts(count, long=160, seed=0):
    """Prompts of token ids, of which every other begins with the same `long` tokens."""
    rng = random.Random(seed)
    beginning = [rng.randrange(1, 300) for _ in range(long)]
    return [
        [EOS, *(beginning if i % 2 else []), *(rng.randrange(1, 300) for _ in range(5 + i % 30))]
        for i in range(count)
    ]
