"""Training and importing an anchor."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from flexolmo.data.batches import TrainingBatches, embedding_windows
from flexolmo.data.forms import FAMILIES, write_form
from flexolmo.data.tokenizer import load_tokenizer, train_tokenizer
from flexolmo.errors import CheckpointError, ConfigError, DataError
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import save_anchor
from flexolmo.model.shape import BIGRAM_KEYS, BIGRAM_LEVELS, TOKEN_LEVELS
from flexolmo.model.statistics import (
    EvidenceSettings,
    evidence_of_pairs,
    fit_table,
    in_public_steps,
    table_problems,
    weigh_evidence,
)
from flexolmo.train import loop
from flexolmo.train.anchor import import_anchor, train_anchor
from flexolmo.train.expert import ExpertRecipe, start_expert
from flexolmo.train.loop import TrainSettings


@pytest.fixture
def train_briefly(pico_sets, pico_set_dirs, pico_recipe):
    """Train an anchor for 8 steps; keywords change the training's settings."""
    tokenizer = load_tokenizer(pico_set_dirs["public"])

    def run(run_dir=None, seed=0, **changes):
        settings = TrainSettings(
            **{
                "steps": 8,
                "batch_size": 2,
                "seq_len": 16,
                "warmup_steps": 2,
                "checkpoint_every_seconds": 1e-9,
            }
            | changes
        )
        recipe = pico_recipe.model_copy(update={"train": settings, "seed": seed})
        return train_anchor(pico_sets["public"], tokenizer, recipe, run_dir, num_threads=1)

    return run


def test_an_anchor_learns(pico_anchor, pico_sets, pico_recipe, tmp_path):
    assert pico_anchor.record["tokens"] == 60 * 8 * 32
    assert pico_anchor.record["data"] == {"public": pico_sets["public"].digest}
    assert pico_anchor.record["config"] == pico_recipe.model_dump(mode="json")
    rows = pico_anchor.router_rows
    assert rows.shape == (2, 32)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_an_anchor_knows_public_training_text_in_other_forms(pico_anchor, pico_sets):
    """Each table finds its own forms, of text it was not made from, likelier than public's does."""
    tokenizer, public = pico_anchor.tokenizer, pico_anchor.public
    settings = in_public_steps(EvidenceSettings(level_nats=1.0))
    held = pico_sets["public"].splits["heldout"]
    texts = [tokenizer.decode(held.document(i).tolist()) for i in range(held.num_documents)]
    assert len(pico_anchor.forms) == len(FAMILIES)
    for forms, table in zip(FAMILIES.values(), pico_anchor.forms, strict=True):
        assert not table_problems(table, public, settings)
        evidence = weigh_evidence(table, public, settings)
        gains = []
        for text in texts:
            written = write_form(forms[0], text, Random(0))
            if written is not None:
                ids = np.array(tokenizer.encode_batch([written])[0])
                pairs = ids[:-1] * tokenizer.vocab_size + ids[1:]
                gains.append(evidence_of_pairs(table, evidence, public, settings, pairs).mean())
        assert len(gains) >= 3 and np.mean(gains) > 0.05


def test_a_form_that_an_owner_has_does_not_stand_for_its_subject(pico_anchor, pico_sets):
    """An owner whose text is all questions gets no public question."""
    tokenizer, draw = pico_anchor.tokenizer, Random(0)

    def questions(name: str, split: str) -> list[list[int]]:
        held = pico_sets[name].splits[split]
        texts = [tokenizer.decode(held.document(i).tolist()) for i in range(held.num_documents)]
        written = [write_form("questions", text, draw) for text in texts]
        return tokenizer.encode_batch([text for text in written if text is not None])

    rows = [[*row, tokenizer.eos_id] for row in questions("maths", "train")]
    settings = EvidenceSettings(min_documents=3)
    offsets = np.cumsum([0, *map(len, rows)])
    table = fit_table(np.concatenate(rows), offsets, pico_anchor.public, settings)

    recipe = ExpertRecipe(router=settings, scope="ffn")
    tensors = start_expert(pico_anchor, pico_sets["maths"], recipe) | {
        key: torch.from_numpy(values)
        for key, values in zip(
            (TOKEN_LEVELS, BIGRAM_KEYS, BIGRAM_LEVELS), vars(table).values(), strict=True
        )
    }

    def weight(anchor, name: str) -> float:
        """The owner's mean weight on held-out questions of a set."""
        router = assemble_mixture(anchor, {"maths": tensors}, settings).router
        found = [
            router(torch.tensor([ids]), None, None, None)[0].exp()[0, :, 1].mean().item()
            for ids in questions(name, "heldout")
        ]
        return float(np.mean(found))

    without = replace(pico_anchor, forms=())
    assert weight(without, "public") > 2 * weight(pico_anchor, "public")
    assert weight(pico_anchor, "maths") > 0.6 > 0.4 > weight(pico_anchor, "public")


