"""Four attacks on what an expert tells of its owner's text besides what it learnt, with intervals.

The attacker has the expert, the anchor and its public statistics, knows this code, and is given
what it could have: the number of tokens, other documents of the same kind, or all documents but
one. A low figure shows that this attack fails, not that none can succeed. Source: ours.

V vocabulary, N tokens, n units of an attack.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from flexolmo.audit.intervals import RESAMPLES, area, area_of, share
from flexolmo.bundle.bundle import MANIFEST_FILE, open_bundle
from flexolmo.bundle.release import origin_of
from flexolmo.data.batches import TokenSet
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError
from flexolmo.merge.checks import tensors_of
from flexolmo.model.assemble import anchor_matrix, assemble_mixture
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.private_statistics import find_sigma, tabulate
from flexolmo.model.router import EvidenceRouter, RouterSettings
from flexolmo.model.shape import BIGRAM_KEYS, BIGRAM_LEVELS, TOKEN_LEVELS
from flexolmo.model.statistics import (
    BigramModel,
    EvidenceSettings,
    OwnerTable,
    count_tokens,
    evidence_of_pairs,
    weigh_evidence,
)
from flexolmo.train.expert import Expert, load_expert

LEAST_DOCUMENTS = 10  # of each kind, below which membership is not measured
LEAST_TOKENS = 50  # of a document whose membership is asked
STRATA = 10  # of tokens that public text holds about equally often
LARGE_EPSILON = 50.0  # whose noise hides next to nothing
FOLDS = 5  # of the training documents, of which tables leave out one in turn
BEFORE_A_WORD = (" ", "", "\n", "(", "_")
WRITTEN_TEXTS, WRITTEN_TOKENS = 16, 128  # on which an expert's opinions are asked


def audit_statistics(
    anchor: Anchor, expert: Expert, data: TokenSet, seed: int = 0
) -> dict[str, Any]:
    """Results of all four attacks; `data` is the prepared set that the expert was trained on.

    Raises ConfigError if the expert was trained on another set or beside another anchor, or has no
    table to attack.
    """
    if expert.anchor_digest != anchor.digest:
        raise ConfigError(
            f"Expert {expert.name} was trained beside anchor {expert.anchor_digest}; this anchor "
            f"is {anchor.digest}. Give the anchor of its training."
        )
    if expert.data_card_digest != data.commitment:
        raise ConfigError(
            f"Expert {expert.name} was trained on the set of commitment "
            f"{expert.data_card_digest}; {data.directory} has {data.commitment}. Attack it with "
            "the text of its training, as it was prepared then."
        )
    if not isinstance(expert.router, EvidenceSettings):
        raise ConfigError(
            f"Expert {expert.name} has a router of kind {expert.router.kind}, which holds no "
            "table of token statistics."
        )
    table = table_of(expert)
    return {
        "expert": expert.name,
        "min_documents": expert.router.min_documents,
        "epsilon": expert.router.epsilon,
        "delta": expert.router.delta,
        "documents": len(data.splits["train"].source_offsets) - 1,
        "tokens": {"told": int(table.is_told.sum()), "pairs": len(table.keys)},
        "count_recovery": recover_counts(anchor, table, expert.router, data),
        "token_presence": find_tokens(anchor, expert, data, expert.router.min_documents, seed),
        "rare_words": spell_rare_words(anchor.tokenizer, table, anchor.public, data),
        "membership": find_members(anchor, expert, data, seed),
    }


def table_of(expert: Expert) -> OwnerTable:
    """The table of an expert with an evidence router."""
    nothing = {
        BIGRAM_KEYS: torch.zeros(0, dtype=torch.long),
        BIGRAM_LEVELS: torch.zeros(0, dtype=torch.int8),
    }
    held = nothing | expert.tensors
    if TOKEN_LEVELS not in held:
        raise ConfigError(f"Expert {expert.name} holds no {TOKEN_LEVELS}: it is no whole expert.")
    return OwnerTable(*(held[k].numpy() for k in (TOKEN_LEVELS, BIGRAM_KEYS, BIGRAM_LEVELS)))


def recover_counts(
    anchor: Anchor, table: OwnerTable, settings: EvidenceSettings, data: TokenSet
) -> dict[str, Any]:
    """Counts of the tokens that the table tells of, as it counts them, guessed from their levels
    and the true total.

    `determined` are tokens whose level leaves one whole number alone, and that the right one;
    `guessed` those whose likeliest number is right; `by_public` those guessed from public text's
    frequencies, without the table.
    """
    split = data.splits["train"]
    counts = count_tokens(
        split.tokens, split.source_offsets, len(table.token_levels), settings.most_per_document
    )
    told = np.flatnonzero(table.is_told)
    total = int(counts.sum())
    counts = counts[told]
    public = anchor.public.unigram[told].astype(np.float64)
    least, most = count_bounds(anchor.public, table, settings, total)
    found = {
        "determined": (least == most) & (least == counts),
        "guessed": np.rint(np.sqrt(least * most)) == counts,
        "by_public": np.rint(np.exp(public) * total) == counts,
    }
    return {name: share(hits) for name, hits in found.items()}


def count_bounds(
    public: BigramModel, table: OwnerTable, settings: EvidenceSettings, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest count of each told token that its level leaves, among `total` tokens."""
    told, step = np.flatnonzero(table.is_told), settings.level_nats
    fewest = settings.min_documents if settings.epsilon is None else 0
    middle = public.unigram[told] + table.token_levels[told] * step + math.log(max(total, 1))
    # the lowest level that the threshold leaves also holds the counts below its own
    is_lowest = np.exp(middle - 1.5 * step) < fewest
    least = np.ceil(np.exp(middle - step / 2) - 1e-6)
    return (np.where(is_lowest, fewest, least), np.floor(np.exp(middle + step / 2) + 1e-6))


