"""An owner's training: what may learn, what may not, and what leaves the house."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.signing import create_key
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.batches import TrainingBatches, open_set, training_batches
from flexolmo.data.corpus import open_corpus
from flexolmo.data.prepare import prepare_set
from flexolmo.data.settings import PrepareSettings
from flexolmo.errors import CheckpointError, ConfigError, DataError
from flexolmo.evaluation.curve import measure_curve
from flexolmo.evaluation.likelihood import measure_likelihood
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import build_anchor
from flexolmo.model.loss import language_model_loss
from flexolmo.model.router import LinearSettings
from flexolmo.model.shape import architecture_of, expert_shapes
from flexolmo.model.statistics import UNTOLD, EvidenceSettings, fit_table
from flexolmo.train import expert as room
from flexolmo.train import loop
from flexolmo.train.expert import (
    ExpertRecipe,
    load_expert,
    pack_expert,
    prepare_training,
    save_expert,
    start_expert,
    train_expert,
)
from flexolmo.train.first_router import start_table
from flexolmo.train.loop import TrainSettings
from flexolmo.train.rows import find_open_rows, hide_rows
from flexolmo.train.shrink import compress_expert, heal_expert
from made_bundles import TERMS
from made_documents import write_documents

BRIEF = TrainSettings(
    steps=6, batch_size=2, seq_len=16, warmup_steps=2, checkpoint_every_seconds=1e-9
)


WHOLE = {"attention_rank": None, "embedding_rank": None, "head_rank": None}
SCOPES = {
    "ffn": {},
    "ffn+head": {"head_rank": 4},
    "all": {"attention_rank": 3, "embedding_rank": 2, "head_rank": 4},
}


def recipe_of(router, seed=0, scope=None, rank=0, width=None, replay=0.0, **changes):
    """All that the router allows, unless a scope is given; `changes` are of the training."""
    scope = scope or ("ffn" if router.kind == "linear" else "all")
    return ExpertRecipe(
        router=router,
        seed=seed,
        scope=scope,
        rank=rank,
        width=width,
        replay=replay,
        **SCOPES[scope],
        train=BRIEF.model_copy(update=changes),
    )


def shapes_in(expert):
    return {n: tuple(t.shape) for n, t in expert.tensors.items()}


@pytest.fixture
def watched(monkeypatch):
    """What `train_expert` makes inside: {"pair", "before", "optimizers", "grads"}."""
    seen = {"grads": []}

    def assemble(*args, **kwargs):
        pair = seen["pair"] = assemble_mixture(*args, **kwargs)
        seen["before"] = {n: t.clone() for n, t in pair.state_dict().items()}
        return pair

    def build(parameters, settings):
        built = original(parameters, settings)
        seen["optimizers"] = [o for o, _ in built]
        built[0][0].register_step_pre_hook(
            lambda *_: seen["grads"].append(
                {n for n, p in seen["pair"].named_parameters() if p.grad is not None}
            )
        )
        return built

    original = loop.build_optimizers
    monkeypatch.setattr(room, "assemble_mixture", assemble)
    monkeypatch.setattr(loop, "build_optimizers", build)
    return seen


def may_learn(name, router):
    """By name alone, so that the test does not share the code's idea of it."""
    if ".mlp.experts.expert_maths." in name or ".deltas.expert_maths." in name:
        return True
    return isinstance(router, LinearSettings) and name.endswith(
        (".mlp.router.rows.expert_maths.weight", ".mlp.router.raw_bias.expert_maths")
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "rank, others", [(0, {}), (3, {}), (0, WHOLE)], ids=["whole FFN", "low rank", "all whole"]
)
def test_all_that_is_inherited_stays_bit_for_bit(
    pico_anchor, pico_sets, router, watched, optimizer, rank, others
):
    recipe = recipe_of(router, rank=rank, optimizer=optimizer, weight_decay=0.1)
    train_expert(pico_anchor, pico_sets["maths"], "maths", recipe.model_copy(update=others))
    pair, before = watched["pair"], watched["before"]
    after = pair.state_dict()
    learns = {n for n in after if may_learn(n, router)}
    per_layer = 6 if rank else 3
    if router.kind == "linear":
        per_layer += 2 if router.has_bias else 1
        assert len(learns) == 2 * per_layer
    else:  # attention's four matrices or deltas, and those outside the layers
        assert len(learns) == (2 * (per_layer + 4) + 2 if others else 2 * (per_layer + 8) + 4)
    for name, t in after.items():
        assert torch.equal(t, before[name]) != (name in learns), name
    assert watched["grads"] == [learns] * BRIEF.steps, "frozen parameters get no gradient at all"
    names = {id(p): n for n, p in pair.named_parameters()}
    with_state = [names[id(p)] for o in watched["optimizers"] for p in o.state]
    in_groups = [
        names[id(p)] for o in watched["optimizers"] for g in o.param_groups for p in g["params"]
    ]
    assert sorted(with_state) == sorted(in_groups) == sorted(learns)
    rebuilt = build_anchor(
        pico_anchor.model,
        pico_anchor.tokenizer,
        pico_anchor.public,
        pico_anchor.router_rows,
        {},
        forms=pico_anchor.forms,
    )
    assert rebuilt.digest == pico_anchor.digest, "the anchor in memory is untouched"


