"""An owner's training: what may learn, what may not, and what leaves the house."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.signing import TrustedOwners
from flexolmo.data.batches import TrainingBatches, training_batches
from flexolmo.errors import CheckpointError
from flexolmo.model.assemble import assemble_mixture, expert_shapes
from flexolmo.model.checkpoint import build_anchor
from flexolmo.model.router import LinearSettings
from flexolmo.model.statistics import EvidenceSettings, owner_table
from flexolmo.model.transformer import language_model_loss
from flexolmo.train import expert as room
from flexolmo.train import loop
from flexolmo.train.expert import (
    ExpertRecipe,
    load_expert,
    pack_expert,
    save_expert,
    start_expert,
    train_expert,
)
from flexolmo.train.loop import TrainSettings

BRIEF = TrainSettings(steps=6, batch_size=2, seq_len=16, warmup_steps=2,
                      checkpoint_every_seconds=1e-9)


def recipe_of(router, seed=0, **changes):
    return ExpertRecipe(router=router, seed=seed, train=BRIEF.model_copy(update=changes))


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
        built[0][0].register_step_pre_hook(lambda *_: seen["grads"].append(
            {n for n, p in seen["pair"].named_parameters() if p.grad is not None}))
        return built
    original = loop.build_optimizers
    monkeypatch.setattr(room, "assemble_mixture", assemble)
    monkeypatch.setattr(loop, "build_optimizers", build)
    return seen


def may_learn(name, router):
    """By name alone, so that the test does not share the code's idea of it."""
    if ".mlp.experts.expert_maths." in name:
        return True
    return isinstance(router, LinearSettings) and name.endswith(
        (".mlp.router.rows.expert_maths.weight", ".mlp.router.raw_bias.expert_maths"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_that_is_inherited_stays_bit_for_bit(pico_anchor, pico_sets, router, watched,
                                                 optimizer):
    train_expert(pico_anchor, pico_sets["maths"], "maths",
                 recipe_of(router, optimizer=optimizer, weight_decay=0.1))
    pair, before = watched["pair"], watched["before"]
    after = pair.state_dict()
    learns = {n for n in after if may_learn(n, router)}
    per_layer = 3 + (2 if router == LinearSettings() else 1) * (router.kind == "linear")
    assert len(learns) == 2 * per_layer
    for name, t in after.items():
        assert torch.equal(t, before[name]) != (name in learns), name
    assert watched["grads"] == [learns] * BRIEF.steps, "frozen parameters get no gradient at all"
    names = {id(p): n for n, p in pair.named_parameters()}
    with_state = [names[id(p)] for o in watched["optimizers"] for p in o.state]
    in_groups = [names[id(p)] for o in watched["optimizers"] for g in o.param_groups
                 for p in g["params"]]
    assert sorted(with_state) == sorted(in_groups) == sorted(learns)
    rebuilt = build_anchor(pico_anchor.model, pico_anchor.tokenizer, pico_anchor.public,
                           pico_anchor.router_rows, {})
    assert rebuilt.digest == pico_anchor.digest, "the anchor in memory is untouched"


def test_the_checkpoint_holds_the_expert_and_nothing_else(pico_anchor, pico_sets, router,
                                                          tmp_path):
    train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(router), tmp_path)
    with safetensors.safe_open(tmp_path / loop.CHECKPOINT, framework="pt") as f:
        names = set(f.keys())
    own = expert_shapes(pico_anchor.config, 48, router).keys() - {"router.evidence"}
    assert {n.removeprefix("parameter.") for n in names if n.startswith("parameter.")} == own
    kept = {n.removeprefix("optimizer.").rsplit(".", 1)[0] for n in names
            if n.startswith("optimizer.")}
    assert kept == own


def test_the_evidence_table_is_the_owners_counts_and_is_not_trained(pico_anchor, pico_sets):
    settings = EvidenceSettings(min_documents=2)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(settings))
    split = pico_sets["maths"].splits["train"]
    table = owner_table(split.tokens, split.offsets, pico_anchor.public, settings,
                        pico_anchor.config.eos_token_id)
    assert torch.equal(expert.tensors["router.evidence"], torch.from_numpy(table))