def find_tokens(
    anchor: Anchor, expert: Expert, data: TokenSet, min_documents: int, seed: int
) -> dict[str, Any]:
    """Presence in the text of tokens that fewer than `min_documents` hold, told by the weights.

    By how far a token's row of embedding or head has moved, and by how much likelier the expert
    finds the token than the anchor does, in text that public statistics write. Tokens are compared
    with those that public text holds about equally often, for rare tokens are rarer everywhere.
    """
    split = data.splits["train"]
    size = len(anchor.public.unigram)
    holders = count_tokens(split.tokens, split.source_offsets, size, 1)
    rare = np.flatnonzero(holders < min_documents)
    is_held = holders[rare] > 0
    rank = anchor.public.unigram[rare].argsort().argsort()
    strata = rank * STRATA // max(len(rare), 1)
    scores = {"opinion": opinions(anchor, expert, seed)[rare]}
    for part in ("embed_tokens", "lm_head"):
        if (whole := expert.tensors.get(f"{part}.weight")) is not None:
            moved = whole.double() - cast(torch.Tensor, anchor_matrix(anchor, part)).cpu().double()
        elif (low := expert.tensors.get(f"{part}.lora_b")) is not None:
            moved = low.double()
        else:
            continue
        scores[part] = moved.norm(dim=1).numpy()[rare]
    return {
        "rare": len(rare),
        "of_these_in_the_text": int(is_held.sum()),
        **{
            name: area(x[is_held], x[~is_held], seed, strata[is_held], strata[~is_held])
            for name, x in scores.items()
        },
    }


def opinions(anchor: Anchor, expert: Expert, seed: int) -> np.ndarray:
    """Mean log-probability of every token by the expert alone, less the anchor's, [V], in texts
    drawn from public bigram statistics."""
    name = expert.name
    alone = cast(EvidenceSettings, expert.router).model_copy(update={"min_weight": 0.0})
    model = assemble_mixture(anchor, {name: expert.tensors}, alone)
    router = cast(EvidenceRouter, model.router)
    table = router.table(name)
    for part in (table.tokens, table.contexts, table.pairs):
        part.fill_(alone.clip_nats)  # every token speaks for the owner
    generator = torch.Generator().manual_seed(seed)
    size = len(anchor.public.unigram)
    ids = torch.full((WRITTEN_TEXTS, 1), anchor.config.eos_token_id)
    while ids.shape[1] < min(WRITTEN_TOKENS, anchor.config.max_seq_len):
        before = ids[:, -1:].expand(-1, size).flatten()
        here = torch.arange(size).repeat(WRITTEN_TEXTS)
        logs = router.public(before, here, before * size + here).view(-1, size)
        ids = torch.cat([ids, torch.multinomial(logs.double().exp(), 1, generator=generator)], 1)
    with torch.inference_mode():
        found = model(ids).double().log_softmax(-1) - anchor.model(ids).double().log_softmax(-1)
    return cast(np.ndarray, found.flatten(0, 1).mean(0).numpy())


def spell_rare_words(
    tokenizer: Tokenizer, table: OwnerTable, public: BigramModel, data: TokenSet
) -> dict[str, Any]:
    """Words of one source document alone, whose tokens' every pair the table lists, so that they
    could be spelled from it; `by_public`: from the pairs that public text's model lists."""
    split = data.splits["train"]
    size = len(table.token_levels)
    holders: Counter[str] = Counter()
    for start, end in pairwise(split.source_offsets.tolist()):
        text = tokenizer.decode([i for i in split.tokens[start:end].tolist() if i != data.eos_id])
        holders.update(set(re.findall(r"[^\W\d_]{4,}", text)))
    words = sorted(w for w, n in holders.items() if n == 1)
    forms = [tokenizer.encode_batch([before + w for w in words]) for before in BEFORE_A_WORD]
    pairs = [
        [[u * size + v for u, v in pairwise(ids)] for ids in ways]
        for ways in zip(*forms, strict=True)
        if all(len(ids) > 1 for ids in ways)
    ]

    def spelled(keys: np.ndarray) -> dict[str, Any]:
        listed = set(keys.tolist())
        return share(np.array([any(map(listed.issuperset, ways)) for ways in pairs], dtype=bool))

    found = {"spelled": spelled(table.keys), "by_public": spelled(public.keys)}
    return {"words": len(pairs)} | found


