"""A mixture exported with its code: transformers computes what the mixture computes."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexolmo.bundle.trust import ANY_SIGNER
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.merge.export_code import export_code
from flexolmo.merge.mixture import LoadedMixture, load_mixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import DiscriminantSettings, LinearSettings
from made_mixtures import IN_SESSION, NAMES, ROUTERS

os.environ["HF_HUB_OFFLINE"] = "1"
KINDS = ROUTERS | {
    "clamped": LinearSettings(bias_form="clamp"),
    "discriminant": DiscriminantSettings(),
    "context": DiscriminantSettings(has_context=True, half_life_tokens=5.0),
}
MOST = 1e-5  # largest difference of logits, over the largest logit
SAME = [*KINDS, "masked", "one of 4", "two of 4"]


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """A place of the tests' own for the code that transformers copies before it runs it."""
    import transformers.dynamic_module_utils as dynamic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def load(directory, **options):
    """The checkpoint as transformers loads it; nothing missing, nothing ignored."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def export(wild, model: MixtureModel, out: Path) -> Path:
    export_code(LoadedMixture(model, wild.anchor.tokenizer, {}, {}), out)
    return out


def made(wild, kind: str, names=NAMES) -> MixtureModel:
    router = KINDS[kind]
    return wild.mixture(
        router, names, shapes=wild.rich_shapes(router, NAMES) if kind == "rich" else None
    )


@pytest.fixture(scope="module")
def pair(make_wild, wild, tmp_path_factory):
    """`pair(kind)`: a mixture, and its export as transformers loads it; each made once."""
    known = {}

    def get(kind: str):
        if kind not in known:
            if kind == "masked":
                model = make_wild(document_mask=True).mixture(KINDS["evidence"], NAMES)
            elif kind.endswith("of 4"):
                top_k = {"one": 1, "two": 2}[kind.split()[0]]
                router = KINDS["evidence" if top_k == 1 else "linear"]
                model = wild.mixture(router, NAMES, top_k=top_k)
            else:
                model = made(wild, kind)
            out = export(wild, model, tmp_path_factory.mktemp("exported") / "hf")
            known[kind] = model, load(out), out
        return known[kind]

    return get


def agree(theirs: Tensor, ours: Tensor) -> None:
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= MOST * ours.abs().max()


@st.composite
def schedules(draw, kinds=SAME):
    """A kind of mixture, a batch with padding and choices of experts, and how it is read."""
    kind = draw(st.sampled_from(kinds))
    batch = draw(st.integers(1, 3))
    sets = st.lists(st.sampled_from(NAMES), unique=True)
    experts = draw(st.none() | sets | st.lists(sets, min_size=batch, max_size=batch))
    pieces = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    padding = draw(st.lists(st.integers(0, pieces[0]), min_size=batch, max_size=batch))
    padding[0] = 0
    return kind, batch, experts, pieces, padding, draw(st.integers(0, 99))


def per_text(experts, batch):
    if experts is None or not experts or isinstance(experts[0], str):
        return [experts] * batch
    return experts


@IN_SESSION
@given(plan=schedules())
def test_any_schedule_gives_the_same_logits(pair, wild, plan):
    """Left padding, choices of experts by text, and pieces through a cache."""
    from transformers import DynamicCache

    kind, batch, experts, pieces, padding, seed = plan
    model, theirs, _ = pair(kind)
    ids = wild.ids(batch, sum(pieces), seed, eos_every=6)
    is_token = torch.arange(sum(pieces))[None] >= torch.tensor(padding)[:, None]
    ids = ids.where(is_token, wild.anchor.config.eos_token_id)
    active = model.expert_mask(per_text(experts, batch))
    cache = DynamicCache()
    ours = model(ids, is_token=is_token, active=active)
    start = 0
    with torch.inference_mode():
        whole = theirs(ids, attention_mask=is_token.long(), experts=experts, use_cache=False)
        agree(whole.logits[is_token], ours[is_token])
        for n in pieces:
            piece = slice(start, start + n)
            found = theirs(
                ids[:, piece],
                attention_mask=is_token[:, : start + n].long(),
                past_key_values=cache,
                experts=experts if start == 0 or seed % 2 else None,
            ).logits
            agree(found[is_token[:, piece]], ours[:, piece][is_token[:, piece]])
            start += n


def continued(model: MixtureModel, prompt: list[int], on, count: int) -> list[int]:
    """The likeliest tokens after a prompt, read anew for each."""
    ids = list(prompt)
    active = model.expert_mask([on])
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), active=active)[0, -1].argmax()))
    return ids


@IN_SESSION
@given(plan=schedules())
def test_a_batch_is_continued_as_each_text_alone(pair, wild, plan):
    kind, batch, experts, pieces, padding, seed = plan
    model, theirs, _ = pair(kind)
    length = pieces[0] + 1
    ids = wild.ids(batch, length, seed, eos_every=10**6).clamp(min=1)
    mask = (torch.arange(length)[None] >= torch.tensor(padding)[:, None]).long()
    found = theirs.generate(
        ids.where(mask.bool(), 0),
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        experts=experts,
    )
    for row, skipped, on in zip(range(batch), padding, per_text(experts, batch), strict=True):
        expected = continued(model, ids[row, skipped:].tolist(), on, 5)
        assert found[row, skipped:].tolist() == expected