def test_an_expert_starts_as_the_anchor(pico_anchor, pico_sets, router, wild):
    """Two equal FFNs: whatever the router says, the pair's text is the anchor's."""
    start = start_expert(pico_anchor, pico_sets["maths"], "maths", router)
    pair = assemble_mixture(pico_anchor, {"maths": start}, router)
    ids = wild.ids(2, 20)
    torch.testing.assert_close(pair(ids), pico_anchor.model(ids), rtol=0, atol=1e-4)
    if isinstance(router, LinearSettings):
        rows = [start[f"layers.{i}.router.weight"] for i in range(2)]
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0][0], pico_anchor.router_rows[0]), "rows start distinct"


def test_an_expert_learns_its_owners_text(pico_anchor, pico_sets, router):
    batch = training_batches(pico_sets["maths"], "train", 32, 32, seed=7).batch(0)
    recipe = recipe_of(router, steps=40, batch_size=4, seq_len=32)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    losses = [language_model_loss(model, torch.from_numpy(batch)) for model in (
        pico_anchor.model, assemble_mixture(pico_anchor, {"maths": expert.tensors}, router))]
    assert losses[1] < losses[0] - 0.5


def test_the_z_loss_counts_in_the_linear_routers_training_only(pico_anchor, pico_sets, router):
    experts = [train_expert(pico_anchor, pico_sets["maths"], "maths",
                            recipe_of(router, z_loss=z, steps=2)) for z in (0.0, 10.0)]
    name = "layers.0.up_proj.weight"
    equal = torch.equal(experts[0].tensors[name], experts[1].tensors[name])
    assert equal == isinstance(router, EvidenceSettings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["evidence", "linear"])
def test_interrupted_is_uninterrupted(pico_anchor, pico_sets, tmp_path, monkeypatch, optimizer,
                                      kind):
    recipe = recipe_of({"kind": kind}, optimizer=optimizer)
    recipe = ExpertRecipe.model_validate(recipe.model_dump())
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
    other_anchor = build_anchor(wild.anchor.model, pico_anchor.tokenizer, pico_anchor.public,
                                pico_anchor.router_rows, {})
    for anchor, data, name, its in (
            (pico_anchor, pico_sets["news"], "maths", recipe),
            (pico_anchor, pico_sets["maths"], "mathematics", recipe),
            (other_anchor, pico_sets["maths"], "maths", recipe),
            (pico_anchor, pico_sets["maths"], "maths", recipe_of(EvidenceSettings(), seed=1)),
            (pico_anchor, pico_sets["maths"], "maths", recipe_of(LinearSettings()))):
        with pytest.raises(CheckpointError, match="another recipe, seed, anchor, data or number"):
            train_expert(anchor, data, name, its, tmp_path)


def test_a_set_called_anchor_still_counts_in_a_runs_identity(pico_anchor, pico_sets, tmp_path):
    one, other = (replace(pico_sets[n], card=pico_sets[n].card | {"name": "anchor"})
                  for n in ("maths", "news"))
    recipe = recipe_of(EvidenceSettings())
    train_expert(pico_anchor, one, "x", recipe, tmp_path)
    with pytest.raises(CheckpointError, match="another recipe, seed, anchor, data or number"):
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
        pico_anchor, pico_sets, pico_set_dirs, router, owner_keys, tmp_path):
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(router),
                          tmp_path / "run")
    path = pack_expert(expert, tmp_path / "maths.bundle", owner_keys["Ann"], owner="Ann",
                       licence="Apache-2.0", terms="Research only.")
    trusted = TrustedOwners.from_keys(
        {"Ann": owner_keys["Ann"].with_name("Ann.pub").read_bytes()})
    bundle = open_bundle(path, trusted)
    tensors = safetensors.torch.load(bundle.weights)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    assert shapes == expert_shapes(pico_anchor.config, 48, router)
    assert all(torch.equal(t, expert.tensors[n]) for n, t in tensors.items())
    inherited = {t.numpy().tobytes() for t in pico_anchor.model.state_dict().values()
                 if t.dim() == 2}
    assert not any(t.numpy().tobytes() in inherited for t in tensors.values())
    claims = bundle.manifest.model_dump_json()
    assert bundle.manifest.anchor_digest == pico_anchor.digest
    assert bundle.manifest.tokens_seen == BRIEF.tokens
    for secret in (str(tmp_path), str(pico_set_dirs["maths"]), "optimizer.", "exp_avg"):
        assert secret not in claims
    model = assemble_mixture(pico_anchor, {"maths": tensors}, router)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()
