"""The scorer against one text at a time, in one pass, and against lm-evaluation-harness."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import CheckpointError, ConfigError, PolicyError
from flexolmo.evaluation.scorer import Scorer, _share
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.reader import OwnReader, StockReader, open_reader
from flexolmo.inference.sampling import Sampling
from flexolmo.model.checkpoint import save_anchor
from flexolmo.model.transformer import Transformer
from flexolmo.research.rivals.baselines import btm_weights, mix_log_probs
from flexolmo.research.rivals.readers import BtmReader, PromptReader, log_likelihood
from made_mixtures import NAMES

os.environ["HF_HUB_OFFLINE"] = "1"
IN_SESSION = settings(
    derandomize=True,
    max_examples=15,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONGEST = 40  # tokens that the readers of these tests hold
PROMPT = 6  # tokens that choose a model


@pytest.fixture(scope="module")
def readers(house, tmp_path_factory):
    """By name, and what each says of a text in one pass: log-probabilities [T,V] after each id."""
    anchor, mixture = house.anchor, house.mixture(NAMES, "rich")
    stock_dir = tmp_path_factory.mktemp("stock") / "anchor"
    save_anchor(anchor, stock_dir)
    other = Transformer(anchor.config)
    other.initialise(3)
    dense = [anchor.model, other.eval()]
    own = [OwnReader(m, anchor.tokenizer) for m in dense]
    found = {
        "anchor": own[0],
        "btm": BtmReader(own, temperature=2.0),
        "btm that switches": BtmReader(own, temperature=2.0, switch_rate=0.1),
        "chosen by its prompt": PromptReader(BtmReader(own), lambda ids: own[sum(ids) % 2], PROMPT),
        "mixture": OwnReader(mixture.model, mixture.tokenizer),
        "mixture without basalt": OwnReader(mixture.model, mixture.tokenizer, ["amber", "zinc"]),
        "stock": StockReader.open(stock_dir, torch.device("cpu")),
        "stock that shares nothing": StockReader.open(stock_dir, torch.device("cpu")),
    }
    found["stock that shares nothing"].shares_prefixes = False

    def mixed(ids, each, **how):
        said = torch.stack([e[torch.arange(len(ids) - 1), ids[1:]] for e in each[:, :-1]])
        padded = torch.nn.functional.pad(said, (0, 1)).numpy()
        weights = btm_weights(padded, **how)  # [E,T]
        every = weights.repeat(each.shape[2], axis=1)  # [E,T*V]
        return torch.from_numpy(mix_log_probs(each.flatten(1).numpy(), every)).view(each.shape[1:])

    def in_one_pass(name, ids):
        text = torch.tensor([ids])
        with torch.inference_mode():
            each = torch.stack([m(text)[0].log_softmax(-1) for m in dense])  # [E,T,V]
            if "btm" in name:
                return mixed(ids, each, temperature=2.0, switch_rate=0.1 * ("switches" in name))
            if "chosen" in name:  # the start is one token
                chosen = each[sum(ids[: 1 + PROMPT]) % 2]
                return torch.cat([mixed(ids, each)[:PROMPT], chosen[PROMPT:]])
            model = mixture.model if "mixture" in name else anchor.model
            on = ["amber", "zinc"] if "without" in name else list(NAMES)
            active = {"active": mixture.model.expert_mask([on])} if "mixture" in name else {}
            return model(text, **active)[0].log_softmax(-1)

    for reader in found.values():
        reader.max_seq_len = LONGEST
    return found, in_one_pass


def cut(ids, room, name):
    """The last ids, behind those that choose a model if there is room."""
    kept = 1 + PROMPT if "chosen" in name and 1 + PROMPT < room < len(ids) else 0
    return [*ids[:kept], *ids[len(ids) - min(len(ids), room) + kept :]]


def brute_force(in_one_pass, name, context, targets):
    """Nats and greediness; every target after as much before it as a piece of the request has."""
    nats, greedy = 0.0, True
    for start in range(0, len(targets), LONGEST):
        piece = targets[start : start + LONGEST]
        before = cut([*context, *targets[:start]], LONGEST + 1 - len(piece), name)
        said = in_one_pass(name, [*before, *piece])
        for t, token in enumerate(piece, start=len(before) - 1):
            nats += float(said[t, token])
            greedy &= int(said[t].argmax()) == token
    return nats, greedy


READERS = [
    "anchor",
    "btm",
    "btm that switches",
    "chosen by its prompt",
    "mixture",
    "mixture without basalt",
    "stock",
    "stock that shares nothing",
]
TOKENS = st.integers(1, 5)


@pytest.mark.parametrize("name", READERS)
@given(
    shared=st.lists(st.lists(TOKENS, min_size=0, max_size=30), min_size=1, max_size=3),
    pairs=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(TOKENS, min_size=1, max_size=20),
            st.lists(TOKENS, min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=8,
    ),
    batch_size=st.integers(1, 5),
)
@IN_SESSION
def test_scores_are_those_of_one_text_at_a_time(
    readers, monkeypatch, name, shared, pairs, batch_size
):
    """Whatever begins alike, is cut, or is asked twice."""
    monkeypatch.setattr("flexolmo.evaluation.scorer.MIN_SHARED_TOKENS", 3)
    monkeypatch.setattr("flexolmo.evaluation.scorer.MIN_SAVED_TOKENS", 3)
    found, in_one_pass = readers
    asked = [([0, *shared[i % len(shared)], *context], targets) for i, context, targets in pairs]
    scores = Scorer(found[name], batch_size).score_ids(asked)
    assert len(scores) == len(asked)
    for (context, targets), score in zip(asked, scores, strict=True):
        nats, greedy = brute_force(in_one_pass, name, context, targets)
        assert score.log_prob == pytest.approx(nats, abs=2e-3)
        assert score.is_greedy == greedy and score.tokens == len(targets)
        assert score.is_cut == (len(context) + len(targets) > LONGEST + 1)


@pytest.mark.parametrize("name", ["anchor", "mixture", "btm", "chosen by its prompt"])
def test_a_continuation_longer_than_the_model_holds_is_read_in_pieces(readers, name):
    found, in_one_pass = readers
    targets = [1 + i % 7 for i in range(2 * LONGEST + 11)]
    (score,) = Scorer(found[name]).score_ids([([0, 3], targets)])
    assert score.tokens == len(targets) and score.is_cut
    assert score.log_prob == pytest.approx(
        brute_force(in_one_pass, name, [0, 3], targets)[0], abs=5e-3
    )


def test_an_empty_text_is_certain_and_keeps_its_place(readers):
    scorer = Scorer(readers[0]["anchor"])
    texts = ["", "one two", "", "three"]
    found = [s.log_prob for s in scorer.rolling_log_likelihoods(texts)]
    alone = [scorer.rolling_log_likelihoods([t])[0].log_prob for t in texts]
    assert found == pytest.approx(alone, abs=1e-3) and found[0] == found[2] == 0 > found[1]


def test_what_begins_alike_is_read_once(readers):
    """Counts positions that go through the model, against those that had to."""
    reader = readers[0]["anchor"]
    start, questions = list(range(1, 25)), [[30 + i, 40 + i, 50 + i] for i in range(12)]
    pairs = [([0, *start, *q], [60 + a, 70]) for q in questions for a in range(4)]
    read = []
    counted = SimpleNamespace(
        tokenizer=reader.tokenizer,
        max_seq_len=LONGEST,
        start=[0],
        shares_prefixes=True,
        kept_tokens=0,
        new_state=reader.new_state,
        read=lambda ids, *a, **k: read.append(ids.numel()) or reader.read(ids, *a, **k),
    )
    Scorer(counted, batch_size=8).score_ids(pairs)
    assert sum(read) == 25 + 12 * 3 + 48 * 1  # beginning, questions, answers but the last token


@given(
    rows=st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), max_size=12, unique=True
    )
)
@settings(derandomize=True, max_examples=200, database=None)
def test_groups_share_a_beginning_and_take_every_row_once(rows):
    groups = list(_share(rows, True))
    assert sorted(i for _, places in groups for i in places) == list(range(len(rows)))
    for root, places in groups:
        for i in places:
            assert len(root) < len(rows[i]) and rows[i][: len(root)] == root


# --- text ---------------------------------------------------------------------------------------


def test_spaces_that_end_a_context_count_to_the_continuation(readers):
    scorer = Scorer(readers[0]["anchor"])
    (first, second) = scorer.log_likelihoods([("The sum is ", "four"), ("The sum is", " four")])
    assert first == second


def test_a_continuation_without_a_token_of_its_own_is_refused(readers):
    with pytest.raises(ConfigError, match="Nothing is left to predict"):
        Scorer(readers[0]["anchor"]).log_likelihoods([("a question", "")])


@pytest.mark.parametrize(
    "name",
    [
        "anchor",
        "mixture without basalt",
        "btm",
        "btm that switches",
        "chosen by its prompt",
        "stock",
    ],
)
def test_greedy_continuations_are_the_likeliest_token_each_time(readers, name):
    found, in_one_pass = readers
    reader = found[name]
    prompts = ["one two three", "The sum", "x", "one two four and more"]
    written = Scorer(reader, batch_size=3).continuations(
        prompts, Sampling(max_new_tokens=6, temperature=0)
    )
    for prompt, (text, is_cut) in zip(prompts, written, strict=True):
        ids = cut([*reader.start, *reader.tokenizer.encode(prompt)], LONGEST - 6, name)
        prompt_length = len(ids)
        for _ in range(6):
            token = int(in_one_pass(name, ids)[-1].argmax())
            if token == 0:
                break
            ids.append(token)
        assert text == reader.tokenizer.decode(ids[prompt_length:])
        assert is_cut == (len(reader.start) + len(reader.tokenizer.encode(prompt)) > LONGEST - 6)


def test_a_log_likelihood_is_that_of_all_ids_but_the_first(readers):
    ids = [0, 5, 9, 2, 7]
    said = readers[1]("btm", ids)
    expected = sum(float(said[t, i]) for t, i in enumerate(ids[1:]))
    assert log_likelihood(readers[0]["btm"], ids) == pytest.approx(expected, abs=1e-4)
    assert log_likelihood(readers[0]["btm"], [0]) == 0


def test_continuations_end_before_the_first_stop_and_do_not_depend_on_the_batch(readers):
    reader, sampling = readers[0]["mixture"], Sampling(max_new_tokens=20, temperature=1.0, seed=4)
    prompts = [f"text {i}" * (1 + i % 3) for i in range(7)]
    free = [t for t, _ in Scorer(reader, 7).continuations(prompts, sampling)]
    stops = [free[2][3:5], free[4][6:7]]
    for batch_size in (1, 3, 7):
        found = Scorer(reader, batch_size).continuations(prompts, sampling, stops)
        for text, (cut, _) in zip(free, found, strict=True):
            ends = [text.find(s) for s in stops if s and s in text]
            assert cut == text[: min(ends, default=len(text))]


def test_continuing_ids_says_the_same(readers):
    reader, sampling = readers[0]["anchor"], Sampling(max_new_tokens=5, temperature=0)
    ids = reader.tokenizer.encode("one two")
    ((text, _),) = Scorer(reader).continuations(["one two"], sampling)
    assert text == reader.tokenizer.decode(continue_ids(reader, [ids], sampling)[0])


# --- what is opened -----------------------------------------------------------------------------


def test_an_expert_left_out_scores_as_if_never_merged_bit_for_bit(house):
    pairs = [(f"question {i} of many", f" answer {a}") for i in range(6) for a in range(3)]
    without, _ = open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, without=["basalt"])
    never, about = open_reader(house.mixture_dir(("amber", "zinc"), "rich"), house.trusted)
    assert Scorer(without).log_likelihoods(pairs) == Scorer(never).log_likelihoods(pairs)
    whole, _ = open_reader(house.mixture_dir(NAMES, "rich"), house.trusted)
    assert Scorer(whole).log_likelihoods(pairs) != Scorer(never).log_likelihoods(pairs)
    assert about["enabled"] == ["amber", "zinc"]


def test_models_are_known_by_what_their_directory_holds(house, tmp_path):
    assert open_reader(house.anchor_dir)[1]["kind"] == "anchor"
    assert open_reader(house.mixture_dir(NAMES), house.trusted)[1]["kind"] == "mixture"
    with pytest.raises(PolicyError, match="bronze"):
        open_reader(house.mixture_dir(NAMES), house.trusted, without=["bronze"])
    with pytest.raises(PolicyError, match="amber"):
        open_reader(house.anchor_dir, without=["amber"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        open_reader(tmp_path / "empty")
