"""Memory for keys and values of texts, within a budget of bytes, with prompts to begin from."""

from collections.abc import Callable, Sequence

import torch

from flexolmo.errors import ConfigError
from flexolmo.inference.blocks import Blocks
from flexolmo.inference.texts import Text
from flexolmo.model.spans import BLOCK
from flexolmo.model.transformer import Transformer

# what computed a prompt: digest of the model, experts that were on
Key = tuple[str, frozenset[str]]


class TextMemory:
    """Keys and values [L,2,G,P,C], in blocks; each text that is admitted holds some."""

    def __init__(self, model: Transformer, num_bytes: int):
        """ConfigError if that is too little for one block."""
        one = model.new_memory(BLOCK)
        self.block_bytes = one.numel() * one.element_size()
        count = num_bytes // self.block_bytes
        if count < 1:
            raise ConfigError(
                f"{num_bytes:,} bytes were given for keys and values; this model needs "
                f"{self.block_bytes:,} for {BLOCK} tokens."
            )
        self.blocks = Blocks(count, BLOCK)
        self.store = model.new_memory(count * BLOCK)

    def refuse_larger(self, num_positions: int) -> None:
        """ConfigError for a text that would not fit if it were alone."""
        most = self.blocks.count * BLOCK
        if num_positions > most:
            raise ConfigError(
                f"A prompt and an answer of {num_positions:,} tokens together were asked for; "
                f"there is memory for {most:,}. Ask for a shorter answer."
            )

    def admit(self, text: Text, key: Key) -> bool:
        """Give `text` the blocks that it may need, if they are there, and what was kept under `key`
        of its prompt, but for the last token, which has yet to be read for its logits."""
        known = [] if text.request.scores_prompt else text.ids[:-1]
        self.blocks.find(key, known)  # so that these are the last to be given up
        held = self.blocks.hold(self.blocks.needed(text.num_positions))
        if held is None:
            return False
        text.held = held
        if found := self.blocks.find(key, known):
            self._copy([b.number for b in found], held[: len(found)])
            text.marks = [b.after for b in found]
            text.progress = text.marks[-1]
            text.num_cached = text.progress.num_read
        return True

    def keep(self, text: Text, key: Key) -> None:
        """Keep the prompt of `text`, which has been read, under `key`."""
        assert text.held is not None
        new = self.blocks.keep(key, text.ids, text.marks)
        self._copy([text.held[place] for place, _ in new], [block.number for _, block in new])

    def forget(self, is_gone: Callable[[Key], bool]) -> None:
        """Forget the prompts kept under keys of which `is_gone` says so."""
        self.blocks.forget(is_gone)

    def release(self, text: Text) -> None:
        """Take back the blocks of `text`, if it holds any."""
        if text.held is not None:
            self.blocks.release(text.held)
            text.held = None

    def _copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        if source:
            L, two, G, _, C = self.store.shape
            store = self.store.view(L, two, G, -1, BLOCK * C)
            at, to = (torch.tensor(list(x), device=store.device) for x in (source, target))
            store.index_copy_(3, to, store.index_select(3, at))
