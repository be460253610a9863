"""The influence of experts on text that is not their owners', and limits to it.

A coordinator has no owner's text, but has public text, can write it again in other forms, and can
let each expert write text of its own. Source: ours.
"""

import math
import os
import secrets
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.batches import TokenSet, evaluation_windows
from flexolmo.data.forms import FORMS, write_form
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError, DataError, MergeError
from flexolmo.evaluation.likelihood import panels_of, read_windows
from flexolmo.inference.own_text import own_windows
from flexolmo.merge.mixture import Admission, LoadedMixture, add_experts, build_mixture
from flexolmo.numbers import format_change, format_percent
from flexolmo.progress import progress

Windows = list[tuple[np.ndarray, int]]
_Text = tuple[str, str]  # ("text", public or a form), or ("own", who wrote it)

PUBLIC_BYTES = 40_000  # of public text that is read
FORM_BYTES = 4_000  # of it in each form
OWN_SEQUENCES = 16  # that each expert writes
OWN_TOKENS = 192  # of each of these, at most
LEAST_BITS = 0.01  # per byte, that a loss is a share of: an expert may be sure of what it writes
MEASURES = {
    "public": "loss on public text, in bits per byte, when the expert is switched on",
    "claims": "the expert's weight on public text, mean over tokens",
    "forms": "loss on public text in other forms; the worst form",
    "others": "loss on text that another expert writes; the worst other",
}
EXAMPLE = "public<=1%,forms<=3%,others<=3%,claims<=10%"


# --- limits -------------------------------------------------------------------------------------


def refuse_excess(
    influence: Mapping[str, Any], limits: Mapping[str, float], newcomers: Iterable[str]
) -> None:
    """Raise MergeError if one of `newcomers` is above a limit, or if an expert that is no newcomer
    is, on the text of one."""
    new = set(newcomers)
    lines = []
    for name, found in influence["experts"].items():
        for measure, limit in limits.items():
            if name not in new:
                theirs = {n: x for n, x in found["others"].items() if n in new}
                if measure != "others" or not theirs:
                    continue
                found = {"others": theirs}
            value, where = worst(found, measure)
            if value is None and measure == "forms":
                lines.append(f"{name}: forms could not be measured: no public text has sentences")
            elif value is not None and value > limit:
                shown = f"{format_percent(value, 2)}, the limit is {format_percent(limit, 2)}"
                lines.append(f"{name}: {measure}{where} is {shown}")
    if lines:
        raise MergeError(
            "Above the limits of influence:\n  "
            + "\n  ".join(lines)
            + "\nNothing was changed. A good expert may lose on what a bad one writes: where two "
            "accuse each other, look at their other figures (flexolmo mix check), leave out one, "
            "then the other, or ask their owners."
        )


def admission(public: TokenSet, limits: Mapping[str, float], seed: int | None = None) -> Admission:
    """A judge for `build_mixture` that keeps what it measured, and refuses what is above `limits`.

    Without a `seed` one is drawn, so that no bundle can be made for the very texts it is read on.
    """

    def judge(mixture: LoadedMixture, newcomers: Sequence[str]) -> dict[str, Any]:
        chosen = secrets.randbelow(2**31) if seed is None else seed
        found = {"limits": dict(limits)} | measure_influence(mixture, public, seed=chosen)
        refuse_excess(found, limits, newcomers)
        return found

    return judge


class _Measured(Exception):
    """Ends a change of a mixture once its influence is known."""

    def __init__(self, influence: dict[str, Any]):
        self.influence = influence