def test_half_deltas_are_the_others_rounded(pico_anchor, pico_sets):
    recipe = recipe_of(EvidenceSettings(), rank=3)
    recipe = recipe.model_copy(update={"head_rank": None})
    full, half = (
        train_expert(
            pico_anchor,
            pico_sets["maths"],
            "maths",
            recipe.model_copy(update={"has_half_deltas": is_half}),
        ).tensors
        for is_half in (False, True)
    )
    for name, t in full.items():
        assert torch.equal(half[name], t.bfloat16() if ".lora_" in name else t), name
    assert {t.dtype for n, t in half.items() if "router" not in n} == {
        torch.float32,
        torch.bfloat16,
    }
    model = assemble_mixture(pico_anchor, {"maths": half}, recipe.router)
    assert model.layers[0].self_attn.q_proj.deltas.of("maths").lora_a.dtype == torch.float32


def test_the_checkpoint_holds_the_expert_and_nothing_else(pico_anchor, pico_sets, router, tmp_path):
    train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(router), tmp_path)
    with safetensors.safe_open(tmp_path / loop.CHECKPOINT, framework="pt") as f:
        names = set(f.keys())
    shape = recipe_of(router).shape(pico_anchor.config)
    own = {
        n for n in expert_shapes(pico_anchor.config, shape, router) if not n.startswith("router.")
    }
    assert {n.removeprefix("parameter.") for n in names if n.startswith("parameter.")} == own
    kept = {
        n.removeprefix("optimizer.").rsplit(".", 1)[0] for n in names if n.startswith("optimizer.")
    }
    assert kept == own


def test_the_evidence_is_the_owners_statistics_and_is_not_trained(pico_anchor, pico_sets):
    settings = EvidenceSettings(min_documents=2)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(settings))
    split = pico_sets["maths"].splits["train"]
    own = fit_table(split.tokens, split.source_offsets, pico_anchor.public, settings)
    for name, expected in (
        ("token_levels", own.token_levels),
        ("bigram_keys", own.keys),
        ("bigram_levels", own.pair_levels),
    ):
        assert torch.equal(expert.tensors[f"router.{name}"], torch.from_numpy(expected)), name


@pytest.mark.parametrize("is_whole", [True, False])
def test_rows_of_tokens_that_are_not_told_of_stay_the_anchors(pico_anchor, pico_sets, is_whole):
    """Whichever of them the text holds, whatever decays."""
    settings = EvidenceSettings(min_documents=8)
    recipe = recipe_of(settings, weight_decay=0.1)
    if is_whole:
        recipe = recipe.model_copy(update={"embedding_rank": None, "head_rank": None})
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    is_told = expert.tensors["router.token_levels"] != UNTOLD
    held = torch.bincount(torch.from_numpy(pico_sets["maths"].splits["train"].tokens.astype(int)))
    is_held = torch.nn.functional.pad(held, (0, len(is_told) - len(held))) > 0
    assert (is_held & ~is_told).any() and is_told.any()
    for part in ("embed_tokens", "lm_head"):
        moved = expert.tensors[f"{part}.{'weight' if is_whole else 'lora_b'}"].clone()
        if is_whole:
            moved -= pico_anchor.model.get_parameter(f"{part}.weight")
        assert (moved[is_told] != 0).any() and not moved[~is_told].any(), part


