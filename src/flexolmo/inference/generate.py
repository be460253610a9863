"""Text from a mixture or any other reader, under a choice of experts for each prompt.

The state belongs to one call and is never shared, so what one choice of experts computed can
never reach another.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from flexolmo.errors import ConfigError
from flexolmo.inference.decode import decode, out_of_positions, requests_for
from flexolmo.inference.policy import choose_experts, refuse_bare_text
from flexolmo.inference.reader import OwnReader, Reader
from flexolmo.inference.sampling import Sampling
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.probabilities import Mix, arrange


def generate(
    mixture: LoadedMixture,
    prompts: Sequence[str],
    *,
    without: Iterable[str] | Sequence[Iterable[str]] = (),
    only: Iterable[str] | Sequence[Iterable[str]] | None = None,
    sampling: Sampling | None = None,
    mix: Mix = "states",
) -> list[str]:
    """Continuations of `prompts`, as one batch, for which a model on a processor is held twice.

    `without` and `only` name experts, for all prompts (`["news"]`) or for each prompt its own
    (`[["news"], []]`). What is mixed of experts are their states inside the model, or their
    `probabilities` of the next token (see `model.probabilities`). Raises PolicyError for an
    unknown name, ConfigError for a prompt that the model has no room for; warns of texts that end
    because its positions do.
    """
    sampling = sampling or Sampling()
    left_out = _for_each(without, len(prompts))
    alone = [None] * len(prompts) if only is None else _for_each(only, len(prompts))
    enabled = [
        choose_experts(mixture.terms, without=w or (), only=o)
        for w, o in zip(left_out, alone, strict=True)
    ]
    if not prompts:
        return []
    model = arrange(mixture.model, mix)
    reader = OwnReader(model, mixture.tokenizer, has_panels=len(prompts) > 1)
    requests = requests_for(reader, reader.tokenizer.encode_batch(prompts), sampling)
    written: list[list[int]] = [[] for _ in prompts]
    for step in decode(reader, requests, state=reader.new_state(enabled)):
        if step.token is not None:
            written[step.text].append(step.token)
        if step.ended == "positions":
            number = f"Text {step.text + 1} of {len(prompts)}. "
            warnings.warn(number + out_of_positions(reader, requests[step.text]), stacklevel=2)
    return [mixture.tokenizer.decode(row) for row in written]


def stream(
    mixture: LoadedMixture,
    prompt: str,
    *,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
    sampling: Sampling | None = None,
    mix: Mix = "states",
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of whole characters, as they are written.

    `mix`, errors and warnings are those of `generate`.
    """
    enabled = choose_experts(mixture.terms, without=without, only=only)
    reader = OwnReader(arrange(mixture.model, mix), mixture.tokenizer, sorted(enabled))
    return stream_text(reader, prompt, sampling or Sampling())


def stream_text(
    reader: Reader, prompt: str, sampling: Sampling, say: Callable[[str], None] = warnings.warn
) -> Iterator[str]:
    """The continuation by any reader, as in `stream`; `say` is told if its positions run out."""
    (request,) = requests_for(reader, [reader.tokenizer.encode(prompt)], sampling)
    written: list[int] = []
    shown = ""
    for step in decode(reader, [request]):
        if step.ended == "positions":
            say(out_of_positions(reader, request))
        if step.token is None:
            break
        written.append(step.token)
        text = reader.tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # a character whose bytes are still to come
            yield text[len(shown) :]
            shown = text
    yield reader.tokenizer.decode(written)[len(shown) :]


def _for_each(names: Iterable[str] | Sequence[Iterable[str]], count: int) -> list[list[str]]:
    """The experts named for each of `count` prompts."""
    refuse_bare_text(names)
    items = list(names)
    if all(isinstance(n, str) for n in items):
        return [[str(n) for n in items]] * count
    if any(isinstance(n, str) for n in items) or len(items) != count:
        raise ConfigError(
            f"Give one list of expert names for all prompts, or one list for each "
            f"of the {count} prompts; found {items!r}."
        )
    return [list(n) for n in items]
