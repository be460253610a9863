"""Private steps: gradients held against one at a time and against Opacus; sampling; noise; keys."""

import hashlib
import shutil
import stat
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest
from torch import nn

from flexolmo.data.units import read_unit, unit_offsets
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.files import read_json
from flexolmo.model.loss import language_model_loss
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.progress import PROGRESS_FILE
from flexolmo.train import loop
from flexolmo.train.at_once import choose_group, in_groups
from flexolmo.train.budget import PrivacySettings
from flexolmo.train.dp_sgd import KEY_FILE, ROUNDING, PrivateSteps
from flexolmo.train.expert import ExpertRecipe, prepare_training
from flexolmo.train.loop import CHECKPOINT, TrainSettings, compute_gradients, train

SETTINGS = TrainSettings(
    steps=5,
    batch_size=6,
    seq_len=16,
    warmup_steps=1,
    optimizer="adamw",
    grad_clip=1e9,
    checkpoint_every_seconds=1e-9,
)


def recipe_of(**changes):
    privacy = {"epsilon": 8.0, "clip_norm": 0.5, "row_share": 0.002} | changes.pop("privacy", {})
    return ExpertRecipe(
        privacy=PrivacySettings(**privacy),
        router=EvidenceSettings(epsilon=4.0, level_nats=0.1),
        train=SETTINGS,
        **changes,
    )


def prepared(anchor, data, **changes):
    """As `prepare_training`, without noise; every fifth unit is read."""
    pair, parameters, losses, private = prepare_training(
        anchor, data, "maths", recipe_of(**changes), None
    )
    private.noise = 0.0
    private.open(None, "identity", False)
    private.choose = lambda step: np.arange(0, private.num_units, 5)
    return SimpleNamespace(pair=pair, parameters=parameters, losses=losses, private=private)


def texts_of(data, private, step, unit="document", windows=1):
    """Windows of every unit that the step reads."""
    offsets = unit_offsets(data, unit, SETTINGS.seq_len)
    tokens = data.splits["train"].tokens
    return [
        torch.from_numpy(
            read_unit(
                tokens[offsets[u] : offsets[u + 1]],
                data.eos_id,
                SETTINGS.seq_len,
                private.draw(step, int(u), windows),
            )
        )
        for u in private.choose(step)
    ]


def norm_of(grads):
    return torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt().item()


# --- gradients ----------------------------------------------------------------------------------