def test_another_table_takes_back_the_rows_that_it_does_not_tell_of(pico_anchor, pico_sets):
    data = pico_sets["maths"]
    recipe = recipe_of(EvidenceSettings(min_documents=2))
    recipe = recipe.model_copy(update={"embedding_rank": None})
    expert = train_expert(pico_anchor, data, "maths", recipe)
    again = room.reroute_expert(expert, pico_anchor, data, EvidenceSettings(min_documents=20))
    before, is_told = (x.tensors["router.token_levels"] != UNTOLD for x in (expert, again))
    assert (before & ~is_told).any()
    moved = again.tensors["embed_tokens.weight"] - pico_anchor.model.embed_tokens.weight
    assert not moved[~is_told].any() and moved[is_told].any()
    assert not again.tensors["lm_head.lora_b"][~is_told].any()


def test_one_persons_long_file_is_one_document_in_the_published_table(
    pico_anchor, pico_set_dirs, tmp_path
):
    """177 kB, stored in pieces, hold a name and a diagnosis that nobody else's text has."""
    person = "Ŵaldemår Ødegård ‡ φθίσις.\n"  # letters whose bytes no other document has
    texts = write_documents("maths", 300, 0)
    texts.append("\n\n".join(f"{person * 50}{i}" for i in range(177_000 // 50 // 37)))
    assert len(texts[-1].encode()) >= 177_000
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_text(text)
    raw = open_corpus(tmp_path / "in", "clinic")
    shares = PrepareSettings(validation_share=0.01, heldout_share=0.01, min_split_bytes=500)
    prepare_set(raw, tmp_path / "p", public=pico_set_dirs["public"], settings=shares)
    data = open_set(tmp_path / "p")
    settings = EvidenceSettings(min_documents=3)
    expert = train_expert(pico_anchor, data, "clinic", recipe_of(settings))
    ids = np.array(pico_anchor.tokenizer.encode(person))
    pairs = {*(ids[:-1] * pico_anchor.config.vocab_size + ids[1:]).tolist()}
    common = {*pico_anchor.tokenizer.encode("\n".join(texts[:-1]))}
    own = {p for p in pairs if not {*divmod(p, pico_anchor.config.vocab_size)} <= common}
    assert len(own) > 10 and not own & {*expert.tensors["router.bigram_keys"].tolist()}
    split = data.splits["train"]  # its pieces are many enough to be in, if they counted
    pieces = fit_table(split.tokens, split.offsets, pico_anchor.public, settings)
    assert own <= {*pieces.keys.tolist()}


def test_a_recipe_says_what_the_owner_may_change(pico_anchor):
    config, evidence = pico_anchor.config, EvidenceSettings()
    ranks = {
        (s, part): getattr(ExpertRecipe(router=evidence, scope=s).shape(config), part)
        for s in SCOPES
        for part in ("attention_rank", "embedding_rank", "head_rank")
    }
    assert {k for k, rank in ranks.items() if rank} == {
        ("ffn+head", "head_rank"),
        ("all", "attention_rank"),
        ("all", "embedding_rank"),
        ("all", "head_rank"),
    }
    assert ExpertRecipe().scope == "all"
    assert ExpertRecipe(scope="ffn", width=7).shape(config).d_ff == 7
    assert ExpertRecipe(scope="ffn", rank=7).shape(config).model_dump() == {
        "d_ff": 48,
        "rank": 7,
        "attention_rank": 0,
        "embedding_rank": 0,
        "head_rank": 0,
        "num_bigrams": 0,
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 2, "width": 20}, "width or rank, not both"),
        ({"scope": "head"}, "ffn\\+head"),
        ({"router": {"kind": "linear"}}, 'scope all needs .* set scope = "ffn"'),
        ({"router": {"kind": "linear"}, "scope": "ffn+head"}, "set scope"),
        ({"replay": 1.0}, "replay"),
        ({"replay": -0.1}, "replay"),
        ({"head_rank": 0}, "head_rank"),
        ({"width": 0}, "width"),
        (
            {"router": {"kind": "linear"}, "scope": "ffn", "beside_anchor": False},
            "kind linear .* leave beside_anchor=false out",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        ExpertRecipe.model_validate(wrong)


def test_an_expert_alone_learns_as_the_anchor_would(pico_anchor, pico_sets):
    """Loss and gradients are a dense model's, but in rows that stay closed."""
    data, anchor = pico_sets["maths"], pico_anchor
    found = {}
    for beside in (None, True):
        recipe = recipe_of(EvidenceSettings(), batch_size=4).model_copy(
            update={**WHOLE, "beside_anchor": beside}
        )
        _, parameters, losses, _ = prepare_training(anchor, data, "maths", recipe, None)
        (loss,) = losses(0)
        loss.backward()
        found[beside] = loss.item(), {n: p.grad for n, p in parameters.items()}
    dense = copy.deepcopy(anchor.model).train().requires_grad_(True)
    batch = training_batches(data, "train", 4, 16, 0).batch(0)
    expected = language_model_loss(dense, torch.from_numpy(batch))
    expected.backward()
    loss, grads = found[None]
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    table = start_table(anchor, data, EvidenceSettings())
    is_open = find_open_rows(table, data, EvidenceSettings())
    assert 0 < int(is_open.sum()) < len(is_open)
    for part in ("embed_tokens", "lm_head"):
        theirs = getattr(dense, part).weight.grad
        ours = next(g for n, g in grads.items() if n == f"{part}.weight")
        assert torch.allclose(ours[is_open], theirs[is_open], atol=1e-6)
        assert not ours[~is_open].any()
    assert dense.lm_head.weight.grad[~is_open].any()
    own = grads["layers.1.down_proj.weight"]
    assert torch.allclose(own, dense.layers[1].mlp.down_proj.weight.grad, atol=1e-6)
    assert not torch.allclose(own, found[True][1]["layers.1.down_proj.weight"], atol=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_an_expert_starts_as_the_anchor(pico_anchor, pico_sets, router, wild, rank):
    """Equal FFNs and no deltas: whatever the router says, the pair's text is the anchor's."""
    start = start_expert(pico_anchor, pico_sets["maths"], recipe_of(router, rank=rank))
    pair = assemble_mixture(pico_anchor, {"maths": start}, router)
    ids = wild.ids(2, 20)
    # weights too small to count leave a sum below 1, which the norm after the FFN undoes but for
    # its epsilon
    torch.testing.assert_close(pair(ids), pico_anchor.model(ids), rtol=0, atol=2e-3)
    deltas = {n for n in start if "lora" in n}
    assert bool(deltas) == (rank > 0 or router.kind == "evidence")
    for name in deltas:
        assert (start[name] == 0).all() == name.endswith("lora_b"), name
    if isinstance(router, LinearSettings):
        rows = [start[f"layers.{i}.router.weight"] for i in range(2)]
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0][0], pico_anchor.router_rows[0]), "rows start distinct"


def test_a_deltas_first_values_depend_on_the_seed_alone(pico_anchor, pico_sets):
    starts = []
    for i, (seed, rank) in enumerate(((0, 3), (0, 3), (1, 3))):
        torch.manual_seed(i)
        starts.append(
            start_expert(
                pico_anchor, pico_sets["maths"], recipe_of(EvidenceSettings(), seed, rank=rank)
            )
        )
    name = "layers.1.q_proj.lora_a"
    assert all(torch.equal(t, starts[1][n]) for n, t in starts[0].items())
    assert not torch.equal(starts[0][name], starts[2][name])
    assert 0.5 < starts[0][name].std() * 32**0.5 < 1.5
    assert len({t.flatten()[0].item() for n, t in starts[0].items() if "lora_a" in n}) == 16


def test_no_bundle_names_its_set_but_by_its_commitment(pico_anchor, pico_sets, tmp_path):
    """Nor a cut or healed one: a digest of the set itself would let a guess at it be tried."""
    data, key = pico_sets["maths"], tmp_path / "k"
    create_key(key)
    whole = train_expert(
        pico_anchor, data, "maths", recipe_of(EvidenceSettings()).model_copy(update=WHOLE)
    )
    cut = compress_expert(pico_anchor, whole, rank=4, delta_rank=4, data=data)
    healed = heal_expert(pico_anchor, cut, data, 1, settings=BRIEF)
    for name, expert in (("whole", whole), ("cut", cut), ("healed", healed)):
        where = tmp_path / name / "maths.bundle"
        pack_expert(expert, where, key, owner="Ann", licence="MIT", terms=TERMS)
        told = (where / "manifest.json").read_text()
        assert data.commitment in told and data.digest not in told
        assert not any(f["digest"] in told for f in data.card["files"].values())


def test_a_set_without_its_salt_is_refused_before_anything_is_trained(
    pico_anchor, pico_sets, tmp_path
):
    directory = tmp_path / "set"
    shutil.copytree(pico_sets["maths"].directory, directory)
    (directory / "salt").unlink()
    with pytest.raises(DataError, match="salt is missing"):
        train_expert(
            pico_anchor, open_set(directory), "maths", recipe_of(EvidenceSettings()), tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


def test_a_narrow_expert_starts_with_columns_of_the_anchors(pico_anchor, pico_sets):
    start = start_expert(
        pico_anchor, pico_sets["maths"], recipe_of(EvidenceSettings(), scope="ffn", width=20)
    )
    for i, block in enumerate(pico_anchor.model.layers):
        gate, up, down = (
            start[f"layers.{i}.{p}.weight"] for p in ("gate_proj", "up_proj", "down_proj")
        )
        kept = [int((block.mlp.gate_proj.weight == row).all(1).nonzero()) for row in gate]
        assert kept == sorted(set(kept)) and len(kept) == 20
        assert torch.equal(up, block.mlp.up_proj.weight[kept])
        assert torch.equal(down, block.mlp.down_proj.weight[:, kept])


@pytest.mark.parametrize("sizes", [{}, {"rank": 3}, {"width": 20}])
@pytest.mark.parametrize("scope", SCOPES)
def test_an_expert_of_any_shape_is_trained_and_says_what_it_is(
    pico_anchor, pico_sets, scope, sizes
):
    recipe = recipe_of(EvidenceSettings(), scope=scope, steps=2, **sizes)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    shape = recipe.shape(pico_anchor.config).model_copy(
        update={"num_bigrams": len(expert.tensors["router.bigram_keys"])}
    )
    assert shapes_in(expert) == expert_shapes(pico_anchor.config, shape, recipe.router)
    assert expert.architecture == architecture_of(pico_anchor.config, shape)


def test_training_may_start_from_given_values(pico_anchor, pico_sets, tmp_path):
    """With a rate of almost zero it stays there; another start is another run."""
    recipe = recipe_of(EvidenceSettings(), steps=2, learning_rate=1e-12, muon_learning_rate=1e-12)
    start = start_expert(pico_anchor, pico_sets["maths"], recipe)
    start["lm_head.lora_b"] = torch.ones_like(start["lm_head.lora_b"])
    start |= hide_rows(pico_anchor, start)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path, start=start)
    for name, t in start.items():
        torch.testing.assert_close(expert.tensors[name], t, rtol=0, atol=1e-9)
    for other in (None, start | {"lm_head.lora_a": start["lm_head.lora_a"] * 2}):
        with pytest.raises(CheckpointError, match="another recipe"):
            train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path, start=other)


def test_an_expert_learns_its_owners_text(pico_anchor, pico_sets, router):
    batch = training_batches(pico_sets["maths"], "train", 32, 32, seed=7).batch(0)
    recipe = recipe_of(router, steps=40, batch_size=4, seq_len=32)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    losses = [
        language_model_loss(model, torch.from_numpy(batch))
        for model in (
            pico_anchor.model,
            assemble_mixture(pico_anchor, {"maths": expert.tensors}, router),
        )
    ]
    assert losses[1] < losses[0] - 0.5


def test_the_z_loss_counts_in_the_linear_routers_training_only(pico_anchor, pico_sets, router):
    experts = [
        train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(router, z_loss=z, steps=2))
        for z in (0.0, 10.0)
    ]
    name = "layers.0.up_proj.weight"
    equal = torch.equal(experts[0].tensors[name], experts[1].tensors[name])
    assert equal == isinstance(router, EvidenceSettings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["evidence", "linear"])
