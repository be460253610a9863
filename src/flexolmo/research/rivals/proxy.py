"""Proxy data: the public text that is most like an owner's closed text.

An owner runs `select_proxy` alone, on their own machines, beside the public set. What `save_proxy`
writes may leave it: which stretches of public documents were chosen, how well the two kinds of
text could be told apart, and the digests of both sets. The classifier, the scores and the
owner's text stay. The choice does tell what public text resembles the owner's, and so what theirs
is about; it comes with no formal bound on that. Whoever cannot say so much gives no proxy.

Knows nothing of models.

Letters: n chosen pieces, P pieces of a split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import issparse

from flexolmo.data.batches import TokenSet, TokenSplit
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import ConfigError, DataError
from flexolmo.files import canonical_json, read_json, write_bytes
from flexolmo.progress import progress

FORMAT = "flexolmo-proxy-1"
_WORD_OR_MARK = r"\w+|[^\w\s]"
_FEATURES = 2**18  # hashed; a collision now and then does no harm
_INVERSE_PENALTY = 100.0  # of 1, 10, 100 the best on validation text of most of seven owners
_PIECES_SCORED_AT_ONCE = 1000

Embed = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Proxy:
    """Pieces of the public train split, in its order, that resemble one owner's text."""

    owner: str  # name of the owner's set
    owner_digest: str  # of the owner's prepared set
    public_digest: str  # of the public prepared set
    accuracy: float  # of telling validation pieces apart, mean of both sides; 0.5 is chance
    pieces: np.ndarray  # int64 [n, 3]: document, first token in it, end
    ids: list[np.ndarray]  # n times int64 [tokens of the piece]
    scores: np.ndarray | None = None  # float64 [n], log-odds of "the owner's", below 0 where
    # public text has nothing more alike; never saved

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return int((self.pieces[:, 2] - self.pieces[:, 1]).sum())


def select_proxy(
    owner: TokenSet,
    public: TokenSet,
    *,
    tokens: int,
    piece_tokens: int = 500,
    max_pieces: int = 4000,
    embed: Embed | None = None,
) -> Proxy:
    """The public train text most like `owner`'s: `tokens` tokens or up to one piece more.

    Two classifiers learn "owner or public" from both train splits, each with one half of the
    public documents, and each ranks the other half: no public text is ranked by a classifier
    that was told it is public. Reads train and validation splits, never the held-out ones.

    Args:
        tokens: wanted; far fewer than the owner has (the paper: below 1 %).
        piece_tokens: the most in a piece; documents are cut into equal ones.
        max_pieces: of each side to train a classifier on, spread evenly over the split.
        embed: texts -> float [texts, any width], in place of the words and pairs of words each
            text has.
    Raises:
        ConfigError: a size below one, or no less than the public set has.
        DataError: sets of two tokenizers, or a public set of one document.
    Source: §3.3.3. Ours: logistic regression on hashed words instead of a fine-tuned encoder of
        22M parameters; pieces instead of documents, since ours run from 60 to 16,000 tokens and
        a long one is seldom owner-like throughout; the two halves.
    """
    split = public.splits["train"]
    if min(tokens, piece_tokens, max_pieces) < 1 or tokens >= len(split.tokens):
        raise ConfigError(
            f"tokens={tokens}, piece_tokens={piece_tokens}, max_pieces={max_pieces}; expected at "
            f"least 1 each, and tokens below the {len(split.tokens)} of public train text."
        )
    tokenizer = load_tokenizer(public.directory)
    owner.check_tokenizer(tokenizer.digest, public.name)
    if split.num_documents < 2:
        raise DataError(f"{public.name} has one training document; a proxy is chosen from many.")

    pieces = _cut(split, piece_tokens)  # [P, 3]
    is_second = pieces[:, 0] >= split.num_documents // 2  # [P]
    own_texts = _sample_texts(owner, "train", tokenizer, piece_tokens, max_pieces)
    validation = [
        _sample_texts(one, "validation", tokenizer, piece_tokens, max_pieces)
        for one in (public, owner)
    ]
    scores = np.empty(len(pieces))  # [P]
    accuracies = []
    with progress(f"Ranking public text by {owner.name}", len(pieces), "pieces") as meter:
        for half in (is_second, ~is_second):
            known = _texts(split, _spread(pieces[~half], max_pieces), tokenizer)
            score = _train_classifier(known, own_texts, embed or _hash_words)
            accuracies += [np.mean(score(validation[0]) <= 0), np.mean(score(validation[1]) > 0)]
            places = np.flatnonzero(half)
            for first in range(0, len(places), _PIECES_SCORED_AT_ONCE):
                some = places[first : first + _PIECES_SCORED_AT_ONCE]
                scores[some] = score(_texts(split, pieces[some], tokenizer))
                meter.advance(len(some))
    best = np.argsort(-scores, kind="stable")
    sizes = (pieces[:, 2] - pieces[:, 1])[best]
    chosen = np.sort(best[: 1 + int(np.searchsorted(np.cumsum(sizes), tokens))])  # [n]
    return Proxy(
        owner.name,
        owner.digest,
        public.digest,
        float(np.mean(accuracies)),
        pieces[chosen],
        _ids(split, pieces[chosen]),
        scores[chosen],
    )