def find_members(anchor: Anchor, expert: Expert, data: TokenSet, seed: int) -> dict[str, Any]:
    """Membership of source documents, guessed from their mean evidence under a table.

    `held_out`: the expert's own table, training documents against those held out, which may also
    differ in kind. `calibrated`: by somebody who has other documents of the kind: tables of three
    fifths of the training documents, one fifth that is not in them, and what a table of the last
    fifth says taken off. `knows_the_rest`: by somebody who has all documents but one: the share
    that a table with them finds likelier than a table without, which also differ in a fold of
    others; of two that differ in that document alone it is, with noise, `at_most` so large,
    whatever is asked of them. Tables stood in for the expert's get its noise; what the attacker
    has of its own gets hardly any.
    """
    settings = cast(EvidenceSettings, expert.router)
    rng = np.random.default_rng(seed)  # of noise that protects nobody here

    def documents(*names: str) -> list[np.ndarray]:
        found = [
            split.tokens[start:end].astype(np.int64)
            for split in (data.splits[n] for n in names if n in data.splits)
            for start, end in pairwise(split.source_offsets.tolist())
        ]
        return [ids for ids in found if len(ids) >= LEAST_TOKENS]

    def scores(table: OwnerTable, texts: _Texts) -> np.ndarray:
        evidence = weigh_evidence(table, anchor.public, settings)
        found = evidence_of_pairs(table, evidence, anchor.public, settings, texts.pairs)
        found = found.clip(-settings.clip_nats, settings.clip_nats)
        return np.array([found[places].mean() for places in texts.places])

    def fit(chosen: np.ndarray, asked: EvidenceSettings = settings) -> OwnerTable:
        """The table of some documents."""
        texts = [members[i] for i in chosen]
        offsets = np.cumsum([0, *map(len, texts)])
        return tabulate(np.concatenate(texts), offsets, anchor.public, asked, rng.standard_normal)

    attackers = settings.model_copy(
        update={
            "min_documents": max(1, round(settings.min_documents / 3)),
            "epsilon": None if settings.epsilon is None else LARGE_EPSILON,
        }
    )

    members = documents("train")
    others = documents("validation", "heldout")
    found: dict[str, Any] = {"members": len(members), "others": len(others)}
    if len(members) < FOLDS * LEAST_DOCUMENTS or len(others) < LEAST_DOCUMENTS:
        return found | {"too_few": LEAST_DOCUMENTS}
    own = table_of(expert)
    size = len(anchor.public.unigram)
    read = _read_pairs(members, size)
    found["held_out"] = area(scores(own, read), scores(own, _read_pairs(others, size)), seed)
    folds = np.array_split(np.random.default_rng(seed).permutation(len(members)), FOLDS)
    fold_of = np.empty(len(members), int)
    for i, fold in enumerate(folds):
        fold_of[fold] = i
    with_it = np.zeros(len(members))
    without = np.zeros(len(members))
    calibrated = np.empty((FOLDS, len(members)))
    for i, fold in enumerate(folds):
        left = scores(fit(np.flatnonzero(fold_of != i)), read)
        without[fold] = left[fold]
        shadow = fold_of == (i + 1) % FOLDS
        with_it[shadow] = left[shadow]
        target = fit(np.flatnonzero((fold_of != i) & ~shadow))
        others_say = scores(fit(np.flatnonzero(shadow), attackers), read)
        calibrated[i] = scores(target, read) - others_say
    found["knows_the_rest"] = share(with_it > without)
    if settings.epsilon is not None:
        sigma = find_sigma(settings.epsilon, settings.delta)
        found["knows_the_rest"]["at_most"] = 0.5 * math.erfc(-0.5 / sigma)
    found["calibrated"] = _area_over_folds(calibrated, fold_of, seed)
    return found


@dataclass(frozen=True)
class _Texts:
    """Pairs of neighbouring tokens in documents, so that each different pair is weighed once."""

    pairs: np.ndarray  # int64 [n] u * V + v, ascending
    places: list[np.ndarray]  # by document, the place in `pairs` of each of its tokens but one


