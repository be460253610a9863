"""Rules that keep requests' experts apart in vLLM, tried without it."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, PolicyError
from flexolmo_vllm import LOAD_FORMAT, SCHEDULER, WORKER
from flexolmo_vllm.admission import enabled_by, refuse_unsafe, salt_of

KNOWN = ("amber", "basalt", "zinc")
SETS = st.frozensets(st.sampled_from(KNOWN))


@given(SETS)
def test_named_experts_are_enabled_and_no_others(names):
    assert enabled_by({"experts": sorted(names)}, KNOWN) == names


@pytest.mark.parametrize("arguments", [None, {}, {"experts": []}])
def test_without_names_nothing_is_enabled(arguments):
    assert enabled_by(arguments, KNOWN) == frozenset()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            {"experts": ["amber", "gold"]},
            "Unknown expert gold: the model holds amber, basalt, zinc",
        ),
        ({"experts": "amber"}, "expected a list of names"),
        ({"experts": [3]}, "expected a list of names"),
        ({"experts": None}, "expected a list of names"),
        ({"experts": ["amber"], "kv_transfer_params": {}}, "extra argument kv_transfer_params"),
        ({"Experts": ["amber"]}, "extra argument Experts"),
    ],
)
def test_what_enables_nothing_that_is_known_is_an_error(arguments, words):
    with pytest.raises(PolicyError, match=words):
        enabled_by(arguments, KNOWN)


@given(SETS, SETS, st.sampled_from("ab"), st.sampled_from("ab"))
def test_salts_are_equal_for_one_model_and_one_set_alone(one, other, model, another):
    is_same = one == other and model == another
    assert (salt_of(model, one) == salt_of(another, sorted(other, reverse=True))) == is_same


def config(**changes):
    """A configuration of vLLM's that is safe, but for `changes` by a setting's path."""
    made = SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER, async_scheduling=False),
        parallel_config=SimpleNamespace(
            worker_cls=WORKER,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
        ),
        load_config=SimpleNamespace(load_format=LOAD_FORMAT),
        model_config=SimpleNamespace(
            enforce_eager=True, enable_prompt_embeds=False, quantization=None
        ),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=False),
        device_config=SimpleNamespace(device_type="cpu"),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
    )
    for path, value in changes.items():
        *rooms, name = path.split("__")
        room = made
        for one in rooms:
            room = getattr(room, one)
        setattr(room, name, value)
    return made


def test_our_own_arguments_are_safe():
    refuse_unsafe(config())


def test_an_engine_that_vllm_puts_into_a_process_of_its_own_is_refused(monkeypatch):
    """Its own HTTP server does, in front of which is no gateway."""
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    with pytest.raises(ConfigError, match="a process of its own"):
        refuse_unsafe(config())


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("scheduler_config__scheduler_cls", None, "scheduler_cls is not"),
        ("scheduler_config__scheduler_cls", SimpleNamespace, "scheduler_cls is not"),
        ("scheduler_config__async_scheduling", True, "async_scheduling is on"),
        ("parallel_config__worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker", "worker_cls is not"),
        ("parallel_config__tensor_parallel_size", 2, "spread over processes"),
        ("parallel_config__pipeline_parallel_size", 2, "spread over processes"),
        ("parallel_config__data_parallel_size", 2, "spread over processes"),
        ("load_config__load_format", "auto", "load_format is not"),
        ("model_config__enforce_eager", False, "enforce_eager is off"),
        ("model_config__enable_prompt_embeds", True, "embeddings"),
        ("model_config__quantization", "fp8", "quantization"),
        ("aux_output_config__enable_return_routed_experts", True, "return_routed_experts is on"),
        ("device_config__device_type", "cuda", "not the CPU"),
        ("speculative_config", object(), "speculative decoding"),
        ("kv_transfer_config", object(), "other processes"),
        ("lora_config", object(), "LoRA"),
    ],
)
def test_a_start_that_would_mix_up_experts_is_refused(path, value, words):
    with pytest.raises(ConfigError, match=words):
        refuse_unsafe(config(**{path: value}))