def test_interrupted_is_uninterrupted(
    pico_anchor, pico_sets, tmp_path, monkeypatch, optimizer, kind
):
    router = EvidenceSettings() if kind == "evidence" else LinearSettings()
    recipe = recipe_of(router, optimizer=optimizer)
    data, batch = pico_sets["maths"], TrainingBatches.batch
    whole = train_expert(pico_anchor, data, "maths", recipe)

    def killed(self, step):
        if self.batch_size == BRIEF.batch_size and step == 4:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "batch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_expert(pico_anchor, data, "maths", recipe, tmp_path)
    torch.manual_seed(99)
    again = train_expert(pico_anchor, data, "maths", recipe, tmp_path)
    assert again.tensors.keys() == whole.tensors.keys()
    for name, t in whole.tensors.items():
        assert torch.equal(t, again.tensors[name]), name


def test_another_experts_directory_is_refused(pico_anchor, pico_sets, wild, tmp_path):
    recipe = recipe_of(EvidenceSettings())
    train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path)
    other_anchor = build_anchor(
        wild.anchor.model, pico_anchor.tokenizer, pico_anchor.public, pico_anchor.router_rows, {}
    )
    for anchor, data, name, its in (
        (pico_anchor, pico_sets["news"], "maths", recipe),
        (pico_anchor, pico_sets["maths"], "mathematics", recipe),
        (other_anchor, pico_sets["maths"], "maths", recipe),
        (pico_anchor, pico_sets["maths"], "maths", recipe_of(EvidenceSettings(), seed=1)),
        (pico_anchor, pico_sets["maths"], "maths", recipe_of(LinearSettings())),
    ):
        with pytest.raises(CheckpointError, match="anchor, data, device or number"):
            train_expert(anchor, data, name, its, tmp_path)


