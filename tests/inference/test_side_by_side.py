"""What is read side by side is, to the bit, what the engine computes when it serves."""

import pytest
import torch

from flexolmo.inference.engine import PromptRead, TokenWritten
from flexolmo.inference.side_by_side import SideBySide
from made_engines import ask, hear, open_engine_on
from made_mixtures import NAMES

SETS = [(), ("amber",), ("basalt", "zinc"), NAMES]
LENGTHS = (2, 40, 70, 33)
NUM_SINGLE = 7


@pytest.mark.parametrize("router", ["evidence", "linear", "rich"])
def test_logits_are_those_by_which_the_engine_scores_and_writes(house, router):
    mixture = house.mixture(NAMES, router)
    size = mixture.model.config.vocab_size
    engine = open_engine_on(mixture.model, mixture.tokenizer)
    options = dict(scores_prompt=True, num_logprobs=size, max_new_tokens=NUM_SINGLE + 1)
    texts, expected = [], []
    for length, on in zip(LENGTHS, SETS, strict=True):
        ids = house.wild.ids(1, length, seed=length, eos_every=99)[0].tolist()
        heard = hear(engine, ask(ids, on, **options))
        assert len(heard.tokens) == NUM_SINGLE + 1
        texts.append([*ids, *heard.tokens[:-1]])
        (prompt,) = (e.scores for e in heard.events if isinstance(e, PromptRead))
        written = [e.score for e in heard.events if isinstance(e, TokenWritten)]
        expected.append([[s.likeliest[i] for i in range(size)] for s in [*prompt, *written]])
    engine.close(0)
    found = SideBySide(mixture.model, mixture.tokenizer).read(texts, SETS, NUM_SINGLE)
    for logits, rows in zip(found, expected, strict=True):
        assert torch.equal(logits.log_softmax(-1), torch.tensor(rows))


def test_texts_may_be_read_as_prompts_alone(house):
    mixture = house.mixture(NAMES)
    reader = SideBySide(mixture.model, mixture.tokenizer)
    ids = house.wild.ids(1, 70)[0].tolist()
    alone, beside = (reader.read(t, [("zinc",)] * len(t), 0)[0] for t in ([ids], [ids, ids[:1]]))
    assert alone.shape == (70, mixture.model.config.vocab_size)
    assert torch.equal(alone, beside)