def save_proxy(proxy: Proxy, path: Path) -> None:
    """Write the part that may leave the owner's premises to `path` (.json), all or nothing."""
    write_bytes(
        path,
        canonical_json(
            {
                "format": FORMAT,
                "owner": proxy.owner,
                "owner_digest": proxy.owner_digest,
                "public_digest": proxy.public_digest,
                "accuracy": proxy.accuracy,
                "pieces": proxy.pieces.tolist(),
            }
        )
        + b"\n",
    )


def load_proxy(path: Path, public: TokenSet) -> Proxy:
    """The proxy in `path`, its ids read from `public`; without scores.

    Raises:
        DataError: not a proxy file, chosen from another public set, or naming text that the
            set does not have, or has only once.
    """
    found = read_json(path, DataError)
    keys = {
        "format": str,
        "owner": str,
        "owner_digest": str,
        "public_digest": str,
        "accuracy": float,
        "pieces": list,
    }
    if (
        not isinstance(found, dict)
        or found.keys() != keys.keys()
        or found["format"] != FORMAT
        or not all(isinstance(found[key], kind) for key, kind in keys.items())
        or not 0 <= found["accuracy"] <= 1
    ):
        raise DataError(
            f"{path} is not a proxy file of format {FORMAT}: ask the owner for it again."
        )
    if found["public_digest"] != public.digest:
        raise DataError(
            f"{path} was chosen from the public set {found['public_digest']}; the one "
            f"here is {public.digest}. Ask the owner to choose from this one."
        )
    split = public.splits["train"]
    if not _are_pieces(found["pieces"], split):
        raise DataError(
            f"{path}: its pieces are not stretches of the {split.num_documents} public "
            "training documents, in order and none twice. Ask the owner for it again."
        )
    pieces = np.array(found["pieces"], np.int64)
    return Proxy(
        found["owner"],
        found["owner_digest"],
        found["public_digest"],
        found["accuracy"],
        pieces,
        _ids(split, pieces),
    )


def _train_classifier(
    public: list[str], own: list[str], embed: Embed
) -> Callable[[list[str]], np.ndarray]:
    """A function from texts to log-odds, float64 [texts], above 0 for the owner's."""
    from sklearn.linear_model import LogisticRegression  # a second to import

    rows = embed(public + own)
    wide = issparse(rows)  # then the dual problem takes a tenth of the time
    model = LogisticRegression(
        solver="liblinear" if wide else "lbfgs",
        dual=wide,
        random_state=0,
        max_iter=1000,
        C=_INVERSE_PENALTY,
        class_weight="balanced",
    )
    model.fit(rows, np.repeat([0, 1], [len(public), len(own)]))
    return lambda texts: model.decision_function(embed(texts))


def _hash_words(texts: Sequence[str]) -> Any:
    """Presence of words, marks and pairs of them in each text; sparse rows of length one.

    Characters besides would take four times as long and tell no more (ours, seven owners).
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(
        n_features=_FEATURES,
        ngram_range=(1, 2),
        token_pattern=_WORD_OR_MARK,
        lowercase=False,
        binary=True,
        alternate_sign=False,
    ).transform(texts)


def _cut(split: TokenSplit, piece_tokens: int) -> np.ndarray:
    """Every document in equal pieces of at most `piece_tokens`, int64 [P, 3]."""
    rows = []
    for document, (start, end) in enumerate(pairwise(split.offsets.tolist())):
        length = end - start - 1  # without the eos
        count = -(-length // piece_tokens)
        rows += [(document, length * i // count, length * (i + 1) // count) for i in range(count)]
    return np.array(rows, np.int64).reshape(-1, 3)


def _spread(pieces: np.ndarray, most: int) -> np.ndarray:
    """Choose at most `most` of `pieces`, evenly spaced."""
    count = min(most, len(pieces))
    return pieces[np.arange(count) * len(pieces) // count]


def _ids(split: TokenSplit, pieces: np.ndarray) -> list[np.ndarray]:
    return [split.document(document)[start:end] for document, start, end in pieces.tolist()]


def _texts(split: TokenSplit, pieces: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in _ids(split, pieces)]


def _sample_texts(
    token_set: TokenSet, split: str, tokenizer: Tokenizer, piece_tokens: int, most: int
) -> list[str]:
    chosen = token_set.splits[split]
    return _texts(chosen, _spread(_cut(chosen, piece_tokens), most), tokenizer)


def _are_pieces(pieces: list[Any], split: TokenSplit) -> bool:
    """True if `pieces` are [document, start, end] of `split`, rising and without overlap."""
    if not pieces or not all(
        isinstance(piece, list) and len(piece) == 3 and all(type(number) is int for number in piece)
        for piece in pieces
    ):
        return False
    lengths = np.diff(split.offsets) - 1
    inside = all(
        0 <= document < split.num_documents and 0 <= start < end <= lengths[document]
        for document, start, end in pieces
    )
    return inside and all(
        a[0] < b[0] or (a[0] == b[0] and a[2] <= b[1]) for a, b in pairwise(pieces)
    )