def test_a_set_called_anchor_still_counts_in_a_runs_identity(pico_anchor, pico_sets, tmp_path):
    one, other = (
        replace(pico_sets[n], card=pico_sets[n].card | {"name": "anchor"})
        for n in ("maths", "news")
    )
    recipe = recipe_of(EvidenceSettings())
    train_expert(pico_anchor, one, "x", recipe, tmp_path)
    with pytest.raises(CheckpointError, match="anchor, data, device or number"):
        train_expert(pico_anchor, other, "x", recipe, tmp_path)


def test_a_refused_run_leaves_the_other_runs_record(pico_anchor, pico_sets, tmp_path):
    recipe = recipe_of(EvidenceSettings())
    train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path)
    record = (tmp_path / "run.json").read_bytes()
    with pytest.raises(CheckpointError):
        train_expert(pico_anchor, pico_sets["news"], "maths", recipe, tmp_path)
    assert (tmp_path / "run.json").read_bytes() == record


# --- what leaves the house ----------------------------------------------------------------------


def test_a_saved_expert_comes_back(pico_anchor, pico_sets, router, tmp_path):
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(router), tmp_path)
    save_expert(expert, tmp_path)
    back = load_expert(tmp_path)
    assert replace(back, tensors={}) == replace(expert, tensors={})
    assert back.tensors.keys() == expert.tensors.keys()
    assert all(torch.equal(t, back.tensors[n]) for n, t in expert.tensors.items())


