"""The influence of experts on text that is not their owners', and limits to it.

A coordinator has no owner's text, but has public text, can write it again in other forms, and can
let each expert write text of its own. Source: ours.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.bundle.signing import TrustedOwners
from flexolmo.data.batches import TokenSet, evaluation_windows
from flexolmo.data.forms import FORMS, write_form
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError, DataError, MergeError
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.inference.own_text import own_windows
from flexolmo.merge.mixture import Admission, LoadedMixture, build_mixture, load_mixture, read_about
from flexolmo.progress import progress

Windows = list[tuple[np.ndarray, int]]

PUBLIC_BYTES = 40_000  # of public text that is read
FORM_BYTES = 4_000  # of it in each form
OWN_SEQUENCES = 16  # that each expert writes
OWN_TOKENS = 192  # of each of these, at most
MEASURES = {
    "public": "bits per byte of public text with the expert on, over without, less 1",
    "claims": "the expert's weight on public text, mean over tokens",
    "forms": "as public, in the form of public text that loses most",
    "others": "as public, on the text that another expert writes that loses most",
}


def parse_limits(text: str) -> dict[str, float]:
    """Limits by measure from "public<=1%,claims<=0.05"; ConfigError for what is none."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*<=\s*(\d+\.?\d*)\s*(%?)\s*", part)
        if not found or found[1] not in MEASURES or found[1] in limits:
            raise ConfigError(
                f"{part.strip()!r} is no limit. Expected one each, separated by commas, of "
                f'{", ".join(MEASURES)}: "public<=1%,claims<=5%".'
            )
        limits[found[1]] = float(found[2]) / (100 if found[3] else 1)
    return limits


def find_excess(
    influence: Mapping[str, Any], limits: Mapping[str, float], names: Iterable[str]
) -> list[str]:
    """A line for each limit that one of the experts `names` does not keep."""
    lines = []
    for name in sorted(names):
        for measure, limit in limits.items():
            value, where = worst(influence["experts"][name], measure)
            if not value <= limit:  # NaN is within no limit
                lines.append(f"{name}: {measure}{where} is {value:.2%}, the limit is {limit:.2%}")
    return lines


def refuse_excess(
    influence: Mapping[str, Any], limits: Mapping[str, float], names: Iterable[str]
) -> None:
    """Raise MergeError if one of the experts `names` does not keep a limit."""
    if lines := find_excess(influence, limits, names):
        raise MergeError(
            "These experts are above the limits:\n  "
            + "\n  ".join(lines)
            + "\nLeave them out, or ask their owners for others. A good one may lose on what a "
            "bad one writes: to see whose fault it is, check one bundle at a time, with --model."
        )


def admission(public: TokenSet, limits: Mapping[str, float], seed: int = 0) -> Admission:
    """A judge for `build_mixture` that keeps what it measured, and refuses newcomers that are above
    `limits`."""

    def judge(mixture: LoadedMixture, newcomers: Sequence[str]) -> dict[str, Any]:
        found = {"limits": dict(limits)} | measure_influence(mixture, public, seed=seed)
        refuse_excess(found, limits, newcomers)
        return found

    return judge


