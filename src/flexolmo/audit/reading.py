"""Predictions of several models at every token of the same texts.

B batch, T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flexolmo.audit.signals import Signals, signals_of
from flexolmo.audit.subjects import Subjects
from flexolmo.inference.reader import Reader, pad_left, spread
from flexolmo.progress import Meter, progress

NUMBERS_AT_ONCE = 2**23  # logits of one model held at a time


def read_logits(
    readers: Sequence[Reader], rows: Sequence[np.ndarray], meter: Meter | None = None
) -> Iterator[tuple[int, list[Tensor]]]:
    """The place of each row of ids [T+1], and the logits [T,V] of every reader at all but its first
    id; rows of one length come together, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        width = len(rows[order[start]]) * readers[0].tokenizer.vocab_size
        places = order[start : start + max(1, NUMBERS_AT_ONCE // width)]
        start += len(places)
        ids, is_token = pad_left([rows[i][:-1].tolist() for i in places])  # [B,T]
        with torch.inference_mode():
            said = []
            for reader in readers:
                state = spread(reader.new_state(), len(places))
                said.append(reader.read(ids, state, is_token=is_token, last=ids.shape[1]))
                if meter is not None:
                    meter.advance(sum(len(rows[i]) - 1 for i in places))
        for row, place in enumerate(places):
            yield place, [logits[row, 1 - len(rows[place]) :].cpu() for logits in said]


def read_signals(
    subjects: Subjects, rows: Sequence[np.ndarray], label: str
) -> Iterator[tuple[int, dict[str, Signals]]]:
    """The place of each row of ids [T+1], and its signals [T] by subject, each against its
    reference; every model reads every row once."""
    readers = subjects.readers
    with progress(label, len(readers) * sum(len(ids) - 1 for ids in rows), "tok") as meter:
        for place, said in read_logits(readers, rows, meter):
            log_probs = {id(r): x.log_softmax(-1) for r, x in zip(readers, said, strict=True)}
            targets = torch.from_numpy(rows[place][1:])
            yield (
                place,
                {
                    s.name: signals_of(
                        log_probs[id(s.reader)],
                        None if s.reference is None else log_probs[id(s.reference)],
                        targets,
                    )
                    for s in subjects.models
                },
            )
