"""Models and texts that the benchmarks run: random weights, FlexOlmo's shapes, texts of domains.

Speed does not ask for trained weights, but it does for routing as it is in use. So each domain is
a Markov chain of its own over the vocabulary, owners' bigram tables are fitted to its texts by the
product itself, and what the models read comes from such chains.

B batch, T positions, D d_model, F d_ff, V vocabulary.
"""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from flexolmo.bundle.bundle import write_bundle
from flexolmo.bundle.manifest import build_manifest
from flexolmo.bundle.signing import create_key
from flexolmo.bundle.terms import make_terms
from flexolmo.data.forms import FAMILIES
from flexolmo.data.tokenizer import train_tokenizer
from flexolmo.merge.export import export_stock
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, build_anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings, RouterSettings
from flexolmo.model.shape import ExpertShape, architecture_of, expert_shapes, shape_of_tensors
from flexolmo.model.statistics import (
    BigramModel,
    EvidenceSettings,
    OwnerTable,
    fit_bigrams,
    fit_table,
)
from flexolmo.model.transformer import ModelConfig, Transformer

EOS = 0
NUM_EXPERTS = 8  # public among them
SUCCESSORS = 12  # words that may follow a word, in one domain
DOCUMENT_TOKENS = 192
OWN_SHARE = 0.6  # of an owner's words that follow its own chain, not the public one


@dataclass(frozen=True)
class Size:
    """A decoder's shape; its name counts the active parameters of attention and two FFNs."""

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    vocab_size: int


SIZES = {
    "pico": Size(32, 2, 2, 64, 512),  # for tests
    "S": Size(256, 4, 4, 704, 16_384),  # 5.4M
    "M": Size(512, 6, 8, 1_376, 32_768),  # 31.7M
    "L": Size(768, 10, 12, 2_048, 32_768),  # 118.0M
}


def owner_names(num_experts: int = NUM_EXPERTS) -> list[str]:
    """Names of the owners beside the public expert."""
    return [f"owner{i}" for i in range(1, num_experts)]


# --- texts --------------------------------------------------------------------------------------


@functools.cache
def _chain(vocab_size: int, domain: int) -> np.ndarray:
    """Words that follow each word [V,SUCCESSORS]; frequent words, by Zipf, follow most."""
    rng = np.random.default_rng([domain, vocab_size])
    words = rng.permutation(np.arange(1, vocab_size))
    chances = 1.0 / np.arange(1, vocab_size)
    return rng.choice(words, (vocab_size, SUCCESSORS), p=chances / chances.sum())


def write_documents(vocab_size: int, domain: int, count: int, seed: int = 0) -> np.ndarray:
    """Ids [count,DOCUMENT_TOKENS] of documents of one domain, each ended; domain 0 is public."""
    rng = np.random.default_rng([seed, domain, count])
    own, public = _chain(vocab_size, domain), _chain(vocab_size, 0)
    ids = np.full((count, DOCUMENT_TOKENS), EOS)
    word = rng.integers(1, vocab_size, count)
    for t in range(DOCUMENT_TOKENS - 1):
        ids[:, t] = word
        choice = np.minimum(rng.geometric(0.4, count) - 1, SUCCESSORS - 1)
        word = np.where(rng.random(count) < OWN_SHARE, own[word, choice], public[word, choice])
    return ids