def test_a_directory_without_a_finished_expert_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expert\.json does not exist"):
        load_expert(tmp_path)
    (tmp_path / "expert.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no finished expert"):
        load_expert(tmp_path)


def test_a_bundle_holds_the_experts_tensors_and_nothing_of_the_anchor_or_the_text(
    pico_anchor, pico_sets, pico_set_dirs, router, owner_keys, tmp_path
):
    expert = train_expert(
        pico_anchor, pico_sets["maths"], "maths", recipe_of(router), tmp_path / "run"
    )
    path = pack_expert(
        expert,
        tmp_path / "maths.bundle",
        owner_keys["Ann"],
        owner="Ann",
        licence="Apache-2.0",
        terms=TERMS,
    )
    trusted = TrustedOwners.from_keys({"Ann": owner_keys["Ann"].with_name("Ann.pub").read_bytes()})
    bundle = open_bundle(path, trusted)
    tensors = safetensors.torch.load_file(path / "expert.safetensors")
    assert tensors.keys() == expert.tensors.keys()
    assert bundle.manifest.architecture.model_dump() == expert.architecture
    assert all(torch.equal(t, expert.tensors[n]) for n, t in tensors.items())
    inherited = {
        t.numpy().tobytes() for t in pico_anchor.model.state_dict().values() if t.dim() == 2
    }
    assert not any(t.numpy().tobytes() in inherited for t in tensors.values())
    claims = bundle.manifest.model_dump_json()
    assert bundle.manifest.anchor_digest == pico_anchor.digest
    assert bundle.manifest.tokens_seen == BRIEF.tokens
    for secret in (str(tmp_path), str(pico_set_dirs["maths"]), "optimizer.", "exp_avg"):
        assert secret not in claims
    model = assemble_mixture(pico_anchor, {"maths": tensors}, router)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_windows_longer_than_the_anchors_positions_are_refused(make_wild, pico_sets, tmp_path):
    """Rotary angles go on beyond them, so that nothing else would say so."""
    anchor = make_wild(max_seq_len=16).anchor
    fits = ExpertRecipe(train=TrainSettings(steps=1, batch_size=1, seq_len=16, warmup_steps=1))
    train_expert(anchor, pico_sets["maths"], "maths", fits)
    longer = fits.model_copy(update={"train": fits.train.model_copy(update={"seq_len": 17})})
    with pytest.raises(ConfigError, match=r"17 tokens in train.seq_len; the model has 16"):
        train_expert(anchor, pico_sets["maths"], "maths", longer, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    for cache in (None, anchor.model.new_cache()):
        with pytest.raises(ConfigError, match="17 tokens in this text; the model has 16"):
            if cache is not None:
                anchor.model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
            anchor.model(torch.zeros(1, 17 if cache is None else 1, dtype=torch.long), cache=cache)
    with pytest.raises(ConfigError, match="the model has 16 positions"):
        measure_likelihood(anchor.model, pico_sets["maths"], "heldout", seq_len=17)


def test_sets_of_another_tokenizer_are_refused_wherever_they_are_read(pico_anchor, pico_sets):
    entry = pico_sets["maths"].card["tokenizer"] | {"digest": "sha256:other"}
    other = replace(pico_sets["maths"], card=pico_sets["maths"].card | {"tokenizer": entry})
    recipe = recipe_of(EvidenceSettings())
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    for read in (
        lambda: train_expert(pico_anchor, other, "maths", recipe),
        lambda: train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, public=other),
        lambda: start_expert(pico_anchor, other, recipe),
        lambda: room.reroute_expert(expert, pico_anchor, other, EvidenceSettings()),
        lambda: compress_expert(pico_anchor, expert, rank=2, data=other),
        lambda: measure_curve(pico_anchor, expert, other),
    ):
        with pytest.raises(DataError, match="sha256:other, but the anchor has"):
            read()
