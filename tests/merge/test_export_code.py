"""A mixture exported with its code: transformers computes what the mixture computes."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexolmo.inference.generate import generate
from flexolmo.inference.sampling import Sampling
from flexolmo.merge.export_code import CODE, export_code
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import DiscriminantSettings, LinearSettings
from made_engine import made_facts
from made_mixtures import IN_SESSION, NAMES, ROUTERS

os.environ["HF_HUB_OFFLINE"] = "1"
KINDS = ROUTERS | {
    "clamped": LinearSettings(bias_form="clamp"),
    "discriminant": DiscriminantSettings(),
    "context": DiscriminantSettings(has_context=True, half_life_tokens=5.0),
}
MOST = 1e-5  # largest difference of logits, over the largest logit
MANY = settings(IN_SESSION, max_examples=8)
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
def schedules(draw):
    """A batch with padding and choices of experts, and how it is read."""
    batch = draw(st.integers(1, 3))
    sets = st.lists(st.sampled_from(NAMES), unique=True)
    experts = draw(st.none() | sets | st.lists(sets, min_size=batch, max_size=batch))
    pieces = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    padding = draw(st.lists(st.integers(0, pieces[0]), min_size=batch, max_size=batch))
    padding[0] = 0
    return batch, experts, pieces, padding, draw(st.integers(0, 99))


def per_text(experts, batch):
    if experts is None or not experts or isinstance(experts[0], str):
        return [experts] * batch
    return experts


@pytest.mark.parametrize("kind", SAME)
@MANY
@given(plan=schedules())
def test_any_schedule_gives_the_same_logits(pair, wild, kind, plan):
    """Left padding, choices of experts by text, and pieces through a cache."""
    from transformers import DynamicCache

    batch, experts, pieces, padding, seed = plan
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


@pytest.mark.parametrize("kind", SAME)
@MANY
@given(plan=schedules())
def test_a_batch_is_continued_as_each_text_alone(pair, wild, kind, plan):
    batch, experts, pieces, padding, seed = plan
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


def best_beams(model: MixtureModel, prompt: list[int], on, width: int, count: int) -> list[int]:
    """Beam search over texts that do not end, each read anew."""
    active = model.expert_mask([on])
    beams = [(0.0, list(prompt))]
    for _ in range(count):
        longer = []
        for score, ids in beams:
            logs = model(torch.tensor([ids]), active=active)[0, -1].log_softmax(-1)
            top = logs.topk(width)
            longer += [
                (score + float(log), [*ids, int(token)])
                for log, token in zip(top.values, top.indices, strict=True)
            ]
        beams = sorted(longer, reverse=True)[:width]
    return beams[0][1]


@pytest.mark.parametrize("kind", ["rich", "linear", "context", "masked"])
def test_beams_take_the_routers_state_with_them(pair, wild, kind):
    model, theirs, _ = pair(kind)
    prompts = wild.ids(2, 8, eos_every=10**6).clamp(min=1)
    found = theirs.generate(
        prompts,
        num_beams=3,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        experts=[["zinc"], []],
    )
    expected = [
        best_beams(model, row.tolist(), on, 3, 5)
        for row, on in zip(prompts, [["zinc"], []], strict=True)
    ]
    assert found.tolist() == expected


def test_sampling_draws_from_the_experts_that_are_on(pair, wild):
    """Two draws of a seed are one; the expert's own text is another than public's."""
    _, theirs, _ = pair("evidence")
    prompt = wild.ids(1, 6, eos_every=10**6)
    drawn = []
    for on in (["amber"], ["amber"], []):
        torch.manual_seed(4)
        drawn.append(
            theirs.generate(
                prompt, do_sample=True, max_new_tokens=20, eos_token_id=None, experts=on
            ).tolist()
        )
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("kind", SAME)
def test_an_expert_that_is_off_may_hold_no_number_at_all(pair, wild, kind, tmp_path):
    """NaN in all that is amber's changes no bit while amber is off, and all while it is on."""
    _, theirs, out = pair(kind)
    ids = wild.ids(2, 30)
    poisoned = load(out)
    for name, tensor in poisoned.state_dict().items():
        if "expert_amber" in name:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    with torch.inference_mode():
        clean = theirs(ids, experts=["basalt", "zinc"]).logits
        assert torch.equal(poisoned(ids, experts=["basalt", "zinc"]).logits, clean)
        assert poisoned(ids, experts=["amber"]).logits.isnan().any()
        mixed = poisoned(ids, experts=[["basalt", "zinc"], ["amber"]]).logits
    agree(mixed[0], clean[0])
    assert mixed[1].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_as_if_never_merged_bit_for_bit(pair, wild, kind, tmp_path):
    _, theirs, _ = pair(kind)
    without = load(export(wild, made(wild, kind, ("basalt", "zinc")), tmp_path / "hf"))
    ids = wild.ids(2, 40)
    with torch.inference_mode():
        never = without(ids).logits
        assert torch.equal(theirs(ids, experts=["basalt", "zinc"]).logits, never)
        assert not torch.equal(theirs(ids).logits, never)


