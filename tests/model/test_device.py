"""Models on another device than what they are given: torch's meta device, which holds no numbers
but is one that every machine has."""

import pytest
import torch

from flexolmo.errors import ConfigError
from flexolmo.model.loss import language_model_loss
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings
from flexolmo.model.shape import ExpertShape
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.runtime import choose_device

CONFIG = ModelConfig(vocab_size=60, d_model=16, num_layers=2, num_heads=2, d_ff=24)
SHAPES = {"whole": ExpertShape(d_ff=24), "narrow": ExpertShape(d_ff=8)}


@pytest.mark.parametrize("router", [None, LinearSettings()])
def test_ids_may_be_anywhere(router):
    model = Transformer(CONFIG) if router is None else MixtureModel(CONFIG, SHAPES, router)
    model.to("meta").train()
    loss = language_model_loss(model, torch.zeros(2, 9, dtype=torch.long))
    loss.backward()
    assert model.device.type == loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


def test_a_device_that_is_not_there_is_said_so():
    assert choose_device("cpu").type == "cpu"
    for name in ("cuda:999", "meta", "tpu-pod", ""):
        with pytest.raises(ConfigError, match=r"cannot be used here.*Use cpu"):
            choose_device(name)
