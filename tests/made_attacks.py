"""Mixtures whose expert was trained on a made set, and a model that knows its text by heart."""

from pathlib import Path

import torch

from flexolmo.merge.mixture import build_mixture
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.loop import TrainSettings

WHOLE = ExpertRecipe(train=TrainSettings(steps=500, batch_size=8, seq_len=32))  # reads all of it


def build_attacked(
    house, data, out: Path, others=(), recipe=WHOLE, recorded=None, **changes
) -> Path:
    """A mixture in `out` of an expert for `data` and of `others`; its weights are random."""
    claims = {
        "data_card_digest": data.commitment,
        "recipe": recipe.model_dump(mode="json") | (recorded or {}),
    }
    claims |= changes
    tensors = house.tensors(data.name, "evidence")
    own = house.write(out.parent / f"{out.name}-bundles", data.name, tensors, "evidence", **claims)
    build_mixture(house.anchor_dir, [own, *house.bundles(others)], out, house.trusted)
    return out


class Parrot:
    """A reader that goes on with what it has heard, and says anything else at random."""

    shares_prefixes = True
    kept_tokens = 0
    max_seq_len = 1000

    def __init__(self, tokenizer, texts, sureness: float):
        self.tokenizer, self.sureness = tokenizer, sureness
        self.start = [tokenizer.eos_id]
        self.after = {}
        for ids in texts:
            for i in range(1, len(ids)):
                self.after[tuple(ids[:i])] = int(ids[i])

    def new_state(self):
        return Heard([[]])

    def read(self, ids, state, *, is_token=None, last):
        real = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
        logits = torch.zeros(*ids.shape, self.tokenizer.vocab_size)
        for b, (row, own) in enumerate(zip(ids.tolist(), real.tolist(), strict=True)):
            for t, (token, is_heard) in enumerate(zip(row, own, strict=True)):
                if is_heard:
                    state.rows[b].append(token)
                    known = self.after.get(tuple(state.rows[b]))
                    if known is not None:
                        logits[b, t, known] = self.sureness
        return logits[:, -last:]


class Heard:
    """What a parrot has heard of each text."""

    def __init__(self, rows):
        self.rows = rows

    def select(self, rows):
        return Heard([list(self.rows[i]) for i in rows.tolist()])

    def reserve(self, num_positions):
        pass
