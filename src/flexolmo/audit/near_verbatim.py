"""Probability that sampling writes a text nearly word for word, at least.

A text with a few words changed leaks as much, and there are too many of those to add up. A beam
search that may leave the text at a few places finds the likeliest; their probabilities together are
a lower bound. Source: constrained beam search, arXiv 2603.24917; only replaced tokens count here.

R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexolmo.audit.discoverable import sampled_log_probs
from flexolmo.inference.reader import Reader, spread
from flexolmo.inference.sampling import Sampling

OTHERS = 4  # tokens besides the text's own that are tried at each place


@dataclass(frozen=True)
class _Path:
    """The beginning of a continuation of one text."""

    text: int
    row: int  # of the state that has read all but its last token
    token: int
    replaced: int
    log_prob: float


def near_verbatim_log_probs(
    reader: Reader,
    texts: Sequence[np.ndarray],
    prefix: int,
    sampling: Sampling,
    most_replaced: int,
    beams: int,
) -> np.ndarray:
    """Log-probability, float64 [n], at least, that `sampling` goes on from the first `prefix` ids
    of each text with its rest, but for at most `most_replaced` tokens.

    Texts are of one length. At each place a text's `beams` likeliest paths are kept, and always the
    one that is word for word, so this is never below the probability of the text itself.
    """
    state = spread(reader.new_state(), len(texts))
    ids = torch.tensor(np.stack([text[:prefix] for text in texts]))  # [R,prefix]
    paths = [_Path(i, i, -1, 0, 0.0) for i in range(len(texts))]
    with torch.inference_mode():
        for place in range(prefix, len(texts[0])):
            logits = reader.read(ids, state, last=1)[:, 0].cpu()  # [R,V]
            wanted = [int(texts[p.text][place]) for p in paths]
            paths = _keep(_extend(paths, logits, wanted, sampling, most_replaced), beams)
            if not paths:
                break
            state = state.select(torch.tensor([p.row for p in paths]))
            ids = torch.tensor([[p.token] for p in paths])
    found = np.full(len(texts), -np.inf)
    for p in paths:
        found[p.text] = np.logaddexp(found[p.text], p.log_prob)
    return found


def _extend(
    paths: Sequence[_Path],
    logits: Tensor,
    wanted: Sequence[int],
    sampling: Sampling,
    most_replaced: int,
) -> list[_Path]:
    """Every path with the token that its text wants, and with others that are likely."""
    rows = []
    tokens = []
    likeliest = logits.topk(min(OTHERS + 1, logits.shape[1])).indices.tolist()
    for row, path in enumerate(paths):
        others = [t for t in likeliest[row] if t != wanted[row]][:OTHERS]
        tried = [wanted[row], *(others if path.replaced < most_replaced else [])]
        rows += [row] * len(tried)
        tokens += tried
    log_probs = sampled_log_probs(logits[rows], torch.tensor(tokens), sampling).tolist()
    return [
        _Path(
            paths[row].text,
            row,
            token,
            paths[row].replaced + (token != wanted[row]),
            paths[row].log_prob + log_prob,
        )
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True)
        if log_prob > -np.inf
    ]


def _keep(paths: Sequence[_Path], beams: int) -> list[_Path]:
    """The likeliest paths of each text, and the one that is word for word."""
    by_text: dict[int, list[_Path]] = {}
    for path in sorted(paths, key=lambda p: (p.replaced > 0, -p.log_prob)):
        by_text.setdefault(path.text, []).append(path)
    return [p for own in by_text.values() for p in own[:beams]]
