"""An engine on the directory of a mixture."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import MergeError
from flexolmo.files import canonical_json, digest_bytes, digest_file
from flexolmo.inference.batching import BatchEngine, EngineSettings
from flexolmo.inference.engine import ModelFacts
from flexolmo.inference.stepping import EngineModel
from flexolmo.merge.index import ABOUT, read_about
from flexolmo.merge.mixture import load_mixture
from flexolmo.merge.rollback import Seen

FRAME = ("anchor_digest", "router", "top_k")  # all that every request depends on


def open_engine(
    model_dir: Path,
    read_owners: Callable[[], TrustedOwners],
    settings: EngineSettings | None = None,
    device: torch.device | None = None,
    experts: Collection[str] | None = None,
    *,
    verify: bool = False,
) -> BatchEngine:
    """An engine that runs the mixture in `model_dir`, and reads it again at each reload.

    Arguments and errors are those of `model_reader` and of `BatchEngine`.
    """
    return BatchEngine(model_reader(model_dir, read_owners, experts, verify), settings, device)


def model_reader(
    model_dir: Path,
    read_owners: Callable[[], TrustedOwners],
    experts: Collection[str] | None = None,
    verify: bool = False,
    seen: Seen | None = None,
) -> Callable[[], EngineModel]:
    """A function that reads the mixture in `model_dir` as it is when called.

    Only `experts` are loaded, by default all; a name that leaves the mixture later is passed over.
    The owners' keys and revocations are read again too. An expert that is revoked, or whose terms
    refuse today, is not loaded, and the others are. No call takes an expert that is older than
    one that a call before has seen, or another reader, of which `seen` is the record, as the
    models that it read have it. Files that the user's record says were verified are hashed again
    only with `verify`. The function raises what `load_mixture` raises, and MergeError if the
    mixture changes while it is read.
    """

    def load() -> EngineModel:
        nonlocal seen
        digest = digest_file(model_dir / ABOUT)
        chosen = experts
        if chosen is not None and seen is not None:
            chosen = [name for name in read_about(model_dir)["experts"] if name in chosen]
        mixture = load_mixture(
            model_dir,
            read_owners(),
            experts=chosen,
            seen=seen,
            leaves_out_barred=True,
            verify=verify,
        )
        if digest_file(model_dir / ABOUT) != digest:
            raise MergeError(f"{model_dir} changed while it was read. It is read again.")
        seen = mixture.seen
        config = mixture.model.config
        facts = ModelFacts(
            digest,
            mixture.facts,
            config.max_seq_len,
            config.vocab_size,
            [config.eos_token_id],
            mixture.barred,
        )
        frame = digest_bytes(canonical_json({key: mixture.about[key] for key in FRAME}))
        return EngineModel(mixture.model, mixture.tokenizer, facts, frame, seen)

    return load
