"""Models as readers: an anchor or a mixture of ours, or a stock Hugging Face model.

All read the same way: ids in, logits of the last positions out, and a state that holds the
positions read so far. A state can be taken up again for several texts that begin alike. Knows
nothing of sampling or tasks.

B batch, T positions, V vocabulary.
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from flexolmo.bundle.terms import Terms
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.files import digest_bytes, digest_file, recover_missing
from flexolmo.inference.policy import choose_experts
from flexolmo.merge.index import ABOUT
from flexolmo.merge.mixture import load_mixture
from flexolmo.model.checkpoint import load_anchor
from flexolmo.model.probabilities import AnyMixture, Mix, ProbabilityMixture, about_mix, arrange
from flexolmo.model.transformer import Transformer


class State(Protocol):
    """The positions that a reader has read of a batch of texts."""

    def select(self, rows: Tensor) -> Self:
        """The state of the texts `rows` [n], in that order; any may come several times."""

    def reserve(self, num_positions: int) -> None:
        """Take memory for so many positions of each text, so that none is copied to grow."""


class Reader(Protocol):
    """A language model as decoding and scoring use it."""

    tokenizer: Tokenizer
    max_seq_len: int  # tokens it can hold
    start: list[int]  # ids that stand before every text
    shares_prefixes: bool  # whether a state that has read can be selected from
    kept_tokens: int  # at a text's start that stay when it is cut to what the model holds

    def new_state(self) -> State:
        """The state of one text before anything is read."""

    def read(self, ids: Tensor, state: Any, *, is_token: Tensor | None = None, last: int) -> Tensor:
        """Logits [B,last,V] after the last positions of ids [B,T], which go on from `state`, in
        float32 on the CPU's or the model's device. `is_token` [B,T] is False on padding, which
        stands before the tokens. Changes `state`.
        """


@dataclass
class OwnReader:
    """An anchor, a dense expert, or a mixture with some experts on. Every text starts with the
    end-of-text token, as in training."""

    model: Transformer | ProbabilityMixture
    tokenizer: Tokenizer
    enabled: Sequence[str] | None = None  # experts of a mixture that are on; None: all
    shares_prefixes: bool = True
    kept_tokens: int = 0
    terms: Mapping[str, Terms] | None = None  # of its experts; asked at each new state
    has_panels: bool = False  # a second copy of the matrices, with which batches are faster

    def __post_init__(self) -> None:
        self.max_seq_len = self.model.config.max_seq_len
        self.start = [self.model.config.eos_token_id]
        self.model.space_weights()
        self.panels = self.model.cut_panels() if self.has_panels else None
        if isinstance(self.model, AnyMixture):
            self.model.expert_mask([self.enabled])  # refuses unknown names at once
        elif self.enabled:
            raise ConfigError(
                f"Experts {', '.join(self.enabled)} were named, but this model is "
                "dense: it has none to switch."
            )

    def new_state(self, enabled: Sequence[Iterable[str]] | None = None) -> Any:
        """The state of one text; given the experts that are on for each of several texts, of
        those. Raises PolicyError if the terms of an expert that is on refuse today."""
        if self.terms is not None:
            choose_experts(self.terms, only=self.enabled)
        state = self.model.new_cache()
        if isinstance(self.model, AnyMixture):
            state.active = self.model.expert_mask([self.enabled] if enabled is None else enabled)
        return state

    def read(self, ids: Tensor, state: Any, *, is_token: Tensor | None = None, last: int) -> Tensor:
        options = {"is_token": is_token, "panels": self.panels}
        return self.model(ids, cache=state, last=last, **options).float()


@contextmanager
def _hear_stock() -> Iterator[list[logging.LogRecord]]:
    """Take stock transformers' warnings and bars from the terminal; yields what it would say."""
    from transformers.utils import logging as stock

    heard = BufferingHandler(1000)
    logger = logging.getLogger("transformers")
    handlers = logger.handlers
    propagates = logger.propagate
    has_bars = stock.is_progress_bar_enabled()
    logger.handlers = [heard]
    logger.propagate = False
    stock.disable_progress_bar()
    try:
        yield heard.buffer
    finally:
        logger.handlers = handlers
        logger.propagate = propagates
        if has_bars:
            stock.enable_progress_bar()


@dataclass
class _StockState:
    cache: Any  # of stock transformers
    is_token: Tensor | None = None  # [B,S]

    def reserve(self, num_positions: int) -> None:
        """Nothing: stock transformers' cache grows by copying."""

    def select(self, rows: Tensor) -> "_StockState":
        from transformers import DynamicCache

        if self.is_token is None:
            return _StockState(copy.deepcopy(self.cache))  # nothing read yet
        chosen = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            at = rows.to(layer.keys.device)
            chosen.update(layer.keys[at], layer.values[at], i)
        return _StockState(chosen, self.is_token[rows])


