"""A mixture exported with its code: transformers computes what the mixture computes."""

import os

import pytest
import torch

from flexolmo.merge.export_code import export_code
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.router import DiscriminantSettings
from made_mixtures import NAMES, ROUTERS

os.environ["HF_HUB_OFFLINE"] = "1"


def load(directory, **options):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("kind", [*ROUTERS, "disc", "context"])
def test_x(kind, wild, tmp_path):
    more = {"disc": DiscriminantSettings(), "context": DiscriminantSettings(has_context=True)}
    router = (ROUTERS | more)[kind]
    shapes = wild.rich_shapes(router, NAMES) if kind == "rich" else None
    model = wild.mixture(router, NAMES, shapes=shapes)
    mixture = LoadedMixture(model, wild.anchor.tokenizer, {}, {})
    export_code(mixture, tmp_path / "hf")
    theirs = load(tmp_path / "hf")
    ids = wild.ids(3, 50)
    with torch.inference_mode():
        for on in [None, [], ["amber"], ["amber", "zinc"]]:
            ours = model(ids, active=model.expert_mask([on] * 3))
            got = theirs(ids, experts=on).logits
            print(kind, on, float((ours - got).abs().max()), float(ours.abs().max()))
        prompt = wild.ids(2, 12, eos_every=10**6)
        out = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, experts=["amber"])
        for _ in range(8):
            prompt = torch.cat([prompt, model(prompt, active=model.expert_mask([["amber"]]*2))[:, -1:].argmax(-1)], dim=1)
        print(torch.equal(out, prompt))