KINDS = {
    "whole": {},
    "low rank": {"rank": 3, "attention_rank": 2, "embedding_rank": 4, "head_rank": 5},
    "ffn alone": {"scope": "ffn"},
    "ffn and head, low rank": {"scope": "ffn+head", "rank": 3, "head_rank": 2},
    "beside the anchor": {"beside_anchor": True},
    "sequences": {"privacy": {"unit": "sequence"}},
    "several windows": {"privacy": {"windows": 3}},
    "clipped for half, four at once": {"privacy": {"units_at_once": 4}},
    "low rank, several windows, three at once": {
        "rank": 3,
        "attention_rank": 2,
        "embedding_rank": 4,
        "head_rank": 5,
        "privacy": {"windows": 3, "units_at_once": 3, "clip_norm": 5.0},
    },
    "clipped for half": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_steps_gradient_is_the_sum_of_clipped_gradients_found_one_by_one(
    pico_anchor, pico_sets, kind
):
    data = pico_sets["maths"]
    made = prepared(pico_anchor, data, **KINDS[kind], seed=0)
    asked = recipe_of(**KINDS[kind]).privacy
    if "lora_b" in "".join(made.parameters):  # from zero, half of the factors have no gradient
        with torch.no_grad():
            for p in made.parameters.values():
                p.add_(0.05 * torch.randn_like(p))
    texts = texts_of(data, made.private, 0, asked.unit, asked.windows)
    assert len(texts) > 1
    assert all(0 < len(rows) < 300 for rows in made.private.closed.values())
    names = list(made.parameters)
    found = []
    for ids in texts:
        grads = torch.autograd.grad(
            language_model_loss(made.pair, ids), list(made.parameters.values())
        )
        grads = dict(zip(names, grads, strict=True))
        for n, rows in made.private.closed.items():
            grads[n] = grads[n].index_fill(0, rows, 0.0)
        found.append(grads)
    if kind.startswith("clipped for half"):
        norms = [norm_of(grads) for grads in found]
        made.private.clip_norm = float(np.median(norms))
        assert min(norms) < made.private.clip_norm < max(norms)
    expected = {n: torch.zeros_like(p) for n, p in made.parameters.items()}
    for grads in found:
        factor = min(1.0, made.private.clip_norm * (1 - ROUNDING) / norm_of(grads))
        for n, g in grads.items():
            expected[n] += factor * g
    nats, _ = compute_gradients(made.parameters, made.losses, 0, SETTINGS, made.private)
    assert nats > 0
    for n, p in made.parameters.items():
        torch.testing.assert_close(
            p.grad * SETTINGS.batch_size, expected[n], rtol=1e-4, atol=1e-5 * made.private.clip_norm
        )


def test_gradients_are_those_of_opacus_on_the_stock_model(pico_anchor, pico_anchor_dir, pico_sets):
    """An expert alone, with all rows open, begins as the anchor, which transformers can load."""
    from opacus.grad_sample import GradSampleModule
    from transformers import Olmo2ForCausalLM

    data = pico_sets["maths"]
    made = prepared(pico_anchor, data, privacy={"row_share": 0.0})
    assert not any(len(rows) for rows in made.private.closed.values())
    lengths = np.diff(unit_offsets(data, "document", SETTINGS.seq_len))
    long = np.flatnonzero(lengths >= SETTINGS.seq_len)[:6]
    made.private.choose = lambda step: long
    ids = torch.cat(texts_of(data, made.private, 0))  # [B,T+1]
    assert ids.shape == (6, SETTINGS.seq_len + 1)

    stock = Olmo2ForCausalLM.from_pretrained(pico_anchor_dir, attn_implementation="eager").float()
    stock.train()
    for p in stock.parameters():
        p.requires_grad_(p.dim() == 2)
    positions = torch.arange(SETTINGS.seq_len)[None].expand(len(ids), -1)  # [B,T]
    model = GradSampleModule(stock, strict=False, loss_reduction="sum")
    logits = model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")  # [B,T]
    losses.mean(1).sum().backward()
    samples = {n: p.grad_sample for n, p in stock.named_parameters() if p.requires_grad}
    norms = torch.stack([g.flatten(1).square().sum(1) for g in samples.values()]).sum(0).sqrt()
    factors = (made.private.clip_norm / norms).clamp(max=1.0)  # [B]
    compute_gradients(made.parameters, made.losses, 0, SETTINGS, made.private)
    for name, p in made.parameters.items():
        part = name.removesuffix(".weight")
        full = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}.get(part)
        if full is None:
            _, layer, matrix = part.split(".")
            room = "mlp" if matrix in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            full = f"model.layers.{layer}.{room}.{matrix}"
        found = torch.einsum("b,b...->...", factors, samples[f"{full}.weight"])
        torch.testing.assert_close(
            p.grad * SETTINGS.batch_size,
            found,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_units_gradient_among_others_has_the_bits_it_has_beside_any(
    pico_anchor, pico_sets, monkeypatch
):
    """Or the noise would have to cover more than the unit that comes or goes."""
    made = prepared(pico_anchor, pico_sets["maths"], privacy={"windows": 2, "units_at_once": 4})
    added = []
    monkeypatch.setattr(made.private, "add_each", lambda grads: added.append(grads))

    def gradients(units):
        added.clear()
        made.private.choose = lambda step: np.array(units)
        assert len(list(made.losses(0))) == len(units)
        return [{n: g[i] for n, g in group.items()} for group in added for i in range(4)]

    first = gradients([3, 7, 11, 13, 20])
    other = gradients([3, 11, 13, 20])  # 7 is gone: all after it have other places
    assert same(first[0], other[0])
    assert all(same(a, b) for a, b in zip(first[2:5], other[1:], strict=True))
    assert not same(first[1], other[1])
    assert not any(g.any() for last in first[5:] for g in last.values())


@pytest.mark.parametrize(
    ("vocab_size", "learnt", "size"), [(4096, 93_000, 16), (100_352, 93_000, 2), (4096, 10**9, 1)]
)
def test_a_group_on_a_gpu_is_what_its_memory_has_room_for(vocab_size, learnt, size):
    config = SimpleNamespace(document_mask=False, vocab_size=vocab_size)
    model = SimpleNamespace(trains_alone=True, device=torch.device("cuda"), config=config)
    settings = SETTINGS.model_copy(update={"seq_len": 128})
    assert choose_group(model, settings, 8, learnt, None) == size
    assert choose_group(model, settings, 8, learnt, 5) == 5
    model.device = torch.device("cpu")
    assert choose_group(model, settings, 8, learnt, None) == 1


def test_units_of_any_length_have_their_own_losses_and_gradients_at_once(pico_anchor, pico_sets):
    made = prepared(pico_anchor, pico_sets["maths"])
    made.private.clip_norm = 1e6
    shapes = [(1, 2), (3, 17), (2, 17), (1, 9), (1, 17)]
    generator = np.random.default_rng(0)
    units = [generator.integers(0, 300, shape) for shape in shapes]
    losses = in_groups(
        lambda step: iter(units), 2, 3, SETTINGS, made.private, made.pair, made.parameters
    )
    found = torch.stack(list(losses(0)))
    own = [language_model_loss(made.pair, torch.from_numpy(ids)) for ids in units]
    torch.testing.assert_close(found, torch.stack(own).detach())
    made.private.finish(made.parameters, 0)
    grads = torch.autograd.grad(sum(own), list(made.parameters.values()))
    for (n, p), g in zip(made.parameters.items(), grads, strict=True):
        if n not in made.private.closed:
            torch.testing.assert_close(p.grad * SETTINGS.batch_size, g, rtol=1e-3, atol=1e-4)


def test_several_at_once_are_refused_where_a_units_gradient_cannot_be_told(pico_anchor, pico_sets):
    with pytest.raises(ConfigError, match="beside_anchor"):
        prepared(pico_anchor, pico_sets["maths"], beside_anchor=True, privacy={"units_at_once": 4})


def make_toy(clip_norm=0.5, noise=0.0, rate=0.5, num_units=40):
    parameters = {
        "embed": nn.Parameter(torch.ones(5, 4)),
        "layers.0.up": nn.Parameter(torch.ones(6, 4)),
    }
    private = PrivateSteps(num_units, rate, noise, clip_norm)

    def losses(step):
        for unit in private.choose(step).tolist():
            g = torch.Generator().manual_seed(unit)
            x = torch.randn(3, 5, generator=g) @ parameters["embed"]
            yield (x @ parameters["layers.0.up"].T).square().mean() * 10.0 ** (unit % 7 - 3)

    return parameters, losses, private


def test_the_loss_of_a_step_is_the_mean_over_the_units_read():
    parameters, losses, private = make_toy()
    private.open(None, "identity", False)
    expected = torch.stack(list(losses(0))).mean().item()
    assert compute_gradients(parameters, losses, 0, SETTINGS, private)[0] == pytest.approx(expected)
    private.choose = lambda step: np.zeros(0, np.int64)
    assert compute_gradients(parameters, losses, 1, SETTINGS, private)[0] is None


def test_a_step_that_reads_nobody_has_no_loss_in_the_runs_metrics(tmp_path):
    parameters, losses, private = make_toy(noise=1.0)
    draw = private.choose
    private.choose = lambda step: draw(step) if step in (1, 4) else np.zeros(0, np.int64)
    settings = SETTINGS.model_copy(update={"steps": 5, "warmup_steps": 0})
    result = train(parameters, losses, settings, tmp_path, "test", {}, {}, private)
    found = read_json(tmp_path / "metrics.json")["loss_nats"]
    assert found == result.losses_nats
    assert [x is None for x in found] == [True, False, True, True, False]
    assert found[1] > 0 and found[4] > 0


def without(data, place):
    """The set without the source document `place` of its training text."""
    split = data.splits["train"]
    start, end = split.source_offsets[place : place + 2]
    is_kept = split.sources != place
    sizes = np.diff(split.offsets)[is_kept]
    sources = split.sources[is_kept]
    rest = replace(
        split,
        tokens=np.delete(split.tokens, slice(start, end)),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        bytes=split.bytes[is_kept],
        sources=sources - (sources > place),
    )
    return replace(data, splits={**data.splits, "train": rest})


def read_every(data):
    """Functions in place of `choose` and `draw`: all documents, numbers that follow from each one's
    text."""
    split = data.splits["train"]
    texts = np.split(split.tokens, split.source_offsets[1:-1])

    def draw(step, unit, count):
        return np.frombuffer(hashlib.shake_128(texts[unit].tobytes()).digest(8 * count), np.uint64)

    return lambda step: np.arange(len(texts)), draw


@pytest.mark.parametrize("place", [0, 3, 20])
@pytest.mark.parametrize("kind", ["several windows", "low rank, several windows, three at once"])
def test_a_document_less_moves_a_whole_step_by_its_own_clipped_gradient(
    pico_anchor, pico_sets, kind, place
):
    """All others get the same random draws here, whatever their places in the set; real draws are
    alike at every place."""
    data = pico_sets["maths"]
    both = [data, without(data, place)]
    made = [prepared(pico_anchor, x, **KINDS[kind], seed=0) for x in both]
    sums = []
    for x, run in zip(both, made, strict=True):
        run.private.closed = made[0].private.closed  # of one table, a release of its own
        run.private.clip_norm = 0.01  # so all are clipped
        run.private.choose, run.private.draw = read_every(x)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # from zero, half of the factors have no gradient
            for p in run.parameters.values():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        compute_gradients(run.parameters, run.losses, 0, SETTINGS, run.private)
        sums.append({n: p.grad * SETTINGS.batch_size for n, p in run.parameters.items()})
    moved = norm_of({n: g - sums[1][n] for n, g in sums[0].items()})
    assert moved == pytest.approx(0.01, rel=0.01)


def test_no_unit_moves_the_sum_by_more_than_the_clipping_norm():
    """With and without each unit, however steep its loss."""
    parameters, losses, private = make_toy()
    private.open(None, "identity", False)
    everybody = np.arange(private.num_units)

    def sum_without(left_out):
        private.choose = lambda step: everybody[everybody != left_out]
        compute_gradients(parameters, losses, 0, SETTINGS, private)
        total = torch.cat([p.grad.flatten() for p in parameters.values()]).double()
        for p in parameters.values():
            p.grad = None
        return total * private.rate * private.num_units

    whole = sum_without(-1)
    moves = [(whole - sum_without(unit)).norm().item() for unit in everybody]
    assert max(moves) <= private.clip_norm
    assert max(moves) > 0.99 * private.clip_norm > min(moves)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_a_unit_without_a_finite_gradient_counts_as_none(at_once, bad):
    """Or whether training ends would depend on one unit; 3e38 has a square that is infinite."""
    parameters, _, private = make_toy()
    private.open(None, "identity", False)
    real = {n: torch.ones_like(p) for n, p in parameters.items()}
    wrong = {n: g.clone() for n, g in real.items()}
    wrong["embed"][2, 1] = bad
    if at_once:
        private.add_each({n: torch.stack([wrong[n], real[n], wrong[n]]) for n in real})
    for grads in () if at_once else (wrong, real, wrong):
        for n, p in parameters.items():
            p.grad = grads[n].clone()
        private.add(parameters)
    private.finish(parameters, 0)
    total = torch.cat([p.grad.flatten() for p in parameters.values()]) * private.rate * 40
    torch.testing.assert_close(
        total, torch.full_like(total, 0.5 / len(total) ** 0.5), rtol=1e-3, atol=0
    )


def test_only_units_with_a_finite_loss_are_in_the_mean():
    parameters, losses, private = make_toy()
    private.open(None, "identity", False)
    own = list(losses(0))

    def with_bad(step):
        yield from losses(step)
        yield parameters["embed"].sum() * torch.nan

    found = compute_gradients(parameters, with_bad, 0, SETTINGS, private)
    assert found[0] == pytest.approx(torch.stack(own).mean().item()) and np.isfinite(found[1])
    private.choose = lambda step: np.zeros(0, np.int64)
    nats, norm = compute_gradients(parameters, with_bad, 1, SETTINGS, private)
    assert nats is None and np.isfinite(norm)


def test_a_run_whose_only_unit_has_no_loss_goes_on_and_one_whose_weights_are_lost_ends(tmp_path):
    parameters, _, private = make_toy(noise=1.0)

    def lost(step):
        yield parameters["embed"].sum() * torch.nan

    settings = SETTINGS.model_copy(update={"steps": 3})
    result = train(parameters, lost, settings, None, "toy", {}, {}, private)
    assert result.losses_nats == [None] * 3
    with torch.no_grad():
        parameters["embed"][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="not all weights are finite"):
        train(parameters, lost, settings, None, "toy", {}, {}, private)


# --- noise and sampling -------------------------------------------------------------------------


def test_noise_is_normal_of_the_deviation_that_was_asked_for():
    """Also where nobody is read, and of another draw in each step. False alarm: 1 in 10^6."""
    parameters = {"embed": nn.Parameter(torch.zeros(300, 200))}
    private = PrivateSteps(50, 0.1, 3.0, 0.5)
    private.open(None, "identity", False)
    drawn = []
    for step in range(2):
        private.finish(parameters, step)
        drawn.append(parameters["embed"].grad.flatten().double() * 0.1 * 50 / (3.0 * 0.5))
    assert kstest(torch.cat(drawn).numpy(), "norm").pvalue > 1e-6
    assert abs(torch.corrcoef(torch.stack(drawn))[0, 1]) < 0.03


def test_rows_that_do_not_learn_get_neither_gradient_nor_noise():
    parameters, losses, private = make_toy(noise=1.0)
    private.closed = {"embed": torch.tensor([1, 4])}
    private.open(None, "identity", False)
    compute_gradients(parameters, losses, 0, SETTINGS, private)
    assert parameters["embed"].grad.any(1).tolist() == [True, False, True, True, False]
    assert parameters["layers.0.up"].grad.all()


def test_a_gradient_lies_in_memory_as_its_parameter_does():
    """Fused optimizers go through both in the order of memory."""
    weight = nn.Parameter(torch.zeros(3, 5).T)
    private = PrivateSteps(10, 0.5, 1.0, 1.0)
    private.open(None, "identity", False)
    private.finish({"layers.0.up": weight}, 0)
    assert weight.grad.stride() == weight.stride() == (1, 5)


def test_each_unit_is_read_with_its_chance_and_apart_from_the_others():
    """False alarms: 1 in 10^6 each."""
    private = PrivateSteps(400, 0.2, 1.0, 1.0)
    private.open(None, "identity", False)
    read = np.zeros((300, 400), dtype=int)
    for step in range(300):
        read[step, private.choose(step)] = 1
    assert binomtest(int(read.sum()), read.size, 0.2).pvalue > 1e-6
    sizes = read.sum(1)
    assert 30 < sizes.var() < 110  # 64 if units are apart, 0 if the number is fixed
    both = (read[:, :-1] & read[:, 1:]).sum()
    assert binomtest(int(both), read[:, 1:].size, 0.04).pvalue > 1e-6


def test_no_seed_gives_noise_or_sample_again():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        private = PrivateSteps(1000, 0.5, 1.0, 1.0)
        private.open(None, "identity", False)
        found.append((private.choose(0).tolist(), private.draw(0, 3, 4).tolist()))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_no_seed_says_which_windows_of_a_unit_are_read(pico_anchor, pico_sets):
    """Another run and another step read others; one run the same ones again, as it must after a
    kill."""
    asked = {"privacy": {"windows": 2}}
    first, second = (prepared(pico_anchor, pico_sets["maths"], **asked, seed=5) for _ in range(2))
    read = [
        [t.tolist() for t in texts_of(pico_sets["maths"], made.private, step, windows=2)]
        for made, step in ((first, 0), (first, 0), (first, 1), (second, 0))
    ]
    assert read[0] == read[1]
    for other in read[2:]:
        alike = [a == b for a, b in zip(read[0], other, strict=True) if len(a) > 1]
        assert len(alike) > 3 and sum(alike) < len(alike) / 2


def test_numbers_drawn_for_a_unit_are_even_and_of_its_own():
    """False alarm: 1 in 10^6 each."""
    private = PrivateSteps(40, 0.5, 1.0, 1.0)
    private.open(None, "identity", False)
    drawn = np.array([private.draw(s, u, 25) for s in range(20) for u in range(20)]) / 2.0**64
    assert kstest(drawn.flatten(), "uniform").pvalue > 1e-6
    assert len(np.unique(drawn)) == drawn.size


# --- runs that are killed -----------------------------------------------------------------------


def run_toy(run_dir, identity=None, stop=None, steps=5):
    parameters, losses, private = make_toy(noise=1.0)

    def until(step):
        if step == stop:
            raise KeyboardInterrupt
        return losses(step)

    settings = SETTINGS.model_copy(update={"steps": steps})
    train(parameters, until, settings, run_dir, "toy", identity or {"seed": 0}, {}, private)
    return {n: p.detach() for n, p in parameters.items()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_a_killed_run_takes_the_steps_again_that_were_lost(tmp_path, monkeypatch):
    """Noise given twice is the same noise, so it tells no more than once."""
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "a", stop=0)
    assert stat.S_IMODE((tmp_path / "a" / KEY_FILE).stat().st_mode) == 0o600
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = run_toy(tmp_path / "b")
    for stop in (1, 3):
        with monkeypatch.context() as patch:
            if stop == 3:  # killed after two steps that no checkpoint holds
                patch.setattr(loop, "_save", lambda *args: None)
            with pytest.raises(KeyboardInterrupt):
                run_toy(tmp_path / "a", stop=stop)
    assert same(run_toy(tmp_path / "a"), whole)
    assert not same(run_toy(tmp_path / "c"), whole)


def test_the_key_goes_when_the_run_ends_and_the_run_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    whole = run_toy(tmp_path)
    assert read_json(tmp_path / "progress")["text"].startswith("30/30 unit, ")
    assert not (tmp_path / KEY_FILE).exists()
    assert same(run_toy(tmp_path), whole)
    with pytest.raises(CheckpointError, match="another recipe"):
        run_toy(tmp_path, identity={"seed": 0, "steps": 9}, steps=9)


@pytest.mark.parametrize("content", [None, b"", b"x" * 31])
def test_a_run_that_lost_its_key_does_not_go_on(tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, stop=2)
    (tmp_path / KEY_FILE).unlink()
    if content is not None:
        (tmp_path / KEY_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        run_toy(tmp_path)


def test_one_key_gives_another_run_other_noise(tmp_path):
    """Or what the two give away together would show the gradients."""
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, stop=2)
    (tmp_path / CHECKPOINT).unlink()
    shutil.copytree(tmp_path, tmp_path / "other")
    first = run_toy(tmp_path)
    assert not same(first, run_toy(tmp_path / "other", identity={"seed": 1}))
