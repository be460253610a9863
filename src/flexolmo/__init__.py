"""FlexOlmo: train experts apart, merge them, switch each data source on or off.

The names below are the Python interface; each is documented where it is defined. They are
imported on first use, so that `import flexolmo` costs nothing.
"""

import importlib
from typing import Any

_HOME = {
    "create_key": "bundle.signing",
    "TrustedOwners": "bundle.trust",
    "ANY_SIGNER": "bundle.trust",
    "make_terms": "bundle.terms",
    "open_bundle": "bundle.bundle",
    "inspect_bundle": "bundle.bundle",
    "open_set": "data.batches",
    "load_tokenizer": "data.tokenizer",
    "open_corpus": "data.corpus",
    "prepare_set": "data.prepare",
    "load_anchor": "model.checkpoint",
    "save_anchor": "model.checkpoint",
    "TrainSettings": "train.loop",
    "AnchorRecipe": "train.anchor",
    "train_anchor": "train.anchor",
    "import_anchor": "train.anchor",
    "ExpertRecipe": "train.expert",
    "train_expert": "train.expert",
    "pack_expert": "train.expert",
    "build_mixture": "merge.mixture",
    "add_experts": "merge.mixture",
    "remove_experts": "merge.mixture",
    "load_mixture": "merge.mixture",
    "prove_optout": "merge.prove",
    "verify_optout": "merge.prove",
    "Sampling": "inference.sampling",
    "generate": "inference.generate",
    "stream": "inference.generate",
    "evaluate_mixture": "evaluation.likelihood",
    "measure_likelihood": "evaluation.likelihood",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"flexolmo has no {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"flexolmo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
