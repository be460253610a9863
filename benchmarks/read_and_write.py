"""Reading a prompt and writing an answer: against stock transformers, the anchor and ceilings.

Stock reads the same weights, with the better of its two ways to run experts (eager, grouped_mm)
and of its two caches (dynamic, static). Beside every time against the anchor stands what the
experts' FLOPs say.

B batch, T positions, P prompt, N new tokens, E experts, V vocabulary.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from shapes import (
    EOS,
    LINEAR,
    NUM_EXPERTS,
    chosen_experts,
    load_stock,
    made_texts,
    make_anchor,
    make_mixture,
    owner_names,
    shares_chosen,
)
from timing import Run, Turns, fastest
from torch import Tensor

from flexolmo.inference.decode import Request, choose_tokens, decode
from flexolmo.inference.reader import OwnReader, spread
from flexolmo.inference.sampling import Sampling
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import mixture_weights
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig
from flexolmo.research.study.cost import dense_flops, mixture_flops

Record = dict[str, Any]

IMPLEMENTATIONS = ("eager", "grouped_mm")
PROMPT_TOKENS = 128
NEW_TOKENS = 16


@dataclass
class Models:
    """Models of one size and kind: ours, and what it is compared with."""

    ours: OwnReader
    other: OwnReader  # the same experts under the evidence router, or the anchor
    stock: Any = None  # in transformers

    @property
    def model(self) -> MixtureModel:
        """The mixture itself."""
        assert isinstance(self.ours.model, MixtureModel)
        return self.ours.model


_held: dict[tuple[str, str], Models] = {}


def build(size: str, kind: str) -> Models:
    """Models of a kind, those of one kind at a time; see `_make`."""
    if (size, kind) not in _held:
        _held.clear()
        gc.collect()
        _held[size, kind] = _make(size, kind)
    return _held[size, kind]


def _make(size: str, kind: str) -> Models:
    """`top2`, `top4`: whole FFN experts under a linear router, and stock's; `default`: ours."""
    anchor = make_anchor(size)

    def reader(model: Any) -> OwnReader:
        return OwnReader(model, anchor.tokenizer, has_panels=True)

    if kind == "default":
        return Models(reader(make_mixture(size, EvidenceSettings(), "all")), reader(anchor.model))
    top_k = int(kind.removeprefix("top"))
    linear = make_mixture(size, LINEAR, "ffn", top_k=top_k)
    evidence = make_mixture(size, EvidenceSettings(min_weight=0.0), "ffn", top_k=top_k)
    return Models(reader(linear), reader(evidence), load_stock(size, linear))


def flops(model: MixtureModel, config: ModelConfig, chosen: Sequence[Tensor]) -> float:
    """FLOPs a token if experts are chosen like this, bool [B,T,E] a layer."""
    public, *owners = shares_chosen(chosen)
    return mixture_flops(config, model.shapes.values(), owners, public)


