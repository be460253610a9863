"""Bundles made by hand, right ones and wrong ones."""

import datetime

import numpy as np
import safetensors.numpy

from flexolmo.bundle.bundle import MAX_FILE_BYTES
from flexolmo.bundle.manifest import build_manifest
from flexolmo.bundle.signing import encode_public, read_private_key, sign_files
from flexolmo.bundle.terms import make_terms
from flexolmo.files import digest_bytes

DIGEST = "sha256:" + "ab" * 32
FILES = sorted(MAX_FILE_BYTES)
TODAY = datetime.date(2026, 11, 22)
TERMS = make_terms("For tests.", ["any"])


def terms_until(day):
    return TERMS.model_copy(update={"valid_until": day})


def make_weights(seed=0, **changes):
    rng = np.random.default_rng(seed)
    tensors = {f"layers.{i}.up": rng.normal(size=(3, 4)).astype("f4") for i in range(2)}
    return safetensors.numpy.save({**tensors, **changes})


def make_manifest(weights, **changes):
    claims = {
        "name": "maths",
        "owner": "Ann",
        "anchor_digest": DIGEST,
        "architecture": {
            "num_layers": 2,
            "d_model": 4,
            "d_ff": 3,
            "rank": 0,
            "attention_rank": 0,
            "embedding_rank": 0,
            "head_rank": 0,
            "num_bigrams": 0,
        },
        "router_kind": "linear",
        "router_settings": {},
        "recipe": {"lr": 1e-3},
        "tokens_seen": 1000,
        "data_card_digest": DIGEST,
        "serial": 1,
        "licence": "Apache-2.0",
        "terms": TERMS,
        "created": "2026-11-22T04:30:00Z",
        "software": {"flexolmo": "0.1.0"},
    }
    return build_manifest(weights, **{**claims, **changes})


def sign_as(path, manifest_bytes, weights, key, subject="maths.bundle"):
    """A directory signed by its owner, whatever it holds: what a careless owner could send."""
    path.mkdir()
    private = read_private_key(key)
    files = {
        "expert.safetensors": weights,
        "manifest.json": manifest_bytes,
        "signer.pub": encode_public(private),
    }
    digests = {name: digest_bytes(data) for name, data in files.items()}
    files["signature.sig"] = sign_files(subject, digests, private)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path