def test_the_same_recipe_gives_the_same_anchor(train_briefly):
    one, other, different = train_briefly(), train_briefly(), train_briefly(seed=1)
    assert one.digest == other.digest != different.digest


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_is_uninterrupted(train_briefly, tmp_path, monkeypatch, optimizer):
    expected = train_briefly(tmp_path / "whole", optimizer=optimizer)
    save, batch = loop._save, TrainingBatches.batch

    def save_every_third(path, parameters, optimizers, result, identity):
        if len(result.losses_nats) % 3 == 0:
            save(path, parameters, optimizers, result, identity)

    def killed(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", save_every_third)
        patch.setattr(TrainingBatches, "batch", killed)
        with pytest.raises(KeyboardInterrupt):
            train_briefly(tmp_path / "cut", optimizer=optimizer)
    torch.manual_seed(99)  # the state of the process is of no account
    assert train_briefly(tmp_path / "cut", optimizer=optimizer).digest == expected.digest
    losses = [
        json.loads((tmp_path / d / "metrics.json").read_text())["loss_nats"]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 15}, {"learning_rate": 1e-4}])
def test_another_runs_directory_is_refused(train_briefly, tmp_path, change):
    train_briefly(tmp_path)
    checkpoint = (tmp_path / loop.CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match="anchor, data, device or number"):
        train_briefly(tmp_path, **change)
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == checkpoint


def test_a_refused_run_leaves_the_other_runs_record(train_briefly, tmp_path):
    train_briefly(tmp_path)
    record = (tmp_path / "run.json").read_bytes()
    with pytest.raises(CheckpointError):
        train_briefly(tmp_path, seed=1)
    assert (tmp_path / "run.json").read_bytes() == record


def test_a_stock_checkpoint_becomes_an_anchor(make_wild, pico_anchor, pico_sets, tmp_path):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=310,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.3,
    )
    stock = Olmo2ForCausalLM(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    pico_anchor.tokenizer.save(tmp_path / "stock" / "tokenizer.json")
    anchor = import_anchor(tmp_path / "stock", pico_sets["public"])
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(anchor.model(ids), stock(ids).logits, rtol=0, atol=1e-4)
    assert anchor.config.eos_token_id == anchor.tokenizer.eos_id
    assert anchor.router_rows.shape == (3, 32)
    save_anchor(anchor, tmp_path / "anchor")
    again = Olmo2ForCausalLM.from_pretrained(tmp_path / "anchor")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, stock(ids).logits, rtol=0, atol=1e-4)


def test_a_domain_is_at_most_64_windows_of_its_text(pico_sets, pico_anchor, as_shipped):
    windows = list(embedding_windows(pico_sets["public"], pico_anchor.config.max_seq_len))
    assert len(windows) == 64
    assert all(w.shape[0] == 1 and w.shape[1] <= 256 for w in windows)


def test_windows_longer_than_the_anchors_own_positions_are_refused(
    pico_sets, pico_recipe, tmp_path
):
    wrong = pico_recipe.model_copy(update={"train": TrainSettings(steps=20, seq_len=513)})
    with pytest.raises(ConfigError, match=r"513 tokens in train.seq_len; the model has 512"):
        train_anchor(pico_sets["public"], load_tokenizer(pico_sets["public"].directory), wrong)


def test_a_set_of_another_tokenizer_is_refused(pico_anchor, pico_sets, pico_recipe, tmp_path):
    """Of the checkpoint's own would be the right statistics; of another, they are noise."""
    other = train_tokenizer(["some other text " * 9], 270)
    save_anchor(pico_anchor, tmp_path / "anchor")
    other.save(tmp_path / "anchor" / "tokenizer.json")
    with pytest.raises(DataError, match=f"but the checkpoint .*anchor has {other.digest}"):
        import_anchor(tmp_path / "anchor", pico_sets["public"])
    with pytest.raises(DataError, match=f"but the anchor has {other.digest}"):
        train_anchor(pico_sets["public"], other, pico_recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