def made_texts(size: str, batch: int, length: int, seed: int = 1) -> Tensor:
    """Ids [B,T] to read: documents of all domains in turn, cut to what is asked."""
    vocab_size = SIZES[size].vocab_size
    each = -(-length // DOCUMENT_TOKENS) + 1
    rows = []
    for i in range(batch):
        domains = [(i + j) % NUM_EXPERTS for j in range(each)]
        parts = [
            write_documents(vocab_size, d, 1, seed * 10_000 + i * 100 + j)[0]
            for j, d in enumerate(domains)
        ]
        start = (i * 37) % DOCUMENT_TOKENS  # documents end at different places
        rows.append(np.concatenate(parts)[start : start + length])
    return torch.from_numpy(np.stack(rows))


@functools.cache
def public_table(vocab_size: int) -> BigramModel:
    """Public text's bigram model."""
    return fit_bigrams(*_stream(vocab_size, 0, 2000), vocab_size)


@functools.cache
def owner_table(vocab_size: int, domain: int) -> OwnerTable:
    """A domain's table, fitted as an owner fits one."""
    stream = _stream(vocab_size, domain, 600)
    return fit_table(*stream, public_table(vocab_size), EvidenceSettings())


def _stream(vocab_size: int, domain: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and where documents start."""
    ids = write_documents(vocab_size, domain, count if vocab_size > 1000 else 60).reshape(-1)
    return ids, np.arange(0, len(ids) + 1, DOCUMENT_TOKENS)


# --- models -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def make_anchor(size: str) -> Anchor:
    """An anchor of this size with random weights, which never writes the end of a text."""
    shape, tokenizer = SIZES[size], train_tokenizer(["some words to begin with"], 300)
    config = ModelConfig(**vars(shape), max_seq_len=2048, eos_token_id=EOS)
    assert tokenizer.eos_id == EOS
    model = Transformer(config)
    model.initialise(0)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
    rows = torch.randn(
        config.num_layers, config.d_model, generator=torch.Generator().manual_seed(9)
    )
    forms = [owner_table(config.vocab_size, NUM_EXPERTS + i) for i in range(len(FAMILIES))]
    public = public_table(config.vocab_size)
    return build_anchor(model, tokenizer, public, 0.02 * rows, {}, forms=forms)


def expert_shape(config: ModelConfig, scope: str, rank: int = 0) -> ExpertShape:
    """The shape of an owner's expert of scope "ffn", or "all" (our default: whole matrices); with
    `rank`, low-rank deltas to the FFN in place of whole matrices."""
    D = config.d_model
    more = {"attention_rank": D, "embedding_rank": D, "head_rank": D} if scope == "all" else {}
    return ExpertShape(d_ff=config.d_ff, rank=rank, **more)


def make_expert(
    anchor: Anchor, domain: int, router: RouterSettings, scope: str, rank: int = 0
) -> dict[str, Tensor]:
    """Random tensors of one owner's expert, with the table of its domain."""
    config, shape = anchor.config, expert_shape(anchor.config, scope, rank)
    table = owner_table(config.vocab_size, domain)
    if isinstance(router, EvidenceSettings):
        shape = shape.model_copy(update={"num_bigrams": len(table.keys)})
    generator = torch.Generator().manual_seed(100 + domain)
    tensors = {
        name: torch.empty(dims).normal_(0, 0.02, generator=generator)
        for name, dims in expert_shapes(config, shape, router).items()
        if not name.startswith("router.")
    }
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"][EOS] = 0
    if isinstance(router, EvidenceSettings):
        for part in ("embed_tokens", "lm_head"):
            if (rows := tensors.get(f"{part}.weight")) is not None:
                base = anchor.model.get_parameter(f"{part}.weight")
                rows[~table.is_told] = base[~table.is_told]
        tensors |= {
            "router.token_levels": torch.from_numpy(table.token_levels),
            "router.bigram_keys": torch.from_numpy(table.keys),
            "router.bigram_levels": torch.from_numpy(table.pair_levels),
        }
    return tensors


def sign_expert(
    root: Path, name: str, tensors: Mapping[str, Tensor], anchor: Anchor, router: RouterSettings
) -> Path:
    """Write an expert's bundle to `root`/NAME.bundle, signed with a new key in `root`/keys; returns
    the private key's path."""
    weights = safetensors.torch.save(dict(tensors))
    shape = shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, anchor.config)
    manifest = build_manifest(
        weights,
        name=name,
        owner=name,
        anchor_digest=anchor.digest,
        architecture=architecture_of(anchor.config, shape),
        router_kind=router.kind,
        router_settings=router.model_dump(mode="json"),
        recipe={},
        tokens_seen=1,
        data_card_digest="sha256:" + "0" * 64,
        licence="MIT",
        serial=1,
        terms=make_terms("For a benchmark.", ["any"]),
    )
    key = root / "keys" / name
    create_key(key)
    write_bundle(root / f"{name}.bundle", weights, manifest, key)
    return key


def make_mixture(
    size: str,
    router: RouterSettings,
    scope: str,
    *,
    num_experts: int = NUM_EXPERTS,
    top_k: int | None = None,
    rank: int = 0,
) -> MixtureModel:
    """A mixture of the public expert and owners' of this scope ("ffn" or "all"). With
    `EvidenceSettings()` and "all" it is our default, with `LINEAR` and "ffn" stock's."""
    anchor = make_anchor(size)
    experts = {
        name: make_expert(anchor, domain, router, scope, rank)
        for domain, name in enumerate(owner_names(num_experts), start=1)
    }
    return assemble_mixture(anchor, experts, router, top_k=top_k)


LINEAR = LinearSettings(has_bias=False)  # the router that the stock format holds


def load_stock(size: str, model: MixtureModel) -> Any:
    """The same mixture (linear router without bias) in stock transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    anchor = make_anchor(size)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "hf"
        export_stock(LoadedMixture(model, anchor.tokenizer, {}, {}), model, out, {})
        stock: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        return stock.eval()


def chosen_experts(model: MixtureModel, ids: Tensor) -> list[Tensor]:
    """Whether each expert is chosen at each position, bool [B,T,E], a layer each."""
    routing: list[Tensor] = []
    with torch.inference_mode():
        model(ids, last=1, routing=routing)
    return [weights > 0 for weights in routing]


def shares_chosen(chosen: Sequence[Tensor]) -> list[float]:
    """Fractions of positions at which each expert is chosen, over the layers."""
    return torch.stack([c.float().mean((0, 1)) for c in chosen]).mean(0).tolist()
