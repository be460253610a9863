"""Steps of a model over several texts.

n tokens of a step, E experts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError
from flexolmo.inference.engine import ModelFacts
from flexolmo.inference.texts import Text
from flexolmo.merge.rollback import Seen
from flexolmo.model.assemble import erase_expert
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import DiscriminantSettings
from flexolmo.model.spans import Span, Spans
from flexolmo.model.transformer import Transformer


@dataclass(frozen=True)
class EngineModel:
    """A model as an engine takes it up, and keeps for itself."""

    model: MixtureModel
    tokenizer: Tokenizer
    facts: ModelFacts
    frame: str  # names all that every request depends on: anchor, settings of the router, top_k
    seen: Seen = field(default_factory=dict)  # record of all bundles that its reader has seen


def refuse_unserved(model: Transformer) -> None:
    """Raise ConfigError for a model that is no mixture of states, or has a router that decides by
    sums over a text's states."""
    if not isinstance(model, MixtureModel):
        raise ConfigError(
            "An engine serves mixtures whose experts' states are mixed; it was given a "
            f"{type(model).__name__}."
        )
    if isinstance(model.settings, DiscriminantSettings):
        raise ConfigError("An engine serves mixtures with an evidence or a linear router.")


class Stepper:
    """A model that reads on in several texts at once, each with its own experts on."""

    def __init__(self, loaded: EngineModel, batch_rows: int, device: torch.device):
        """`batch_rows` is as many tokens as any step may have. ConfigError as of
        `refuse_unserved`."""
        model = loaded.model
        refuse_unserved(model)
        self.model = model.to(device)
        self.tokenizer, self.facts, self.frame = loaded.tokenizer, loaded.facts, loaded.frame
        self.batch_rows = batch_rows
        self.eos = model.config.eos_token_id if model.config.document_mask else None
        model.space_weights()
        self.panels = model.cut_panels()

    def erase(self, name: str) -> None:
        """Overwrite what is in memory of an expert."""
        erase_expert(self.model, name, self.panels)

    def spans(self, text: Text, most_tokens: int) -> list[Span]:
        """The spans that `text` reads next, of a prompt as many as have at most so many tokens."""
        return text.next_spans(most_tokens, self.eos)

    def read(
        self, parts: Sequence[tuple[Text, list[Span]]], memory: Tensor
    ) -> tuple[list["Read"], Tensor]:
        """Read the spans of every text, and find logits [.,V] where they are needed, float32 on the
        CPU. Changes no text, so that it may be tried again."""
        spans = Spans([s for _, own in parts for s in own], memory, self.batch_rows, self.eos)
        routing: list[Tensor] | None = [] if self.model.router is None else None
        x, ctx = self.model.read_spans(spans, self.panels, routing)
        weights = torch.stack(routing).mean(0) if routing else ctx.weights
        assert weights is not None
        table = weights.flatten(0, 1).double().cpu().numpy()  # [n,E]
        starts = [s.row for s in spans.spans]
        sums = dict(zip(starts, np.add.reduceat(table, starts), strict=True))
        reads = []
        rows: list[int] = []
        for text, own in parts:
            wanted = text.rows_to_predict(own)
            numbers = range(len(rows), len(rows) + len(wanted))
            reads.append(Read(text, own, [sums[s.row] for s in own], numbers))
            rows += wanted
        if not rows:  # blocks amid prompts
            return reads, torch.empty(0, self.model.config.vocab_size)
        at = torch.tensor(rows, device=x.device)
        return reads, self.model.predict_at(x, ctx, at).float().cpu()


@dataclass(frozen=True)
class Read:
    """A part of one text that has been read."""

    text: Text
    spans: Sequence[Span]
    weights: Sequence[np.ndarray]  # sums [E] over the tokens of each span
    rows: range  # of the logits, after its `rows_to_predict`
