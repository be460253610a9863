"""The plug-in in vLLM itself, asked by a client that may send what it likes. Needs vLLM."""

import pytest
import torch

from flexolmo.errors import ConfigError, PolicyError
from flexolmo.inference.opening import Opening
from made_vllm import EOS, NAMES, SETS, needs_vllm, prompts

pytestmark = needs_vllm
PROMPT = [EOS, *range(1, 100)]


@pytest.fixture(scope="module")
def arguments(house, trust_dir, tmp_path_factory):
    """Arguments of vLLM's for a mixture with the paper's router."""
    from flexolmo_vllm.arguments import engine_arguments

    model = house.mixture_dir(NAMES, "linear")
    opening = Opening(model=model, trust=trust_dir, memory_bytes=32 << 20)
    return engine_arguments(opening, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def vllm(arguments):
    """vLLM, running the mixture."""
    from vllm import LLM

    return LLM(**arguments)


@pytest.fixture
def ask(vllm):
    """`ask(prompt, extra_args, cache_salt)`: tokens, their log-probabilities, and how many of the
    prompt were cached."""
    from vllm import SamplingParams

    def ask(prompt=PROMPT, extra_args=None, cache_salt=None):
        parameters = SamplingParams(
            temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, extra_args=extra_args
        )
        text = {"prompt_token_ids": prompt}
        if cache_salt is not None:
            text["cache_salt"] = cache_salt
        (found,) = vllm.generate(text, parameters, use_tqdm=False)
        (written,) = found.outputs
        logs = [own[t].logprob for own, t in zip(written.logprobs, written.token_ids, strict=True)]
        return list(written.token_ids), logs, found.num_cached_tokens

    return ask


def test_mixed_requests_are_answered_as_by_a_model_of_their_experts_alone(vllm, house):
    from vllm import SamplingParams

    jobs = list(zip(prompts(24), SETS[1::4] * 3, strict=True))
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=16,
            ignore_eos=True,
            logprobs=0,
            extra_args={"experts": list(names)},
        )
        for _, names in jobs
    ]
    texts = [{"prompt_token_ids": prompt} for prompt, _ in jobs]
    found = vllm.generate(texts, parameters, use_tqdm=False)
    for (prompt, names), one in zip(jobs, found, strict=True):
        tokens = list(one.outputs[0].token_ids)
        alone = house.mixture(names, "linear").model
        logs = alone(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logs.argmax(-1).tolist() == tokens
        for own, token, likeliest in zip(logs, tokens, one.outputs[0].logprobs, strict=True):
            assert abs(float(own[token]) - likeliest[token].logprob) < 1e-3


def test_a_clients_salt_is_dropped(ask):
    sets = [["amber"], ["zinc"], ["amber", "zinc"], []]
    first = [ask(extra_args={"experts": names}, cache_salt="mine") for names in sets]
    assert [cached for *_, cached in first] == [0] * len(sets)
    again = [ask(extra_args={"experts": names}, cache_salt="other") for names in sets]
    assert all(cached >= 64 for *_, cached in again)
    assert [tokens for tokens, *_ in again] == [tokens for tokens, *_ in first]
    assert len({tuple(tokens) for tokens, *_ in first}) > 1


def test_without_names_nothing_is_enabled(ask):
    nobody = ask(extra_args={"experts": []})[:2]
    assert ask()[0] == nobody[0] and ask()[1] == pytest.approx(nobody[1], abs=1e-4)
    assert ask()[0] != ask(extra_args={"experts": list(NAMES)})[0]


@pytest.mark.parametrize(
    "wrong", [{"experts": ["gold"]}, {"experts": "amber"}, {"kv_transfer_params": {}}]
)
def test_what_enables_nothing_known_is_an_error_and_the_engine_goes_on(vllm, ask, wrong):
    from vllm import SamplingParams

    with pytest.raises(PolicyError):
        vllm.llm_engine.add_request(
            "wrong", {"prompt_token_ids": PROMPT}, SamplingParams(extra_args=wrong)
        )
    vllm.llm_engine.abort_request(["wrong"])
    assert len(ask(prompts(1)[0])[0]) == 8


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scheduler_cls": None}, "scheduler_cls is not"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker_cls is not"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_vllm_does_not_start_where_requests_would_be_mixed_up(arguments, changes, words):
    """Asked of the configuration that vLLM itself makes of the arguments."""
    from vllm.engine.arg_utils import EngineArgs

    from flexolmo_vllm.model import MixtureForCausalLM

    config = EngineArgs(**arguments | changes).create_engine_config()
    with pytest.raises(ConfigError, match=words):
        MixtureForCausalLM(vllm_config=config)


def test_a_damaged_expert_leaves_nothing_in_memory_that_harms_others(vllm, ask):
    """Erases zinc's weights in memory, and has it fill the whole memory for keys and values."""
    from vllm import SamplingParams

    core = vllm.llm_engine.engine_core.engine_core
    lengths = (3, 20, 37, 70, 100, 133, 201)  # in blocks of 32 that they do not fill
    beginnings = [[EOS, *range(1, n)] for n in lengths]
    before = [ask(ids, {"experts": ["amber"]}) for ids in beginnings]
    core.model_executor.driver_worker.worker.model_runner.model.erase("zinc")
    size = 400
    count = len(core.scheduler.kv_cache_manager.block_pool.blocks) * 32 // size + 8
    texts = [{"prompt_token_ids": [EOS, 1 + i % 200, *[7] * (size - 2)]} for i in range(count)]
    damaged = SamplingParams(temperature=0, max_tokens=2, extra_args={"experts": ["zinc"]})
    vllm.generate(texts, damaged, use_tqdm=False)
    vllm.reset_prefix_cache()
    after = [ask(ids, {"experts": ["amber"]}) for ids in beginnings]
    assert [tokens for tokens, *_ in after] == [tokens for tokens, *_ in before]
    for (_, logs, _), (_, expected, _) in zip(after, before, strict=True):
        assert logs == pytest.approx(expected, abs=1e-4)