@dataclass
class StockReader:
    """Any causal language model in a stock Hugging Face directory, with no token put before a
    text unless its tokenizer does so: as lm-evaluation-harness reads it."""

    model: Any
    tokenizer: Tokenizer
    max_seq_len: int
    start: list[int]
    shares_prefixes: bool
    kept_tokens: int = 0

    @classmethod
    def open(cls, directory: Path, device: torch.device) -> "StockReader":
        """Load safetensors, in float32, and tokenizer; no code of the directory's runs.

        CheckpointError: no model that stock transformers knows, or one whose tensors are not all
        those it needs, by name and shape: stock would fill it up with numbers drawn at random.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
        from transformers.cache_utils import DynamicLayer

        if (Path(directory) / "adapter_config.json").exists():
            raise CheckpointError(
                f"{directory} holds an adapter, adapter_config.json, to some other model. Merge it "
                "into that model first, or remove it."
            )
        heard: list[logging.LogRecord] = []
        try:
            with _hear_stock() as heard:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    directory,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused below, all of them by name
                )
                tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            start = tokenizer("").input_ids
        except Exception as e:  # a malformed config or file may make stock raise anything
            report = "\n".join(record.getMessage() for record in heard)
            names = sorted(set(re.findall(r"^(\S+) +\|.*CONVERSION", report, re.MULTILINE)))
            why = f"{type(e).__name__}: {e}"
            if names:  # experts that stock makes one tensor of
                why = f"parts of {', '.join(names)} are missing or of another shape."
            raise CheckpointError(
                f"{directory} is no model that stock transformers loads: {why}"
            ) from None
        model, found = loaded
        lines = [f"missing: {n}" for n in sorted(found["missing_keys"])]
        lines += [f"extra: {n}" for n in sorted(found["unexpected_keys"])]
        lines += [
            f"shape of {name}: found {list(theirs)}, expected {list(ours)}"
            for name, theirs, ours in sorted(found["mismatched_keys"])
        ]
        if lines := lines + list(found["error_msgs"]):
            raise CheckpointError(
                f"{directory} does not fit the model that its config.json describes:\n  "
                + "\n  ".join(lines)
            )
        layers = DynamicCache(config=model.config).layers
        is_plain = bool(layers) and all(type(x) is DynamicLayer for x in layers)
        limit = getattr(model.config, "max_position_embeddings", 2048)
        model.to(device).eval()
        return cls(model, load_tokenizer(directory), limit, list(start), is_plain)

    def new_state(self) -> Any:
        from transformers import DynamicCache

        return _StockState(DynamicCache(config=self.model.config))

    def read(self, ids: Tensor, state: Any, *, is_token: Tensor | None = None, last: int) -> Tensor:
        new = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
        seen = new if state.is_token is None else torch.cat([state.is_token, new], dim=1)  # [B,S]
        state.is_token = seen
        places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        device = self.model.device
        return self.model(
            ids.to(device),
            past_key_values=state.cache,
            use_cache=True,
            attention_mask=None if bool(seen.all()) else seen.long().to(device),
            position_ids=places.to(device),
            logits_to_keep=min(last, ids.shape[1]),
        ).logits.float()


def spread(state: Any, count: int) -> Any:
    """The state of one text, for `count` texts that go on from it."""
    return state.select(torch.zeros(count, dtype=torch.long))


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Ids [B,T] with padding before each row's tokens, and which are tokens [B,T]; None: all."""
    longest = max(len(r) for r in rows)
    ids = torch.tensor([[0] * (longest - len(r)) + list(r) for r in rows])
    if all(len(r) == longest for r in rows):
        return ids, None
    missing = torch.tensor([longest - len(r) for r in rows])
    return ids, torch.arange(longest) >= missing[:, None]


def open_reader(
    directory: Path,
    trusted: TrustedOwners | None = None,
    *,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
    mix: Mix = "states",
    device: torch.device | None = None,
) -> tuple[Reader, dict[str, Any]]:
    """The model in a directory, with its kind, digest, and the experts that are on.

    A mixture, an anchor, or a stock Hugging Face model; `without` and `only` choose a mixture's
    experts, `trusted` must hold their signers, and `mix` says what of them is mixed. Raises
    CheckpointError if the directory holds none of the three, PolicyError for an expert it does not
    hold, ConfigError if it has no probabilities to mix.
    """
    directory, device = Path(directory), device or torch.device("cpu")
    recover_missing(directory)
    if (directory / ABOUT).is_file():
        mixture = load_mixture(directory, trusted)
        enabled = choose_experts(mixture.terms, without=without, only=only)
        return (
            OwnReader(
                arrange(mixture.model.to(device), mix),
                mixture.tokenizer,
                sorted(enabled),
                terms=mixture.terms,
            ),
            {
                "kind": "mixture",
                "digest": digest_file(directory / ABOUT),
                "enabled": sorted(enabled),
                "experts": mixture.expert_names,
                "mix": about_mix(mix),
            },
        )
    choose_experts([], without=without, only=only)  # a dense model has nothing to switch
    if mix != "states":
        raise ConfigError(f"{directory} holds no mixture, so there are no {mix} to mix.")
    if (directory / "anchor.json").is_file():
        anchor = load_anchor(directory)
        return (
            OwnReader(anchor.model.to(device), anchor.tokenizer),
            {"kind": "anchor", "digest": anchor.digest},
        )
    files = sorted(directory.glob("*.safetensors"))
    if not (directory / "config.json").is_file() or not files:
        raise CheckpointError(
            f"{directory} holds no model: expected a mixture ({ABOUT}), an "
            "anchor (anchor.json), or a Hugging Face model (config.json, "
            "*.safetensors and tokenizer.json)."
        )
    files = [
        f for f in (directory / "config.json", directory / "tokenizer.json", *files) if f.is_file()
    ]
    digests = [digest_file(f) for f in files]
    return (
        StockReader.open(directory, device),
        {"kind": "stock", "digest": digest_bytes("".join(digests).encode())},
    )
