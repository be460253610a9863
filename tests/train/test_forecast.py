"""What a training takes is counted from the program that trains."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flexolmo.config import RECIPES, read_recipe
from flexolmo.errors import ConfigError
from flexolmo.model.assemble import expert_tensors
from flexolmo.model.loss import language_model_loss
from flexolmo.model.router import DiscriminantSettings, LinearSettings
from flexolmo.model.shape import count_anchor
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.train import count as counting
from flexolmo.train import measure
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.count import StepProgram, Work, count_step
from flexolmo.train.expert import ExpertRecipe, pack_tensors
from flexolmo.train.forecast import (
    bundle_bytes,
    find_memory,
    forecast,
    parse_gpus,
    replaced_parameters,
    trained_parameters,
)
from flexolmo.train.loop import TrainSettings
from flexolmo.train.measure import Timed, fit_machine, timed_recipes
from flexolmo.train.rates import GPUS, NETWORK_BYTES, Machine, find_machine, read_machine, time_step

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PICO = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, d_ff=48, max_seq_len=32)
TRAIN = TrainSettings(steps=10, batch_size=4, seq_len=16, warmup_steps=2, optimizer="adamw")
KINDS = {
    "anchor": AnchorRecipe(train=TRAIN),
    "whole": ExpertRecipe(train=TRAIN),
    "paper": ExpertRecipe(scope="ffn", router=LinearSettings(), train=TRAIN),
    "low rank": ExpertRecipe(rank=4, attention_rank=4, embedding_rank=4, head_rank=4, train=TRAIN),
    "low rank of the paper's": ExpertRecipe(
        scope="ffn", rank=4, router=LinearSettings(), train=TRAIN
    ),
    "ffn": ExpertRecipe(scope="ffn", train=TRAIN),
}


@cache
def count_of(kind, processes=1, **changes):
    """Counts of a step of PICO, which several tests look at; `changes` are of the training."""
    train = TRAIN.model_copy(update=changes)
    return count_step(PICO, KINDS[kind].model_copy(update={"train": train}), processes)


def test_products_of_a_dense_step_are_six_a_number_and_token_and_attention():
    c, tokens = PICO, TRAIN.batch_size * TRAIN.seq_len
    matrices = c.num_layers * (4 * c.d_model**2 + 3 * c.d_model * c.d_ff)
    matrices += c.vocab_size * c.d_model
    scores = 7 * TRAIN.seq_len * c.d_model * c.num_layers  # a token, half of them masked
    found = count_step(c, KINDS["anchor"])
    assert found.part.flops == tokens * (6 * matrices + scores)
    assert found.update.flops == 0


def test_products_by_another_library_are_counted_like_torchs(monkeypatch):
    kinds = ("anchor", "whole", "low rank")
    torchs = [count_of(kind).part.flops for kind in kinds]
    monkeypatch.setattr("flexolmo.model.onednn.IS_FASTER", True)
    monkeypatch.setattr("flexolmo.model.onednn.MANY_PRODUCTS", 0)
    assert [count_step(PICO, KINDS[kind]).part.flops for kind in kinds] == torchs


def test_products_are_those_that_torch_counts_of_a_real_step():
    model = Transformer(PICO).train()
    model.initialise(0)
    with FlopCounterMode(display=False) as theirs:
        language_model_loss(model, torch.zeros(4, 17, dtype=torch.long)).backward()
    attention = 7 * 4 * 16 * 16 * 32 * 2  # this and the next torch's counter lacks
    head = 2 * 64 * 64 * 32  # a product that is added in place
    found = count_of("anchor").part.flops
    assert found == theirs.get_total_flops() + attention + head


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_runs(kind):
    program = StepProgram(PICO, KINDS[kind])
    program.model.initialise(0)
    before = {n: p.detach().clone() for n, p in program.parameters.items()}
    program.read(4)
    program.update()
    assert any(not torch.equal(before[n], p) for n, p in program.parameters.items())
    assert count_of(kind).learnt_bytes == 4 * sum(map(torch.numel, before.values()))


def test_layers_that_were_not_counted_follow(monkeypatch):
    deep = PICO.model_copy(update={"num_layers": 5})
    told = count_step(deep, KINDS["paper"])
    monkeypatch.setattr(counting, "COUNTED_LAYERS", (2, 5))
    for one, other in zip(flat(told), flat(count_step(deep, KINDS["paper"])), strict=True):
        assert one == pytest.approx(other, rel=0.02)


def flat(found):
    values = vars(found).values()
    return [x for v in values for x in (vars(v).values() if isinstance(v, Work) else [v])]


def test_parts_and_processes_share_a_step_and_recomputing_spares_memory():
    base = count_of("anchor")
    half = count_of("anchor", accumulate=2)
    assert half.part.flops == base.part.flops / 2
    assert count_of("anchor", 2).part.flops == base.part.flops / 2
    found = count_of("anchor", recompute=True)
    assert found.part.flops > base.part.flops
    assert found.part_peak_bytes < base.part_peak_bytes
    both = find_memory(count_of("anchor", 2), GPUS["H100"], 2)
    one = find_memory(base, GPUS["H100"], 1)
    assert both.weights == one.weights / 2
    assert both.optimizer == one.optimizer / 2


@pytest.mark.parametrize("kind", ["anchor", "ffn"])
def test_each_process_gathers_the_head_two_blocks_and_the_gradients_of_two(kind):
    head = PICO.vocab_size * PICO.d_model + PICO.d_model  # with the last norm
    embedding = PICO.vocab_size * PICO.d_model
    block = (count_anchor(PICO) - head - embedding) // PICO.num_layers
    learnt = block
    if kind == "ffn":
        learnt = 3 * PICO.d_model * PICO.d_ff
        block += learnt
    counted = count_of(kind, 4)
    found = find_memory(counted, GPUS["H100"], 4, anchor_bytes=1e9)
    assert found.gathered == 4 * 3 / 4 * (head + 2 * block + 2 * learnt)
    assert found.anchor == 0  # its pages are those of its file
    alone = find_memory(counted, GPUS["H100"], 1, anchor_bytes=1e9)
    assert (alone.gathered, alone.anchor) == (0, 1e9)


def test_processes_share_the_update_and_wait_for_what_work_does_not_hide():
    counted = count_of("anchor")
    second = Work(float32_flops=1e12, moved_bytes=1e10)  # and another, of a second each
    counted = replace(counted, part=second, update=second, weight_bytes=4e12, learnt_bytes=2e12)
    machine = Machine(name="mine", source="me", float32_flops=1e12, moved_bytes=1e10, per_node=8)
    told = time_step(counted, machine, accumulate=3, processes=4)
    assert (told.products, told.rest, told.update, told.waiting) == (3, 3, 2 / 4, 0)
    sent = 3 * (2 * 4e12 + 2e12)  # of which each process has a part
    for link_bytes, processes, waiting in [
        (1e12, 4, 3 / 4 * sent / 1e12 - 6),
        (1e13, 4, 0),
        (1e12, 16, 15 / 16 * sent / NETWORK_BYTES - 6),
        (1e11, 16, 15 / 16 * sent / 1e11 - 6),
    ]:
        linked = machine.model_copy(update={"link_bytes": link_bytes})
        told = time_step(counted, linked, accumulate=3, processes=processes)
        assert told.waiting == pytest.approx(waiting)


def test_rates_are_found_again_from_steps_that_they_made():
    rates = GPUS["A100"]
    timed = []
    for kind in ("anchor", "paper"):
        for optimizer in ("adamw", "muon"):
            found = count_of(kind, optimizer=optimizer)
            timed.append(Timed(found, time_step(found, rates).total))
    fitted = fit_machine(timed)
    assert fitted.float32_flops == pytest.approx(rates.float32_flops, rel=1e-3)
    assert fitted.moved_bytes == pytest.approx(rates.moved_bytes, rel=1e-3)


def test_bfloat16_is_timed_where_it_is_offered_and_else_unknown(monkeypatch):
    monkeypatch.setattr(measure, "product_dtype", lambda device: torch.bfloat16)
    halves = [n for n, r in timed_recipes().items() if r.train.precision == "bfloat16"]
    assert halves == ["anchor, bfloat16"]
    monkeypatch.setattr(measure, "product_dtype", lambda device: torch.float32)
    assert halves[0] not in timed_recipes()
    whole = [count_of(kind) for kind in ("anchor", "paper")]
    half = count_of("anchor", precision="bfloat16")
    timed = [Timed(c, time_step(c, GPUS["A100"]).total) for c in (*whole, half)]
    fitted = fit_machine(timed)
    assert fitted.bfloat16_flops == pytest.approx(GPUS["A100"].bfloat16_flops, rel=1e-3)
    unknown = fit_machine(timed[:2])
    assert unknown.bfloat16_flops is None
    assert time_step(whole[0], unknown).total > 0
    with pytest.raises(ConfigError, match=r"train\.precision=float32"):
        time_step(half, unknown)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_muons_products_are_those_of_the_machine_that_is_planned_for(monkeypatch, has_bfloat16):
    here = torch.float32 if has_bfloat16 else torch.bfloat16  # the other
    monkeypatch.setattr("flexolmo.train.muon.product_dtype", lambda device: here)
    machine = GPUS["H100"]
    if not has_bfloat16:
        machine = machine.model_copy(update={"bfloat16_flops": None})
    recipe = AnchorRecipe(train=TRAIN.model_copy(update={"optimizer": "muon"}))
    update = count_step(PICO, recipe, muon_dtype=machine.muon_dtype).update
    flops = update.bfloat16_flops if has_bfloat16 else update.float32_flops
    assert flops == update.flops > 0
    rate = machine.bfloat16_flops or machine.float32_flops
    moved = update.moved_bytes / machine.moved_bytes
    told = forecast(recipe, PICO, machine)
    assert told.step.update == pytest.approx(flops / rate + moved)


@pytest.mark.parametrize("value", ["0", "-1", "1e-300", "1e400", "NaN", "Infinity", "-Infinity"])
def test_machines_that_cannot_be_are_refused(tmp_path, value):
    good = Machine(name="mine", source="me", float32_flops=1e12, moved_bytes=1e10)
    path = tmp_path / "machine.json"
    for field in ("float32_flops", "bfloat16_flops", "moved_bytes", "link_bytes", "memory_bytes"):
        if (field, value) == ("memory_bytes", "1e-300"):
            continue  # little memory is only little
        values = good.model_dump() | {field: "here"}
        path.write_text(json.dumps(values).replace('"here"', value))
        with pytest.raises(ConfigError, match=r"machine\.json"):
            read_machine(path)


def test_the_slowest_machine_and_the_fastest_give_a_time():
    for rate in (1e3, 1e21):
        given = dict.fromkeys(
            ("float32_flops", "bfloat16_flops", "moved_bytes", "link_bytes"), rate
        )
        told = forecast(KINDS["paper"], PICO, Machine(name="mine", source="me", **given), 2)
        assert 0 < told.seconds < math.inf
        assert told.tokens_a_second > 0


def test_memory_near_the_machines_is_close():
    told = forecast(KINDS["anchor"], PICO, GPUS["H100"])
    for part, answer in [(0.79, "yes"), (0.81, "close"), (1.19, "close"), (1.21, "no")]:
        room = told.memory.total / part
        machine = told.machine.model_copy(update={"memory_bytes": room})
        assert replace(told, machine=machine).fits == answer


def test_rates_of_an_h100_give_back_the_step_that_was_measured_on_one():
    found = json.loads((RESULTS / "gpu.json").read_text())["65,536 tokens"]
    about, case = found["about"], found["all"]
    tokens = about["parts"] * about["part"][0] * about["part"][1]
    flops = case["flops_a_token"] * tokens / about["parts"]
    part = Work(bfloat16_flops=flops, moved_bytes=case["plan"]["moved_bytes"])
    counted = replace(count_of("anchor"), part=part, update=Work())
    told = time_step(counted, GPUS["H100"], about["parts"]).total
    measured = (case["ms"]["forward"] + case["ms"]["backward"]) / 1000
    assert told == pytest.approx(measured, rel=0.02)


def test_time_that_work_does_not_explain_is_refused():
    found = count_of("anchor")
    with pytest.raises(ConfigError, match="idle"):
        fit_machine([Timed(found, 1.0)])


def test_the_papers_sizes_are_the_papers():
    """2.97B outside the FFN and 4.33B in an expert; bundles of 8.7 GB in bfloat16, ours a tenth."""
    from flexolmo.model.stock import StockConfig, read_stock_config

    config = read_stock_config(RECIPES / "paper" / "olmo2_7b", StockConfig).decoder
    assert count_anchor(config) == pytest.approx((2.97 + 4.33) * 1e9, rel=0.002)
    paper = read_recipe(RECIPES / "paper" / "expert.toml", ExpertRecipe)
    few = {"batch_size": 8, "accumulate": 1, "steps": 128 * paper.train.steps}  # a part is a step
    part = paper.model_copy(update={"train": paper.train.model_copy(update=few)})
    told = forecast(part, config, GPUS["H100"], 8, "bfloat16", price_an_hour=2.0)
    assert told.tokens == pytest.approx(50e9, rel=1e-3)
    assert told.bundle_bytes == pytest.approx(8.66e9, rel=0.005)
    assert told.trained_parameters == pytest.approx(4.33e9, rel=0.002)
    # four FLOPs for what is frozen, six for what learns, as by hand
    frozen = 32 * 4 * 4096**2 + 4.33e9 + 100352 * 4096
    scores = 7 * 4096 * 4096 * 32
    assert told.flops_a_token == pytest.approx(4 * frozen + 6 * 4.33e9 + scores, rel=0.02)
    assert 3_000 < told.tokens_a_second / 8 < 10_000
    assert told.cost == pytest.approx(8 * 2.0 * told.seconds / 3600)
    small = read_recipe(RECIPES / "paper" / "expert_low_rank.toml", ExpertRecipe)
    shapes = small.shape(config)
    assert shapes.head_rank == shapes.rank == 128
    anchor = read_recipe(RECIPES / "paper" / "anchor.toml", AnchorRecipe)
    assert anchor.train.tokens == pytest.approx(1e12, rel=1e-3)


def test_an_anchor_has_as_many_numbers_as_told():
    for config in (PICO, PICO.model_copy(update={"num_kv_heads": 1})):
        with torch.device("meta"):
            model = Transformer(config)
        assert count_anchor(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "anchor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_half_deltas", [True, False])
def test_a_bundle_has_as_many_bytes_as_told(kind, dtype, has_half_deltas):
    recipe = KINDS[kind].model_copy(update={"has_half_deltas": has_half_deltas})
    program = StepProgram(PICO, recipe, dtype)
    packed = pack_tensors(expert_tensors(program.model, "expert"), recipe)
    assert bundle_bytes(PICO, recipe, dtype) == sum(t.nbytes for t in packed.values())
    assert trained_parameters(PICO, recipe) == sum(p.numel() for p in program.parameters.values())


def test_whole_matrices_take_the_anchors_place_where_it_takes_no_part():
    ffn = PICO.num_layers * 3 * PICO.d_model * PICO.d_ff
    embedding = head = PICO.vocab_size * PICO.d_model
    attention = PICO.num_layers * 4 * PICO.d_model**2
    alone = {"beside_anchor": False}
    for kind, changed, replaced in [
        ("whole", {}, embedding + attention + ffn + head),
        ("whole", {"head_rank": 4}, embedding + attention + ffn),
        ("ffn", alone, ffn),
        ("ffn", alone | {"width": 2 * PICO.d_ff}, ffn),
        ("ffn", {}, 0),
        ("paper", {}, 0),
        ("low rank", {}, 0),
    ]:
        recipe = KINDS[kind].model_copy(update=changed)
        assert replaced_parameters(PICO, recipe) == replaced
    told = forecast(KINDS["whole"], PICO, GPUS["H100"])
    assert told.active_parameters == count_anchor(PICO) < told.parameters


@pytest.mark.parametrize("text", ["H100", "0xH100", "8", "8xB9", "-1xH100", ""])
def test_gpus_that_are_not_understood_are_refused(text):
    with pytest.raises(ConfigError, match=r"--gpus|not in the table"):
        find_machine(parse_gpus(text)[1])


def test_what_depends_on_the_text_is_refused():
    recipe = ExpertRecipe(scope="ffn", router=DiscriminantSettings(), train=TRAIN)
    with pytest.raises(ConfigError, match="expert train --plan"):
        count_step(PICO, recipe)
    with pytest.raises(ConfigError, match="multiple of 3"):
        count_of("anchor", 3)