def _read_pairs(documents: Sequence[np.ndarray], vocab_size: int) -> _Texts:
    """The pairs in `documents`, of token ids int64 [t] each; takes about 40 bytes a token."""
    found = [ids[:-1] * vocab_size + ids[1:] for ids in documents]
    pairs, places = np.unique(np.concatenate(found), return_inverse=True)
    return _Texts(pairs, np.split(places, np.cumsum([len(x) for x in found])[:-1]))


def _area_over_folds(values: np.ndarray, fold_of: np.ndarray, seed: int) -> dict[str, Any]:
    """`area` of scores [FOLDS,n] of n documents: in row i those of fold i are outside, those of the
    next are neither. The bootstrap draws documents, each with all its scores."""

    def of(drawn: np.ndarray) -> float:
        strata = []
        for i, row in enumerate(values):
            outside = fold_of[drawn] == i
            inside = ~outside & (fold_of[drawn] != (i + 1) % FOLDS)
            strata.append((row[drawn[inside]], row[drawn[outside]]))
        return area_of(strata)

    everyone = np.arange(values.shape[1])
    rng = np.random.default_rng(seed)
    drawn = [of(rng.choice(everyone, len(everyone))) for _ in range(RESAMPLES)]
    bounds = [float(x) for x in np.quantile(drawn, [0.025, 0.975])]
    return {"auc": of(everyone), "interval": bounds}


# --- reading and showing ------------------------------------------------------------------------


def open_expert(path: Path) -> Expert:
    """The expert in a bundle, whoever signed it, or in the run of a finished training."""
    if not (path / MANIFEST_FILE).is_file():
        if not (path / "expert.json").is_file():
            raise ConfigError(
                f"{path} is neither a bundle nor the run of a finished training: it holds no "
                f"{MANIFEST_FILE} and no expert.json."
            )
        return load_expert(path)
    bundle = open_bundle(path, None, allow_unknown_signer=True, keep_tensors=True)
    m = bundle.manifest
    try:
        router: RouterSettings = TypeAdapter(RouterSettings).validate_python(m.router.settings)
    except ValidationError as e:
        raise ConfigError(
            f"{path} has router settings that this release does not know "
            f"({e.errors()[0]['msg']}): {m.router.settings}. Train the expert again."
        ) from None
    return Expert(
        m.name,
        m.anchor_digest,
        router,
        tensors_of(bundle),
        {},
        m.data_card_digest,
        m.architecture.model_dump(),
    )


def about_expert(path: Path) -> dict[str, Any]:
    """The expert in `path` as results of attacks name it; the run of a training has no origin."""
    if not (path / MANIFEST_FILE).is_file():
        return {"kind": "run", "origin": None}
    bundle = open_bundle(path, None, allow_unknown_signer=True, judges_days=False)
    m = bundle.manifest
    origin = origin_of(bundle.digests[MANIFEST_FILE], m.anchor_digest, m.recipe)
    return {"kind": "bundle", "origin": origin}


def rows_of(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """A line for each figure of `audit_statistics`: attack, result, interval, and chance's."""
    rows = []

    def add(label: str, figure: Mapping[str, Any], chance: str) -> None:
        kind = "share" if "share" in figure else "auc"
        value, interval = figure[kind], figure["interval"]
        if value is None:
            rows.append((label, "nothing to attack", "", ""))
        elif kind == "share":
            low, high = interval
            rows.append((label, f"{value:.1%}", f"{low:.1%} to {high:.1%}", chance))
        else:
            low, high = interval
            rows.append((label, f"AUC {value:.3f}", f"{low:.3f} to {high:.3f}", chance))

    counts, tokens = found["count_recovery"], found["token_presence"]
    by_public = counts["by_public"]["share"]
    guess = "" if by_public is None else f"{by_public:.1%} without the table"
    add("a token's count worked out", counts["determined"], "0.0%")
    add("a token's count guessed", counts["guessed"], guess)
    for key, label in (
        ("embed_tokens", "a rare token's presence, from the embedding"),
        ("lm_head", "a rare token's presence, from the head"),
        ("opinion", "a rare token's presence, from what the expert predicts"),
    ):
        if key in tokens:
            add(label, tokens[key], "AUC 0.5")
    words = found["rare_words"]
    by_public = words["by_public"]["share"]
    guess = "" if by_public is None else f"{by_public:.1%} from public pairs"
    add("a word of one document spelled from pairs", words["spelled"], guess)
    members = found["membership"]
    if "too_few" in members:
        rows.append(("a document's membership, from the table", "too few documents", "", ""))
    else:
        add(
            "a document's membership, against others",
            members["held_out"],
            "AUC 0.5, were all alike",
        )
        add("the same, by who has others of its kind", members["calibrated"], "AUC 0.5")
        rest = members["knows_the_rest"]
        bound = f"; noise: at most {rest['at_most']:.1%}" if "at_most" in rest else ""
        add("the same, by who has all the others", rest, f"50.0%{bound}")
    return rows
