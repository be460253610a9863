"""Decoding: the cache changes nothing, a batch changes nothing, streaming loses nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare

from flexolmo.errors import ConfigError, DataError, PolicyError
from flexolmo.inference.decode import Request, choose_tokens, decode, requests_for
from flexolmo.inference.generate import generate, stream, stream_text
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling

NAMES = ("amber", "basalt", "zinc")
PROMPTS = ["the time", "a proof of the lemma by the sum", "", "minister"]
CHOICES = [[], ["amber"], list(NAMES), ["basalt", "zinc"]]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
BRIEF = Sampling(max_new_tokens=5, temperature=0)
IN_SESSION = settings(
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
router = pytest.mark.parametrize("router", ["evidence", "linear", "rich"])


def columns(reader, prompts, sampling, enabled=None):
    """Tokens of every text, up to its end."""
    state = reader.new_state(enabled) if enabled else None
    found = [[] for _ in prompts]
    for step in decode(reader, requests_for(reader, prompts, sampling), state=state):
        if step.token is not None:
            found[step.text].append(step.token)
    return found


def is_greedy(model, prompt, written, count, eos, without):
    """True if each written token is the likeliest after those before it, and the end is where the
    text would end: by one reading of the whole text, with no cache and no padding."""
    ids = torch.tensor([[eos, *prompt, *written]])
    active = model.expert_mask([[n for n in NAMES if n not in without]])
    likeliest = model(ids, active=active)[0, len(prompt) :].argmax(-1).tolist()
    return likeliest[:count] == [*written, eos][:count]


@router
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("without", CHOICES)
def test_greedy_with_a_cache_is_greedy_without(house, router, top_k, without):
    mixture = house.mixture(NAMES, router, top_k)
    eos, written = mixture.tokenizer.eos_id, []
    enabled = [[n for n in NAMES if n not in without]]
    reader = OwnReader(mixture.model, mixture.tokenizer)
    for prompt in PROMPTS:
        ids = mixture.tokenizer.encode(prompt)
        [found] = columns(reader, [ids], BRIEF, enabled)
        assert is_greedy(mixture.model, ids, found, BRIEF.max_new_tokens, eos, without)
        written.append(found)
    found = generate(mixture, PROMPTS, without=without, sampling=BRIEF)
    assert found == [mixture.tokenizer.decode(ids) for ids in written]
    assert len(set(map(tuple, written))) == len(PROMPTS)


@router
@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_each_row_of_a_batch_is_what_it_would_be_alone(house, router, temperature, top_k):
    """Row number i draws from seed + i."""
    mixture = house.mixture(NAMES, router, top_k)
    reader = OwnReader(mixture.model, mixture.tokenizer)
    sampling = Sampling(max_new_tokens=6, temperature=temperature, top_p=1.0, seed=5)
    ids = mixture.tokenizer.encode_batch(PROMPTS)
    enabled = [[n for n in NAMES if n not in off] for off in CHOICES]
    together = columns(reader, ids, sampling, enabled)
    for i, (prompt, names) in enumerate(zip(ids, enabled, strict=True)):
        own = sampling.model_copy(update={"seed": 5 + i})
        alone = columns(reader, [prompt], own, [names])
        never = house.mixture(names, router, top_k).model
        without = OwnReader(never, mixture.tokenizer)
        assert together[i] == alone[0] == columns(without, [prompt], own)[0]
    texts = generate(mixture, PROMPTS, without=CHOICES, sampling=sampling)
    assert texts == [mixture.tokenizer.decode(t) for t in together]
    assert texts == generate(mixture, PROMPTS, only=enabled, sampling=sampling)
    assert texts != generate(mixture, PROMPTS, sampling=sampling)


@pytest.mark.parametrize("router", ["evidence", "rich"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_where_probabilities_are_mixed_each_row_is_what_it_would_be_alone(
    house, router, temperature
):
    sampling = Sampling(max_new_tokens=6, temperature=temperature, top_p=1.0, seed=5)
    mixture, alone = house.mixture(NAMES, router), []
    texts = generate(mixture, PROMPTS, without=CHOICES, sampling=sampling, mix="probabilities")
    assert texts != generate(mixture, PROMPTS, without=CHOICES, sampling=sampling)
    for i, (prompt, off) in enumerate(zip(PROMPTS, CHOICES, strict=True)):
        never = house.mixture([n for n in NAMES if n not in off], router)
        own = sampling.model_copy(update={"seed": 5 + i})
        alone += generate(never, [prompt], sampling=own, mix="probabilities")
        streamed = stream(never, prompt, sampling=own, mix="probabilities")
        assert "".join(streamed) == alone[-1]
    assert texts == alone


@router
def test_a_choice_for_all_prompts_is_that_choice_for_each(house, router):
    mixture = house.mixture(NAMES, router)
    assert (
        generate(mixture, PROMPTS, without=["zinc"], sampling=GREEDY)
        == generate(mixture, PROMPTS, without=[["zinc"]] * 4, sampling=GREEDY)
        == generate(mixture, PROMPTS, only=("amber", "basalt"), sampling=GREEDY)
    )


@router
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=20, seed=3)])
def test_with_nothing_on_it_is_the_anchor_who_writes(house, router, sampling):
    mixture, anchor = house.mixture(NAMES, router), house.anchor
    for prompt in PROMPTS:
        own = "".join(stream_text(OwnReader(anchor.model, anchor.tokenizer), prompt, sampling))
        assert generate(mixture, [prompt], only=[], sampling=sampling) == [own]
        assert generate(mixture, [prompt], without=NAMES, sampling=sampling) == [own]


@router
def test_streamed_pieces_join_to_the_text(house, router):
    mixture = house.mixture(NAMES, router)
    for seed, (prompt, without) in enumerate(zip(PROMPTS, CHOICES, strict=True)):
        sampling = Sampling(max_new_tokens=15, temperature=1.5, seed=seed)
        pieces = list(stream(mixture, prompt, without=without, sampling=sampling))
        assert ["".join(pieces)] == generate(mixture, [prompt], without=without, sampling=sampling)
        only = [n for n in NAMES if n not in without]
        assert pieces == list(stream(mixture, prompt, only=only, sampling=sampling))


def test_the_same_seed_writes_the_same_and_another_another(house):
    mixture = house.mixture(NAMES)
    first, again, other = (
        generate(mixture, ["the"], sampling=Sampling(max_new_tokens=20, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_generating_leaves_no_trace_in_the_global_random_state(house):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    generate(house.mixture(NAMES), ["the"], sampling=Sampling(max_new_tokens=5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"without": ["nickel"]}, PolicyError),
        ({"only": ["nickel"]}, PolicyError),
        ({"without": [["zinc"], ["nickel"]]}, PolicyError),
        ({"without": ["public"]}, PolicyError),
        ({"without": ["zinc"], "only": ["amber"]}, PolicyError),
        ({"without": [["zinc"], []], "only": [["amber"], []]}, PolicyError),
        ({"without": [["zinc"]]}, ConfigError),
        ({"without": [["zinc"], "amber"]}, ConfigError),
        ({"without": "zinc"}, PolicyError),
        ({"without": ""}, PolicyError),
        ({"only": ""}, PolicyError),
    ],
)
def test_a_choice_that_is_not_clear_is_refused(house, wrong, error):
    with pytest.raises(error):
        generate(house.mixture(NAMES), ["a", "b"], **wrong)


@pytest.mark.parametrize(
    "text, said", [("a \ud800 b", r"Text 2 .*half of a character.*place 2"), (b"x", "is a bytes")]
)
def test_a_prompt_that_is_no_text_is_refused_by_its_number(house, text, said):
    with pytest.raises(DataError, match=said):
        generate(house.mixture(NAMES), ["good", text], sampling=GREEDY)


def test_streaming_refuses_unknown_experts_before_any_text(house):
    with pytest.raises(PolicyError, match="nickel"):
        next(stream(house.mixture(NAMES), "the", without=["nickel"]))


def test_no_prompts_give_no_texts(house):
    assert generate(house.mixture(NAMES), []) == []


# --- a model that says what it is told ----------------------------------------------------------


class Told:
    """A reader of `vocab_size` ids; text number b writes scripts[b], then the end."""

    kept_tokens = 0

    def __init__(self, scripts, tokenizer, max_seq_len=1000, shares_prefixes=True):
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.start = [tokenizer.eos_id]
        self.shares_prefixes = shares_prefixes
        self.scripts, self.step, self.read_ids = scripts, 0, []

    def new_state(self):
        return Rows([0])

    def read(self, ids, state, *, is_token=None, last):
        assert last == 1
        if self.step == 0:
            state.rows = list(range(len(ids)))
        self.read_ids.append((ids, is_token))
        logits = torch.zeros(len(ids), 1, self.tokenizer.vocab_size)
        for row, number in zip(logits[:, 0], state.rows, strict=True):
            script = self.scripts[number]
            row[script[self.step] if self.step < len(script) else self.tokenizer.eos_id] = 9.0
        self.step += 1
        return logits


class Rows:
    """A state that knows the numbers of its texts."""

    def __init__(self, rows):
        self.rows = rows

    def select(self, rows):
        return Rows([self.rows[i] for i in rows.tolist()])

    def reserve(self, num_positions):
        self.num_positions = num_positions


NINE = SimpleNamespace(
    eos_id=0, vocab_size=9, decode=lambda ids: "".join("abcdefghi"[i] for i in ids)
)


def tell(house, script, count=1000):
    told = Told([script], house.anchor.tokenizer)
    return list(stream_text(told, "the", Sampling(max_new_tokens=count, temperature=0)))


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.text("é—漢🙂👩‍🚀 a�", max_size=12)
)
@IN_SESSION
def test_characters_split_over_tokens_come_out_whole(house, text):
    tokenizer = house.anchor.tokenizer
    pieces = tell(house, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    "".join(pieces).encode("utf-8")


def test_a_character_of_four_bytes_is_held_back_until_it_is_whole(house):
    ids = house.anchor.tokenizer.encode("a🙂b")
    assert len(ids) == 6  # one for each byte
    assert [p for p in tell(house, ids) if p] == ["a", "🙂", "b"]


@given(ids=st.lists(st.integers(1, 299), max_size=30), count=st.integers(1, 30))
@IN_SESSION
def test_any_bytes_at_all_stream_to_what_they_decode_to(house, ids, count):
    """Also when the last character never becomes whole."""
    assert "".join(tell(house, ids, count)) == house.anchor.tokenizer.decode(ids[:count])


def written(reader, prompts, sampling=GREEDY, stops=()):
    """The steps of each text: (token, ended)."""
    requests = [Request([*reader.start, *p], sampling, stops) for p in prompts]
    found = [[] for _ in prompts]
    for step in decode(reader, requests):
        found[step.text].append((step.token, step.ended))
    return found


@pytest.mark.parametrize("shares", [True, False])
def test_a_text_stops_at_its_end_while_others_go_on(shares):
    """And leaves the batch, if its reader can let it go."""
    told = Told([[5, 6, 0, 7], [1, 2, 3, 4], []], NINE, shares_prefixes=shares)
    assert written(told, [[3], [4], [5]]) == [
        [(5, None), (6, None), (None, "end_of_text")],
        [(1, None), (2, None), (3, None), (4, None), (None, "end_of_text")],
        [(None, "end_of_text")],
    ]
    assert [len(ids) for ids, _ in told.read_ids] == ([3, 2, 2, 1, 1] if shares else [3] * 5)


def test_texts_of_one_batch_end_for_reasons_of_their_own():
    told = Told([[1] * 9, [1, 2, 3, 4], [5], [2] * 9], NINE, max_seq_len=7)
    short, long = Sampling(max_new_tokens=2, temperature=0), GREEDY
    requests = [
        Request([0], short),
        Request([0, 7], long, ["cd", "x"]),
        Request([0], long),
        Request([0, 7, 7, 7], long),
    ]
    ends = {s.text: s.ended for s in decode(told, requests) if s.ended}
    assert ends == {0: "max_new_tokens", 1: "stop", 2: "end_of_text", 3: "positions"}


def test_a_stop_of_several_tokens_is_seen_and_an_empty_one_is_none():
    told = Told([[1, 2, 3, 4, 5, 6]], NINE)
    (steps,) = written(told, [[3]], stops=["", "cde"])
    assert [t for t, _ in steps] == [1, 2, 3, 4] and steps[-1][1] == "stop"


def test_the_caller_keeps_gradients_between_tokens():
    told = Told([[1, 2, 3]], NINE)
    for _ in decode(told, [Request([0], GREEDY)]):
        assert not torch.is_inference_mode_enabled()


def test_tokens_are_counted_to_the_limit_asked_for():
    assert len(written(Told([[1] * 50], NINE), [[3]])[0]) == 12


def test_a_document_starts_with_the_end_of_another_and_pads_on_the_left():
    told = Told([[], []], NINE)
    written(told, [[3, 4, 5], [6]])
    ids, is_token = told.read_ids[0]
    assert ids.tolist() == [[0, 3, 4, 5], [0, 0, 0, 6]]
    assert is_token.tolist() == [[True] * 4, [False, False, True, True]]


@pytest.mark.parametrize("length", [15, 16, 40])
def test_a_prompt_that_is_too_long_is_refused_in_plain_words(length):
    said = rf"has {length} tokens; this model holds 16 positions.*at most 14"
    with pytest.raises(ConfigError, match=said):
        written(Told([[], []], NINE, max_seq_len=16), [[7] * 3, [7] * length])


@pytest.mark.parametrize("length", [1, 5, 14])
def test_a_text_ends_where_the_model_has_no_more_positions(length):
    told = Told([[1] * 100, [2] * 100], NINE, max_seq_len=16)
    long = Sampling(max_new_tokens=100, temperature=0)
    for steps, own in zip(written(told, [[7] * length, [7]], long), (length, 1), strict=True):
        assert len(steps) == 16 - 1 - own and steps[-1][1] == "positions"


def test_whoever_asks_is_told_that_positions_ran_out(house):
    script, said = [5] * 100, []
    told = Told([script], house.anchor.tokenizer, max_seq_len=20)
    list(stream_text(told, "the", Sampling(max_new_tokens=50, temperature=0), said.append))
    own = len(house.anchor.tokenizer.encode("the"))
    (line,) = said
    assert f"after {19 - own} of the 50 tokens" in line and f"prompt's {own} " in line
    assert "20 positions" in line


def test_generating_warns_of_a_text_that_ends_because_positions_do(house):
    tokenizer = house.anchor.tokenizer
    prompt = tokenizer.decode(tokenizer.encode("a " * 600)[:495])
    with pytest.warns(UserWarning, match="Text 2 of 2.*512 positions"):
        generate(house.mixture(NAMES), ["a", prompt], sampling=Sampling(max_new_tokens=40, seed=4))


# --- choosing one token -------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def draw(logits, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return choose_tokens(torch.tensor([logits]), [Sampling(**options)], [generator])[0]


@given(
    logits=LOGITS,
    seed=st.integers(0, 99),
    top_p=st.floats(0.01, 1),
    top_k=st.none() | st.integers(1, 12),
    temperature=st.floats(0.05, 5),
)
@IN_SESSION
def test_a_chosen_token_is_always_allowed(logits, seed, top_k, top_p, temperature):
    token = draw(logits, seed, top_k=top_k, top_p=top_p, temperature=temperature)
    p = (torch.tensor(logits).double() / temperature).softmax(-1)
    likelier = p > p[token]
    if top_k is not None:
        assert int(likelier.sum()) < top_k
    assert float(p[likelier].sum()) < top_p + 1e-5
    assert p[token] > 0


@given(logits=LOGITS, seed=st.integers(0, 99))
@IN_SESSION
def test_no_temperature_one_candidate_or_no_probability_to_spare_is_the_likeliest(logits, seed):
    best = max(logits)
    for options in (
        {"temperature": 0},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": 0, "top_k": 5, "top_p": 0.5},
    ):
        assert logits[draw(logits, seed, **options)] == pytest.approx(best, abs=1e-5)


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0]), min_size=7, max_size=7),
            st.sampled_from([0.0, 0.3, 1.0]),
            st.sampled_from([0.05, 0.7, 1.0]),
            st.sampled_from([None, 1, 3]),
        ),
        min_size=1,
        max_size=5,
    )
)
@IN_SESSION
def test_a_batch_chooses_what_each_text_alone_does(rows):
    logits = torch.tensor([row for row, *_ in rows])
    samplings = [Sampling(temperature=t, top_p=p, top_k=k) for _, t, p, k in rows]

    def draws():
        return [torch.Generator().manual_seed(i) for i in range(len(rows))]

    alone = [
        choose_tokens(logits[i : i + 1], [samplings[i]], [draws()[i]])[0] for i in range(len(rows))
    ]
    assert choose_tokens(logits, samplings, draws()) == alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_refused(bad):
    for logits in ([0.0, bad, 1.0], [-math.inf] * 3):
        with pytest.raises(ConfigError, match="NaN or infinity"):
            draw(logits)


@given(seed=st.integers(0, 99))
@IN_SESSION
def test_settings_at_the_edge_choose_the_likeliest(seed):
    logits = [0.5, 2.0, -math.inf, 1.9]
    for options in ({"temperature": 1e-46}, {"top_p": 1e-46}, {"top_k": 1}):
        assert draw(logits, seed, **options) == 1
    assert draw(logits, seed, top_k=10**19) != 2


def test_draws_follow_the_probabilities():
    """Chi-square over 2,000 draws; the odds of a false alarm are one in a million."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    for options, expected in (
        ({"temperature": 1.0, "top_p": 1.0}, logits.softmax(-1)),
        ({"temperature": 0.5, "top_p": 1.0}, (logits / 0.5).softmax(-1)),
        (
            {"temperature": 2.0, "top_p": 1.0, "top_k": 3},
            (logits / 2).masked_fill(torch.tensor([1, 0, 1, 0, 0]).bool(), -99).softmax(-1),
        ),
        (
            {"temperature": 1.0, "top_p": 0.8},  # 0.57 and 0.21 are not enough, 0.13 is needed
            logits.masked_fill(torch.tensor([1, 0, 1, 0, 0]).bool(), -99).softmax(-1),
        ),
    ):
        generator, sampling = torch.Generator().manual_seed(11), Sampling(**options)
        counts = torch.zeros(5)
        rows = logits.expand(500, -1)
        for _ in range(4):
            chosen = choose_tokens(rows, [sampling] * 500, [generator] * 500)
            counts += torch.bincount(torch.tensor(chosen), minlength=5)
        possible = expected > 1e-9
        assert (counts[~possible] == 0).all()
        share = expected[possible].double()
        assert chisquare(counts[possible].double(), share / share.sum() * 2_000).pvalue > 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_k": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"temprature": 1},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        Sampling(**wrong)
