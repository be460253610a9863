"""Quality of a mixture under tables that hide more or less."""

import json

import numpy as np
import pytest

from flexolmo.audit.curve import MIXED, mix_windows, quality_curve
from flexolmo.errors import ConfigError
from flexolmo.evaluation.likelihood import measure_likelihood
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.report.plots import plot_quality_curve
from flexolmo.train.expert import ExpertRecipe, train_expert
from flexolmo.train.loop import TrainSettings

BRIEF = TrainSettings(steps=3, batch_size=2, seq_len=32, warmup_steps=1)


@pytest.fixture(scope="module")
def experts(pico_anchor, pico_sets):
    recipe = ExpertRecipe(router=EvidenceSettings(min_documents=3), train=BRIEF)
    return [train_expert(pico_anchor, pico_sets[n], n, recipe) for n in ("maths", "news")]


def test_each_point_is_the_mixture_with_tables_made_again(pico_anchor, pico_sets, experts):
    choices = [EvidenceSettings(min_documents=3), EvidenceSettings(epsilon=4.0)]
    found = quality_curve(pico_anchor, experts, pico_sets, choices)
    assert json.loads(json.dumps(found)) == found
    assert [p["name"] for p in found["points"]] == ["k = 3", "epsilon = 4"]
    # under the settings of their training it is the experts' own mixture
    own = assemble_mixture(pico_anchor, {e.name: e.tensors for e in experts}, choices[0])
    for model, point in ((pico_anchor.model, found["anchor"]), (own, found["points"][0])):
        for name, data in pico_sets.items():
            expected = measure_likelihood(model, data, "heldout").bits_per_byte
            assert point["sets"][name] == pytest.approx(expected, rel=1e-6)
        mean = (point["sets"]["maths"] + point["sets"]["news"]) / 2
        assert point["own"] == pytest.approx(mean)
    names = {t.get_text() for ax in plot_quality_curve(found).axes for t in ax.get_yticklabels()}
    assert {"k = 3", "epsilon = 4"} <= names
    assert MIXED in found["anchor"]["sets"]


def test_mixed_text_turns_from_set_to_set():
    first, second = ([(np.array([0, v, v + 1]), 2)] * 3 for v in (10, 20))
    mixed = mix_windows([first, second[:2]])
    assert [(ids.tolist(), size) for ids, size in mixed] == [
        ([0, 10, 11, 20, 21], 4),
        ([0, 20, 21, 10, 11], 4),
    ]


def test_an_expert_without_its_set_is_refused(pico_anchor, pico_sets, experts):
    with pytest.raises(ConfigError, match=r"news was trained on the set .* Give that set"):
        quality_curve(pico_anchor, experts, {"maths": pico_sets["maths"]}, [EvidenceSettings()])
