"""Logits of given texts as the engine computes them: read side by side, each with its own experts
on, their prompts in blocks and the rest one token at a time.

For whoever compares what is served; the engine itself chooses the tokens that it writes.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.inference.batching import EngineSettings
from flexolmo.inference.engine import EngineRequest, ModelFacts
from flexolmo.inference.sampling import Sampling
from flexolmo.inference.stepping import EngineModel, Stepper
from flexolmo.inference.texts import Text
from flexolmo.model.moe import MixtureModel
from flexolmo.model.spans import BLOCK


class SideBySide:
    """A mixture that reads as `BatchEngine` does, by the same steps of the same sizes."""

    def __init__(self, model: MixtureModel, tokenizer: Tokenizer):
        """Raises what `Stepper` raises for a model that is not served."""
        settings = EngineSettings()
        self._prompt_tokens = settings.prompt_tokens
        facts = ModelFacts("", {}, model.config.max_seq_len, model.config.vocab_size, [])
        loaded = EngineModel(model, tokenizer, facts, "")
        self._stepper = Stepper(loaded, settings.max_running + settings.prompt_tokens, model.device)

    def read(
        self, texts: Sequence[Sequence[int]], on: Sequence[Collection[str]], num_single: int
    ) -> list[Tensor]:
        """Logits [T,V] after each of the T ids of every text, of which the last `num_single` are
        read one by one; `on` are the experts that are on for each."""
        begun = [self._begin(ids, names, num_single) for ids, names in zip(texts, on, strict=True)]
        size = -(-max(map(len, texts)) // BLOCK)  # blocks for each text
        memory = self._stepper.model.new_memory(len(texts) * size * BLOCK)
        for i, text in enumerate(begun):
            text.held = range(i * size, (i + 1) * size)
        found: dict[Text, list[Tensor]] = {text: [] for text in begun}
        with torch.inference_mode():
            while prompts := [text for text in begun if not text.has_read_prompt]:
                self._step(prompts, memory, found)
            for place in range(num_single, 0, -1):
                for text, ids in zip(begun, texts, strict=True):
                    assert text.answer is not None
                    text.answer.written.append(ids[-place])
                self._step(begun, memory, found)
        return [torch.cat(parts) for parts in found.values()]

    def _begin(self, ids: Sequence[int], on: Collection[str], num_single: int) -> Text:
        request = EngineRequest(
            ids[: len(ids) - num_single],
            frozenset(on),
            "",
            Sampling(max_new_tokens=max(num_single, 1)),
            scores_prompt=True,  # so that logits after every id are computed
            writes=num_single > 0,
        )
        return Text(request, lambda event: None, self._stepper.model, self._stepper.tokenizer, 0)

    def _step(self, texts: Sequence[Text], memory: Tensor, found: dict[Text, list[Tensor]]) -> None:
        """Read on in `texts`, of prompts as many tokens as a step of the engine has."""
        room = self._prompt_tokens
        parts = []
        for text in texts:
            spans = self._stepper.spans(text, room)
            if not text.has_read_prompt:
                room -= sum(len(span.ids) for span in spans)
            if spans:
                parts.append((text, spans))
        reads, logits = self._stepper.read(parts, memory)
        for read in reads:
            read.text.take_in(read.spans, read.weights)
            found[read.text].append(logits[read.rows.start : read.rows.stop])