def check_bundles(
    bundles: Sequence[Path],
    public: TokenSet,
    trusted: TrustedOwners | None,
    *,
    anchor_dir: Path | None = None,
    model_dir: Path | None = None,
    top_k: int | None = None,
    max_bytes: int | None = None,
    seed: int | None = None,
    demands: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`measure_influence` of bundles as if they were added to a mixture, or, without one, as if one
    were built of them; and `newcomers`, their names.

    Every check of `add_experts` or `build_mixture` is made, that of release reports too. Nothing is
    changed.
    """

    def stop(mixture: LoadedMixture, newcomers: Sequence[str]) -> dict[str, Any]:
        found = admission(public, {}, seed)(mixture, [])
        raise _Measured({"newcomers": list(newcomers)} | found)

    options: dict[str, Any] = {"max_bytes": max_bytes, "admission": stop, "demands": demands}
    try:
        if model_dir is not None:
            add_experts(model_dir, bundles, trusted, **options)
        elif anchor_dir is not None:
            beside = Path(anchor_dir).resolve().parent  # where links will do instead of copies
            place = beside if os.access(beside, os.W_OK) else None
            with tempfile.TemporaryDirectory(prefix=".flexolmo-", dir=place) as around:
                out = Path(around) / "mixture"
                build_mixture(anchor_dir, bundles, out, trusted, top_k=top_k, **options)
    except _Measured as measured:
        return measured.influence
    raise ConfigError("Give the anchor (--anchor), or a mixture (--model).")


def worst(found: Mapping[str, Any], measure: str) -> tuple[float | None, str]:
    """The value of one of MEASURES for an expert of `measure_influence`, None if it could not be
    measured, and where it was found."""
    if measure in ("public", "claims"):
        return found[PUBLIC]["change" if measure == "public" else "weight"], ""
    values = {name: x["change"] for name, x in found[measure].items()}
    at = max(values, key=values.__getitem__, default="")
    return values.get(at), f" ({at})" if at else ""


def values_of(found: Mapping[str, Any]) -> dict[str, str]:
    """The value of each of MEASURES for an expert of `measure_influence`, written for people."""
    values = {measure: worst(found, measure) for measure in MEASURES}
    return {
        measure: format_percent(value) if measure == "claims" else format_change(value, 2) + where
        for measure, (value, where) in values.items()
    }


# --- measuring ----------------------------------------------------------------------------------


def measure_influence(
    mixture: LoadedMixture, public: TokenSet, *, seq_len: int = 256, seed: int = 0
) -> dict[str, Any]:
    """The influence of each expert on public text, on its forms, and on what others write.

    `experts`: by expert, `public`, `forms` by form, and `others` by expert, each with `change` of
    bits per byte (with the expert on, over without, less 1) and the expert's `weight`, mean over
    tokens and layers. On public text, of the validation split, an expert is alone with the anchor.
    What another writes is read twice, by the two of them against that other alone, and by all
    against all but this one; the worse counts, for of several alike each hides the others.

    `together`: the same of all experts at once, on what one writes against that one alone.
    """
    public.check_tokenizer(mixture.tokenizer.digest, "the mixture")
    names = mixture.expert_names
    seq_len = min(seq_len, mixture.model.config.max_seq_len - 1)
    plain = list(evaluation_windows(public, "validation", seq_len, PUBLIC_BYTES))
    if not plain:
        raise DataError(
            f"{public.directory} has no text in its validation split, on which experts' "
            "influence is measured. Prepare a larger set."
        )
    texts: dict[_Text, Windows] = {("text", PUBLIC): plain}
    for form, windows in form_windows(public, mixture.tokenizer, seq_len, seed).items():
        texts["text", form] = windows
    shared = list(texts)
    own = own_windows(mixture, OWN_SEQUENCES, min(OWN_TOKENS, seq_len), seed, names)
    texts |= {("own", n): windows for n, windows in own.items()}
    arrangements: dict[frozenset[str], set[_Text]] = {}  # texts to read, by the experts that are on
    for on in ([], *([n] for n in names), names):
        arrangements.setdefault(frozenset(on), set()).update(shared)
    for other in names:
        theirs: list[list[str]] = [[other], names]
        for name in names:
            if name != other:
                theirs += [other, name], [n for n in names if n != name]
        for on in theirs:
            arrangements.setdefault(frozenset(on), set()).add(("own", other))
    read = _read_arrangements(mixture, texts, arrangements)

    def effect(
        text: _Text, on: Sequence[str], than: Sequence[str], of: Sequence[str]
    ) -> dict[str, float]:
        """The effect of the experts `on`, beside `than`, of which those `of` are new."""
        bits, weights = read[frozenset(on), text]
        without, _ = read[frozenset(than), text]
        change = (bits - without) / max(without, LEAST_BITS)
        return {"change": change, "weight": sum(weights[n] for n in of)}

    experts: dict[str, Any] = {n: {"forms": {}, "others": {}} for n in names}
    together: dict[str, Any] = {"forms": {}, "others": {}}
    for text in shared:
        for found, on in [*((experts[n], [n]) for n in names), (together, names)]:
            place = found if text[1] == PUBLIC else found["forms"]
            place[text[1]] = effect(text, on, [], on)
    for other in names:
        rest = [n for n in names if n != other]
        together["others"][other] = effect(("own", other), names, [other], rest)
        for name in rest:
            found = effect(("own", other), [other, name], [other], [name])
            left_out = effect(("own", other), names, [n for n in names if n != name], [name])
            found["change"] = max(found["change"], left_out["change"])
            experts[name]["others"][other] = found
    return {
        "public_digest": public.digest,
        "seed": seed,
        "seq_len": seq_len,
        "experts": experts,
        "together": together,
    }


def form_windows(
    public: TokenSet, tokenizer: Tokenizer, seq_len: int, seed: int
) -> dict[str, Windows]:
    """Windows of the validation split's text in each form, about FORM_BYTES of each, one window a
    document; no form, if no document has enough sentences."""
    split = public.splits["validation"]
    draw = Random(seed)
    texts = [tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]
    found: dict[str, Windows] = {}
    for form in FORMS:
        size = 0
        for text in draw.sample(texts, len(texts)):
            written = write_form(form, text, draw)
            if written is not None and size < FORM_BYTES:
                ids = tokenizer.encode_batch([written])[0][:seq_len]
                window = np.array([public.eos_id, *ids]), len(tokenizer.decode(ids).encode())
                found.setdefault(form, []).append(window)
                size += window[1]
    return found


def _read_arrangements(
    mixture: LoadedMixture,
    texts: Mapping[_Text, Windows],
    arrangements: Mapping[frozenset[str], Collection[_Text]],
) -> dict[tuple[frozenset[str], _Text], tuple[float, dict[str, float]]]:
    """Bits per byte and each expert's weight, mean over tokens and layers, of the texts of each
    arrangement; all that are read with the same experts on are read together.

    Raises MergeError for a text whose bits are not finite.
    """
    tokens = {text: sum(len(ids) - 1 for ids, _ in windows) for text, windows in texts.items()}
    total = sum(tokens[text] for chosen in arrangements.values() for text in chosen)
    read = {}
    panels = panels_of(mixture.model)
    with progress("influence", total, "tok") as meter:
        for on, chosen in arrangements.items():
            ordered = [text for text in texts if text in chosen]
            windows = [window for text in ordered for window in texts[text]]
            found = read_windows(
                mixture.model, windows, enabled=sorted(on), panels=panels, meter=meter
            )
            start = 0
            for text in ordered:
                part = slice(start, start + len(texts[text]))
                start = part.stop
                nats = -sum(float(x.sum(dtype=np.float64)) for x in found.log_probs[part])
                if not math.isfinite(nats):
                    names = ", ".join(sorted(on)) or "no expert"
                    raise MergeError(
                        f"With {names} on, text of {text[1]} has NaN or infinity for bits."
                    )
                weights = np.sum(found.weights[part], axis=0) / tokens[text]  # [E]
                size = sum(size for _, size in texts[text])
                read[on, text] = (
                    nats / math.log(2) / size,
                    dict(zip(mixture.model.expert_names, weights.tolist(), strict=True)),
                )
    return read