def head_once(config: ModelConfig, length: int) -> ModelConfig:
    """A configuration whose costs a token are those of reading `length` tokens for the logits of
    the last alone."""
    return config.model_copy(update={"vocab_size": max(1, config.vocab_size // length)})


def assert_same(ours: Tensor, stock: Tensor) -> float:
    """Largest difference of logits [B,T,V]; AssertionError unless they are the same. Where two
    experts are all but equally likely, rounding may choose another: at few positions."""
    apart = (ours - stock).abs().amax(-1).flatten()
    assert float(apart.quantile(0.95)) < 1e-3, f"logits differ by up to {float(apart.max())}"
    return float(apart.max())


# --- reading ------------------------------------------------------------------------------------


def read_run(reader: OwnReader, ids: Tensor) -> Run:
    """Reading `ids` [B,T] into a new state, as far as the logits of the last position."""

    def prepare() -> Callable[[], object]:
        state = spread(reader.new_state(), len(ids))
        return lambda: reader.read(ids, state, last=1)

    return prepare


def stock_read_run(stock: Any, implementation: str, ids: Tensor) -> Run:
    """The same in stock."""

    def prepare() -> Callable[[], object]:
        stock.set_experts_implementation(implementation)
        return lambda: stock(ids, use_cache=True, logits_to_keep=1)

    return prepare


def time_reading(size: str, kind: str, shape: tuple[int, int], rounds: int) -> Record:
    """Our linear mixture against the same in stock, and against the same experts under the evidence
    router, which chooses as many."""
    models = build(size, kind)
    model, ids = models.model, made_texts(size, *shape)
    with torch.inference_mode():
        state = spread(models.ours.new_state(), len(ids))
        apart = assert_same(
            models.ours.read(ids, state, last=shape[1]), models.stock(ids, use_cache=False).logits
        )
    theirs = {i: stock_read_run(models.stock, i, ids) for i in IMPLEMENTATIONS}
    best = fastest(theirs)
    turns = Turns(
        {
            "ours": read_run(models.ours, ids),
            "stock": theirs[best],
            "evidence": read_run(models.other, ids),
        },
        rounds,
    )
    work = flops(model, head_once(model.config, shape[1]), chosen_experts(model, ids))
    rate = work * ids.numel() / turns.median("ours")
    return turns.record(
        vs_stock=turns.ratio("stock", "ours"),
        pct_gemm=100 * rate / turns.flops_per_second,
        evidence_vs_linear=turns.ratio("evidence", "ours"),
        stock=best,
        largest_difference=apart,
    )


def against_anchor(models: Models, ids: Tensor, rounds: int) -> Record:
    """A mixture's time to read `ids` over the anchor's, and what FLOPs say."""
    model, config = models.model, head_once(models.model.config, ids.shape[1])
    runs = {"ours": read_run(models.ours, ids), "anchor": read_run(models.other, ids)}
    turns = Turns(runs, rounds)
    times = turns.ratio("ours", "anchor")
    expected = flops(model, config, chosen_experts(model, ids)) / dense_flops(config)
    return turns.record(vs_anchor=times, flops_vs_anchor=expected, times_flops=times / expected)


def time_default_reading(size: str, kind: str, shape: tuple[int, int], rounds: int) -> Record:
    """Our default mixture against the anchor."""
    return against_anchor(build(size, kind), made_texts(size, *shape), rounds)


def time_low_rank(size: str, rank: int, rounds: int) -> Record:
    """Eight low-rank experts (FFN), all on every token, against the anchor, on 4 x 512 tokens."""
    _held.clear()
    anchor = make_anchor(size)
    everywhere = EvidenceSettings(min_weight=0.0)
    model = make_mixture(size, everywhere, "ffn", num_experts=NUM_EXPERTS + 1, rank=rank)
    models = Models(
        *(OwnReader(m, anchor.tokenizer, has_panels=True) for m in (model, anchor.model))
    )
    return against_anchor(models, made_texts(size, 4, 512), rounds)


# --- writing ------------------------------------------------------------------------------------


class Written:
    """A batch of texts [B,P+N]: a prompt, and tokens that every model is made to write.

    The likeliest token is looked for all the same. So all read the same, and text of the domains,
    which routes as real text does; what random weights would write does not.
    """

    def __init__(self, size: str, batch: int):
        self.texts = made_texts(size, batch, PROMPT_TOKENS + NEW_TOKENS + 1)
        self.texts[:, PROMPT_TOKENS:].clamp_(min=EOS + 1)  # a text that ends leaves the batch
        self.prompt = self.texts[:, :PROMPT_TOKENS]

    def at(self, step: int) -> list[int]:
        """Tokens [B] that are read at `step`, from 0 on."""
        return self.texts[:, PROMPT_TOKENS + step].tolist()

    def run(
        self, reader: OwnReader, enabled: list[list[str]] | None = None, is_sampled: bool = False
    ) -> Run:
        """N tokens of every text by the product's loop; the prompt is read once for all runs.

        `enabled` are each text's owners, by default all. Sampling follows the default settings,
        but for a temperature of 0.1: logits of random weights are ten times flatter than trained.
        """
        sampling = Sampling(temperature=0.1 if is_sampled else 0, max_new_tokens=NEW_TOKENS)
        requests = [
            Request([token], sampling.model_copy(update={"seed": i}))
            for i, token in enumerate(self.at(0))
        ]
        everyone = torch.arange(len(self.texts))
        with torch.inference_mode():
            state = (
                reader.new_state(enabled) if enabled else reader.new_state().select(0 * everyone)
            )
            state.reserve(PROMPT_TOKENS + NEW_TOKENS)  # as stock's static cache has
            reader.read(self.prompt, state, last=1)

        def prepare() -> Callable[[], object]:
            own, steps = state.select(everyone), iter(range(1, NEW_TOKENS + 1))

            def choose(logits: Tensor, numbers: Sequence[int]) -> list[int]:
                choose_tokens(logits, [r.sampling for r in requests], ())
                return self.at(next(steps))

            chosen = None if is_sampled else choose
            return lambda: list(
                decode(reader, requests, state=own, held_tokens=PROMPT_TOKENS, choose=chosen)
            )

        return prepare

    def stock_run(self, stock: Any, implementation: str, cache_kind: str) -> Run:
        """The same in stock, by a plain loop."""
        from transformers import DynamicCache, StaticCache

        cache: Any = DynamicCache(config=stock.config)
        if cache_kind == "static":
            cache = StaticCache(config=stock.config, max_cache_len=PROMPT_TOKENS + NEW_TOKENS)
        with torch.inference_mode():
            stock(self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def prepare() -> Callable[[], object]:
            stock.set_experts_implementation(implementation)
            own = copy.deepcopy(cache)

            def work() -> None:
                for step in range(NEW_TOKENS):
                    token = torch.tensor(self.at(step))[:, None]
                    logits = stock(token, past_key_values=own, use_cache=True).logits
                    logits[:, -1].argmax(-1).tolist()

            return work

        return prepare

    def needs(self, model: MixtureModel) -> tuple[float, float]:
        """FLOPs a token, and bytes of weights a step: an expert is read if any text chose it."""
        chosen = [c[:, PROMPT_TOKENS:] for c in chosen_experts(model, self.texts[:, :-1])]
        together = [c.any(0, keepdim=True) for c in chosen]
        numbers = flops(model, model.config, together) / 2
        return (flops(model, model.config, chosen), numbers * model.lm_head.weight.element_size())

    def check(self, models: Models) -> float:
        """Largest difference between our logits and stock's at three steps from a cache."""
        ours, stock = [], []
        with torch.inference_mode():
            state = spread(models.ours.new_state(), len(self.texts))
            models.ours.read(self.prompt, state, last=1)
            cache = models.stock(self.prompt, use_cache=True, logits_to_keep=1).past_key_values
            for step in range(3):
                token = torch.tensor(self.at(step))[:, None]
                ours.append(models.ours.read(token, state, last=1))
                stock.append(models.stock(token, past_key_values=cache, use_cache=True).logits)
        return assert_same(torch.cat(ours, 1), torch.cat(stock, 1))


def time_writing(size: str, kind: str, batch: int, rounds: int) -> Record:
    """Our linear mixture against stock's loop; masks that differ from text to text against none;
    and sampling against the likeliest token.

    With a mask each text leaves out another owner, so that as many experts serve the batch.
    """
    models, written, owners = build(size, kind), Written(size, batch), owner_names()
    apart = written.check(models)
    theirs = {
        f"{i}, {c} cache": written.stock_run(models.stock, i, c)
        for i in IMPLEMENTATIONS
        for c in ("dynamic", "static")
    }
    best = fastest(theirs)
    masks = [[o for o in owners if o != owners[i % len(owners)]] for i in range(batch)]
    turns = Turns(
        {
            "ours": written.run(models.ours),
            "stock": theirs[best],
            "mixed": written.run(models.ours, enabled=masks),
            "sampled": written.run(models.ours, is_sampled=True),
        },
        rounds,
    )
    _, size_bytes = written.needs(models.model)
    step = turns.median("ours") / NEW_TOKENS
    return turns.record(
        vs_stock=turns.ratio("stock", "ours"),
        times_floor=step * turns.bytes_per_second / size_bytes,
        mixed_mask_cost=turns.ratio("mixed", "ours"),
        sampling_cost=turns.ratio("sampled", "ours"),
        tokens_per_second=batch / step,
        stock=best,
        largest_difference=apart,
    )


def time_default_writing(size: str, kind: str, batch: int, rounds: int) -> Record:
    """Our default mixture against the anchor; what FLOPs say, and what the machine's ceilings say:
    the longer of the time for products and the time to read weights, which are more where texts of
    a batch chose different experts."""
    models, written = build(size, kind), Written(size, batch)
    runs = {"ours": written.run(models.ours), "anchor": written.run(models.other)}
    turns = Turns(runs, rounds)
    work, size_bytes = written.needs(models.model)
    dense = dense_flops(models.model.config)
    dense_bytes = dense / 2 * models.model.lm_head.weight.element_size()

    def floor(flops_a_token: float, bytes_a_step: float) -> float:
        products = batch * flops_a_token / turns.flops_per_second
        return max(products, bytes_a_step / turns.bytes_per_second)

    times = turns.ratio("ours", "anchor")
    expected = floor(work, size_bytes) / floor(dense, dense_bytes)
    return turns.record(
        vs_anchor=times,
        flops_vs_anchor=work / dense,
        bytes_vs_anchor=size_bytes / dense_bytes,
        times_flops=times * dense / work,
        times_ceilings=times / expected,
    )


# --- router -------------------------------------------------------------------------------------


def filter_in_a_loop(likelihood: np.ndarray, ends: np.ndarray, rate: float) -> np.ndarray:
    """Domains' weights [T,S,B] after each token, in float64, from likelihoods [T,S,B] and the ends
    of texts [T,B]: the evidence router's filter, position by position."""
    prior = np.full(likelihood.shape[1:], 1.0 / likelihood.shape[1])
    weights = prior
    found = np.empty_like(likelihood)
    for t, here in enumerate(likelihood):
        seen = weights * here
        moved = (1.0 - rate) * (seen / seen.sum(0)) + rate * prior
        weights = np.where(ends[t], prior, moved)
        found[t] = weights
    return found


def time_router(size: str, kind: str, shape: tuple[int, int], rounds: int) -> Record:
    """The default router against the same with its filter as a loop of NumPy; both look up the
    same tables, which are timed alone too."""
    ids, router = made_texts(size, *shape), build(size, kind).model.router
    assert router is not None
    s = router.settings
    before = torch.cat([torch.full_like(ids[:, :1], EOS), ids[:, :-1]], dim=1)
    ends = (ids == EOS).T.numpy()  # [T,B]

    def tables() -> np.ndarray:
        evidence = router.evidence(before.flatten(), ids.flatten())
        gaps = s.tempering * evidence.clamp(-s.clip_nats, s.clip_nats)
        return gaps.double().exp().view(-1, *ids.shape).permute(2, 0, 1).numpy()  # [T,S,B]

    def loop() -> np.ndarray:
        found = filter_in_a_loop(tables(), ends, s.switch_rate)
        family = 1 + len(router.forms)  # of public, whose weights are added up
        public = found[:, :family].sum(1, keepdims=True)
        return np.concatenate([public, found[:, family:]], axis=1)  # [T,E,B]

    ours = mixture_weights(router(ids, None, None, None)[0], None, None)  # [B,T,E]
    apart = float((ours - torch.from_numpy(loop()).permute(2, 0, 1)).abs().max())
    assert apart < 1e-5, f"the filter's weights are {apart} from the loop's"
    turns = Turns(
        {
            "router": lambda: lambda: router(ids, None, None, None),
            "loop": lambda: loop,
            "tables": lambda: tables,
        },
        rounds,
    )
    return turns.record(
        microseconds_a_token=1e6 * turns.median("router") / ids.numel(),
        loop_microseconds_a_token=1e6 * turns.median("loop") / ids.numel(),
        vs_loop=turns.ratio("loop", "router"),
    )