def check_bundles(
    anchor_dir: Path,
    bundles: Sequence[Path],
    public: TokenSet,
    trusted: TrustedOwners | None,
    *,
    model_dir: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`measure_influence` of bundles merged by themselves, or with those of a mixture; `newcomers`
    are the names of those that are not in it yet.

    Asks all that `build_mixture` asks of them; nothing that was built is kept.
    """
    held = [] if model_dir is None else list(read_about(model_dir)["experts"])
    kept = [Path(str(model_dir)) / "experts" / f"{name}.bundle" for name in held]
    with tempfile.TemporaryDirectory(prefix="flexolmo-") as around:
        built = Path(around) / "mixture"
        build_mixture(anchor_dir, [*kept, *bundles], built, trusted)
        found = measure_influence(load_mixture(built, trusted), public, seed=seed)
    return {"newcomers": sorted(found["experts"].keys() - held)} | found


def worst(found: Mapping[str, Any], measure: str) -> tuple[float, str]:
    """The value of one of MEASURES for an expert of `measure_influence`, and where it was found."""
    if measure in ("public", "claims"):
        return found[PUBLIC]["change" if measure == "public" else "weight"], ""
    values = {name: x["change"] for name, x in found[measure].items()}
    if not values:
        return 0.0, ""
    at = max(values, key=lambda name: (values[name] != values[name], values[name]))
    return values[at], f" ({at})"


def values_of(found: Mapping[str, Any]) -> dict[str, str]:
    """The value of each of MEASURES for an expert of `measure_influence`, written for people."""
    values = {measure: worst(found, measure) for measure in MEASURES}
    return {
        measure: f"{value:.1%}" if measure == "claims" else f"{value:+.2%}{where}"
        for measure, (value, where) in values.items()
    }


def measure_influence(
    mixture: LoadedMixture, public: TokenSet, *, seq_len: int = 256, seed: int = 0
) -> dict[str, Any]:
    """The influence of each expert on public text, on its forms, and on what others write.

    By expert, `public`, `forms` by form, and `others` by expert, each with `change` of bits per
    byte (with the expert on, over without, less 1) and the expert's `weight`, mean over tokens and
    layers. On public text, of the validation split, an expert is alone with the anchor; on what
    another writes, all others are on.
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
    forms = form_windows(public, mixture.tokenizer, seq_len, seed)
    own = own_windows(mixture, OWN_SEQUENCES, min(OWN_TOKENS, seq_len), seed)
    texts = {PUBLIC: plain} | forms
    total = sum(len(ids) for w in texts.values() for ids, _ in w) * (1 + len(names))
    total += sum(len(ids) for n in names for ids, _ in own[n]) * len(names)
    with progress("influence", total, "tok") as meter:

        def read(windows: Windows, on: Sequence[str]) -> tuple[float, dict[str, float]]:
            """Bits per byte, and each expert's weight."""
            found = read_windows(mixture.model, windows, enabled=on, meter=meter)
            weights = np.mean(found.routing or [], axis=0).tolist()
            return found.bits_per_byte, dict(zip(mixture.model.expert_names, weights, strict=True))

        experts: dict[str, Any] = {n: {"forms": {}, "others": {}} for n in names}
        for text, windows in texts.items():
            anchor, _ = read(windows, [])
            for name in names:
                bits, weights = read(windows, [name])
                found = {"change": bits / anchor - 1, "weight": weights[name]}
                if text == PUBLIC:
                    experts[name][PUBLIC] = found
                else:
                    experts[name]["forms"][text] = found
        for other in names:
            bits, weights = read(own[other], names)
            for name in names:
                if name != other:
                    without, _ = read(own[other], [n for n in names if n != name])
                    found = {"change": bits / without - 1, "weight": weights[name]}
                    experts[name]["others"][other] = found
    return {"public_digest": public.digest, "seed": seed, "seq_len": seq_len, "experts": experts}


def form_windows(
    public: TokenSet, tokenizer: Tokenizer, seq_len: int, seed: int
) -> dict[str, Windows]:
    """Windows of the validation split's text in each form it can be written in, about FORM_BYTES of
    each; one window a document."""
    split = public.splits["validation"]
    draw = Random(seed)
    found: dict[str, Windows] = {form: [] for form in FORMS}
    for form, windows in found.items():
        size = 0
        for i in draw.sample(range(split.num_documents), split.num_documents):
            text = write_form(form, tokenizer.decode(split.document(i).tolist()), draw)
            if text is not None:
                ids = tokenizer.encode_batch([text])[0][:seq_len]
                windows.append(
                    (np.array([public.eos_id, *ids]), len(tokenizer.decode(ids).encode()))
                )
                size += windows[-1][1]
            if size >= FORM_BYTES:
                break
    return {form: windows for form, windows in found.items() if windows}
