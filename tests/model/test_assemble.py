"""What an expert consists of, and what a mixture takes from the anchor and from owners."""

import pytest
import torch

from flexolmo.errors import FlexOlmoError, MergeError
from flexolmo.model.assemble import assemble_mixture, erase_expert, expert_tensors
from flexolmo.model.router import PUBLIC, LinearSettings
from flexolmo.model.shape import count_parameters, expert_shapes
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.untold_rows import find_untold_rows
from made_layouts import LAYOUTS, laid_out, numbers_of

SHAPES = {
    "whole": {},
    "narrow": {"d_ff": 20},
    "low rank": {"rank": 3, "num_bigrams": 0},
    "all whole": {"attention_rank": 32, "embedding_rank": 32, "head_rank": 32},
    "all": {"attention_rank": 2, "embedding_rank": 3, "head_rank": 4},
    "low rank, all": {"rank": 3, "attention_rank": 2, "embedding_rank": 3, "head_rank": 4},
}


def shapes_for(router):
    """Those that an expert of a mixture with this router may have."""
    is_linear = isinstance(router, LinearSettings)
    return {n: s for n, s in SHAPES.items() if not (is_linear and "head_rank" in s)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_an_erased_expert_no_number_is_left_and_all_others_are(wild, router, layout):
    with laid_out(layout):
        for shape in shapes_for(router).values():
            shapes = {n: wild.shape(**shape) for n in ("amber", "zinc")}
            model = wild.mixture(router, list(shapes), shapes=shapes)
            model.space_weights()
            panels = model.cut_panels()
            kept = {key: [t.clone() for t in numbers_of(own)] for key, own in panels.items()}
            erase_expert(model, "zinc", panels)
            alone = wild.mixture(router, ["amber"], shapes={"amber": shapes["amber"]}).cut_panels()
            gone = {k for k, own in panels.items() if numbers_of(own)[0].isnan().any()}
            assert len(gone) == len(panels) - len(alone)
            for key, own in panels.items():
                for now, before in zip(numbers_of(own), kept[key], strict=True):
                    assert now.isnan().all() if key in gone else torch.equal(now, before)
            for path, t in model.state_dict().items():
                is_float = t.is_floating_point()
                if "expert_zinc" in path.split("."):
                    assert t.isnan().all() if is_float else not t.any(), path
                else:
                    assert not is_float or not t.isnan().any(), path


def test_everything_inherited_is_the_anchors_bit_for_bit(wild, router):
    shapes = {n: wild.shape(**s) for n, s in shapes_for(router).items()}
    names = {f"e{i}": shape for i, shape in enumerate(shapes.values())}
    model = wild.mixture(router, list(names), shapes=names)
    found, anchor = model.state_dict(), wild.anchor.model.state_dict()
    for name, t in anchor.items():
        inherited = name.replace(".mlp.", f".mlp.experts.expert_{PUBLIC}.")
        assert torch.equal(found.pop(inherited), t), name
    for i, mixture in enumerate(model.mixtures()):
        if isinstance(router, LinearSettings):
            row = found.pop(f"layers.{i}.mlp.router.rows.expert_{PUBLIC}.weight")
            assert torch.equal(row[0], wild.anchor.router_rows[i])
            assert mixture.router.row(PUBLIC).weight.dtype == torch.float32
    if isinstance(router, EvidenceSettings):
        public = wild.anchor.public
        for part, expected in (
            ("unigram", public.unigram),
            ("backoff", public.backoff),
            ("bigram_keys", public.keys),
            ("bigram_log_probs", public.log_probs),
        ):
            t = found.pop(f"router.public.{part}")
            assert torch.equal(t, torch.from_numpy(expected)), part
        assert len(wild.anchor.forms) == 3
        for i, form in enumerate(wild.anchor.forms):
            for part, expected in (
                ("token_levels", form.token_levels),
                ("bigram_keys", form.keys),
                ("bigram_levels", form.pair_levels),
            ):
                t = found.pop(f"router.forms.{i}.{part}")
                assert torch.equal(t, torch.from_numpy(expected)), part
    for i, shape in enumerate(shapes.values()):
        own = [n for n in found if f"expert_e{i}." in n or n.endswith(f"expert_e{i}")]
        assert sum(found.pop(n).numel() for n in own) == count_parameters(
            wild.anchor.config, shape, router
        )
    assert not found, "the rest is the experts'"
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_experts_tensors_come_back_as_they_went_in(make_wild, router, dtype):
    wild = make_wild(dtype)
    for sizes in shapes_for(router).values():
        expert, other = wild.expert(router, 3, **sizes), wild.expert(router, 4)
        model = assemble_mixture(wild.anchor, {"b": other, "a": expert}, router)
        found = expert_tensors(model, "a")
        rows = find_untold_rows(model, "a")
        assert (rows is not None) == any(n.startswith("lm_head") for n in expert)
        if rows is not None:
            found[rows.key] = rows.put_back(found[rows.key])
        assert (
            found.keys()
            == expert.keys()
            == expert_shapes(wild.anchor.config, wild.shape(**sizes), router).keys()
        )
        for name, t in expert.items():
            of_router = {"keys": torch.int64, "levels": torch.int8}.get(
                name.rpartition("_")[2], torch.float32
            )
            assert found[name].dtype == t.dtype == (of_router if "router" in name else dtype)
            assert torch.equal(found[name], t), name


def test_a_mixture_shares_no_memory_with_its_parts(wild, router):
    more = {} if isinstance(router, LinearSettings) else SHAPES["all"]
    expert = wild.expert(router, 0, **more)
    model = assemble_mixture(wild.anchor, {"a": expert}, router)
    given = {
        t.data_ptr()
        for t in (
            *expert.values(),
            *wild.anchor.model.state_dict().values(),
            wild.anchor.router_rows,
        )
    }
    assert not given & {t.data_ptr() for t in model.state_dict().values()}


def test_every_misfit_of_every_expert_is_listed(wild, router):
    good, bad, strange = (wild.expert(router, i) for i in range(3))
    del bad["layers.1.down_proj.weight"]
    bad["layers.9.up_proj.weight"] = torch.zeros(1)
    strange["layers.0.up_proj.weight"] = torch.zeros(48, 31)
    low = wild.expert(router, 4, rank=3)
    del low["layers.0.up_proj.lora_b"]
    low["layers.1.gate_proj.lora_a"] = torch.zeros(2, 32)
    low["layers.1.gate_proj.weight"] = torch.zeros(48, 32)
    low["lm_head.lora_b"] = torch.zeros(300, 2)
    experts = {"good": good, "bad": bad, "strange": strange, "low": low}
    with pytest.raises(MergeError) as e:
        assemble_mixture(wild.anchor, experts, router)
    lines = [line.strip() for line in str(e.value).splitlines()[1:]]
    assert lines == [
        "bad: missing layers.1.down_proj.weight",
        "bad: extra layers.9.up_proj.weight",
        "low: missing layers.0.up_proj.lora_b",
        "low: extra layers.1.gate_proj.weight",
        "low: extra lm_head.lora_b",
        "low: shape of layers.1.gate_proj.lora_a is [2, 32], expected [3, 32]",
        "strange: shape of layers.0.up_proj.weight is [48, 31], expected [48, 32]",
    ]


@pytest.mark.parametrize(
    "name",
    ["layers.0.gate_proj.weight", "layers.0.q_proj.lora_a", "lm_head.lora_a", "router.bigram_keys"],
)
def test_a_tensor_without_dimensions_is_a_misfit(wild, name):
    expert = wild.expert(EvidenceSettings(), 0, **SHAPES["all"]) | {name: torch.tensor(1)}
    with pytest.raises(MergeError, match=f"{name}|extra|missing"):
        assemble_mixture(wild.anchor, {"a": expert}, EvidenceSettings())


@pytest.mark.parametrize("scope", ["attention_rank", "embedding_rank", "head_rank"])
def test_more_than_an_ffn_needs_a_router_that_decides_once(wild, scope):
    for router in (LinearSettings(), LinearSettings(has_bias=False)):
        expert = wild.expert(router, 0, **{scope: 2})
        with pytest.raises(MergeError, match=r"a: changes more than the FFN.*kind evidence"):
            assemble_mixture(wild.anchor, {"a": expert}, router)


@pytest.mark.parametrize("change", ["order", "twice", "negative", "too large"])
def test_bigrams_that_cannot_be_looked_up_are_refused(wild, change):
    expert = wild.expert(EvidenceSettings(), 0)
    keys = expert["router.bigram_keys"]
    if change == "order":
        keys[[3, 4]] = keys[[4, 3]]
    elif change == "twice":
        keys[4] = keys[3]
    elif change == "negative":
        keys[0] = -1
    else:
        keys[-1] = wild.anchor.config.vocab_size**2
    with pytest.raises(MergeError, match=r"a: router\.bigram_keys are not ascending pairs"):
        assemble_mixture(wild.anchor, {"a": expert}, EvidenceSettings())


def test_an_expert_of_another_router_is_refused(wild):
    evidence, linear = EvidenceSettings(), LinearSettings()
    for its, ours in (
        (evidence, linear),
        (linear, evidence),
        (linear, LinearSettings(has_bias=False)),
    ):
        with pytest.raises(MergeError, match=r"router\.(weight|token_levels|raw_bias)"):
            assemble_mixture(wild.anchor, {"a": wild.expert(its, 0)}, ours)


def test_no_owner_may_take_the_public_experts_place(wild, router):
    with pytest.raises(FlexOlmoError, match="public"):
        assemble_mixture(wild.anchor, {PUBLIC: wild.expert(router, 0)}, router)


@pytest.mark.parametrize("name", ["training", "values", "type", "half"])
def test_an_expert_may_have_any_name_that_a_bundle_may(wild, router, name):
    assert wild.mixture(router, [name]).expert_names == [PUBLIC, name]