@pytest.mark.parametrize("kind", ["rich", "discriminant"])
def test_saved_again_it_is_the_same(pair, wild, kind, tmp_path):
    theirs = pair(kind)[1]
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE.name).read_bytes() == CODE.read_bytes()
    back = load(tmp_path / "again")
    ids = wild.ids(2, 20)
    with torch.inference_mode():
        assert torch.equal(back(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", ["rich", "linear"])
def test_in_half_precision_routing_stays_in_float32(make_wild, kind, tmp_path):
    wild = make_wild(torch.bfloat16)
    model = made(wild, kind)
    theirs = load(export(wild, model, tmp_path / "hf"))
    assert theirs.dtype == torch.bfloat16
    ids = wild.ids(2, 30)
    with torch.inference_mode():
        found = theirs(ids).logits.float()
    ours = model(ids).float()
    assert (found - ours).abs().max() < 0.03 * ours.abs().max()
    if kind == "rich":
        with pytest.raises(ValueError, match="Routing is in float32"):
            theirs.to(torch.bfloat16)(ids)


def test_the_readme_says_how_to_load_it_in_five_lines(pair, wild, monkeypatch, capsys):
    out = pair("rich")[2]
    monkeypatch.chdir(out.parent)
    readme = (out / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(lines.splitlines()) == 5
    assert 'experts=["amber"]' in lines
    exec(lines, {})
    tokenizer = wild.anchor.tokenizer
    assert capsys.readouterr().out.startswith(tokenizer.decode(tokenizer.encode("The")))


@pytest.fixture(scope="module")
def hf_tokenizer(pair):
    """The exported tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pair("rich")[2], trust_remote_code=True)


@IN_SESSION
@given(text=st.text() | st.sampled_from(["", "a<|endoftext|>b", " <|endoftext|>"]))
def test_texts_have_the_ids_they_have_here(hf_tokenizer, wild, text):
    """Each starts with the token that ends a text, which no text spells."""
    tokenizer = wild.anchor.tokenizer
    assert hf_tokenizer(text)["input_ids"] == [tokenizer.eos_id, *tokenizer.encode(text)]


def test_prompts_are_continued_by_the_text_that_generate_writes(pair, hf_tokenizer, wild):
    model, theirs, _ = pair("rich")
    prompts = ["The", "Grüße an alle", "x"]
    sampling = Sampling(max_new_tokens=12, temperature=0)
    facts = {name: made_facts(name) for name in NAMES}
    mixture = LoadedMixture(model, wild.anchor.tokenizer, {}, facts)
    ours = generate(mixture, prompts, only=[["amber"], [], ["zinc"]], sampling=sampling)
    batch = hf_tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    found = theirs.generate(
        **batch, experts=[["amber"], [], ["zinc"]], max_new_tokens=12, do_sample=False
    )
    written = found[:, batch["input_ids"].shape[1] :]
    assert hf_tokenizer.batch_decode(written, skip_special_tokens=True) == ours


def test_every_import_of_the_code_is_torch_or_transformers():
    tree = ast.parse(CODE.read_text())
    found = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers"}


WRONG = {
    "an unknown expert": ({"experts": ["amber", "tin"]}, "Unknown expert tin: this checkpoint"),
    "a bare name": ({"experts": "amber"}, r"expected a list of names: \['amber'\]"),
    "a name for a list": ({"experts": [["amber"], "zinc"]}, "mixes names and lists"),
    "a list for a name": ({"experts": ["zinc", ["amber"]]}, "mixes names and lists"),
    "nothing for a list": ({"experts": [["amber"], None]}, "mixes names and lists"),
    "numbers": ({"experts": torch.ones(2, 4)}, "expected names, or bool"),
    "a mask of others": (
        {"experts": torch.ones(2, 9, dtype=torch.bool)},
        "expected names, or bool",
    ),
    "public off": ({"experts": torch.zeros(2, 4, dtype=torch.bool)}, "True for public"),
    "too few lists": ({"experts": [["amber"]]}, "1 lists of names for 2 texts"),
    "a short mask": ({"attention_mask": torch.ones(2, 3)}, r"expected \[2, 10\]"),
    "no tokens": ({"inputs_embeds": torch.zeros(2, 10, 32)}, "reads input_ids"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said(pair, wild, wrong):
    _, theirs, _ = pair("evidence")
    options, said = WRONG[wrong]
    with pytest.raises(ValueError, match=said):
        theirs(wild.ids(2, 10), **options)


@pytest.mark.parametrize("kind", ["evidence", "linear"])
def test_who_is_on_cannot_change_within_a_text(pair, wild, kind):
    from transformers import DynamicCache

    _, theirs, _ = pair(kind)
    ids = wild.ids(2, 10)
    cache = DynamicCache()
    with torch.inference_mode():
        theirs(ids, experts=["amber"], past_key_values=cache)
        theirs(ids, past_key_values=cache)  # amber still
        with pytest.raises(ValueError, match="cannot change"):
            theirs(ids, experts=["zinc"], past_key_values=cache)


def test_a_cache_that_does_not_grow_or_is_anothers_is_refused(pair, wild):
    from transformers import DynamicCache

    _, theirs, _ = pair("evidence")
    ids = wild.ids(1, 5)
    with pytest.raises(ValueError, match="cache that grows"):
        theirs.generate(ids, max_new_tokens=3, cache_implementation="static")
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), layer)
    with pytest.raises(ValueError, match="filled by another model"):
        theirs(ids, past_key_values=cache)


def test_the_directory_tells_owners_licences_and_terms(house, tmp_path):
    mixture = house.mixture(NAMES, "rich")
    export_code(mixture, tmp_path / "hf")
    about = json.loads((tmp_path / "hf" / "flexolmo.json").read_text())
    assert set(about["experts"]) == set(NAMES)
    assert about["experts"]["zinc"]["owner"] == "Bob"
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert "| zinc | Bob | MIT |" in readme
    assert not [p for p in (tmp_path / "hf").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_hidden_states_attentions_and_a_loss_are_given_as_transformers_does(pair, wild):
    _, theirs, _ = pair("rich")
    ids = wild.ids(2, 12)
    with torch.inference_mode():
        found = theirs(ids, labels=ids, output_hidden_states=True, logits_to_keep=0)
        last = theirs(ids, logits_to_keep=2).logits
    expected = torch.nn.functional.cross_entropy(
        found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert torch.isclose(found.loss, expected)
    assert len(found.hidden_states) == 3
    agree(last, found.logits[:, -2:])
