"""Relearning: from a mixture that has an expert off, and from its anchor."""

import json

import pytest

from flexolmo.audit import relearning
from flexolmo.audit.relearning import RelearningSettings, audit_relearning
from flexolmo.audit.subjects import Subject
from flexolmo.errors import ConfigError
from flexolmo.report.relearning_page import write_relearning_page

BRIEF = RelearningSettings(steps=4, every=2, batch_size=3, seq_len=16, max_documents=6)


def test_without_the_expert_the_mixture_learns_as_the_anchor_does(attacked, pico_sets, tmp_path):
    """To the bit, at every step: nothing of the expert takes part."""
    found = audit_relearning(attacked(), pico_sets["maths"], pico_sets["public"], BRIEF)
    assert json.loads(json.dumps(found)) == found
    assert found["is_same"] is True
    assert found["curves"]["off"] == found["curves"]["anchor"]
    assert found["extra"] == {"bits_per_byte": 0.0, "interval": [0.0, 0.0]}
    steps = [p["step"] for p in found["curves"]["off"]]
    bits = [p["bits_per_byte"] for p in found["curves"]["off"]]
    assert steps == [0, 2, 4] and bits[2] < bits[0]  # it does learn
    assert "Relearning" in write_relearning_page(found, tmp_path / "out").read_text()


def test_with_others_on_the_gains_are_compared(attacked, pico_sets, tmp_path):
    subjects = attacked("code")
    found = audit_relearning(subjects, pico_sets["maths"], pico_sets["public"], BRIEF)
    assert found["is_same"] is None
    off, anchor = (found["curves"][name] for name in ("off", "anchor"))
    gains = [c[0]["bits_per_byte"] - c[-1]["bits_per_byte"] for c in (off, anchor)]
    assert found["extra"]["bits_per_byte"] == pytest.approx(gains[0] - gains[1], abs=1e-5)
    low, high = found["extra"]["interval"]
    assert low <= found["extra"]["bits_per_byte"] <= high
    assert "Control" not in write_relearning_page(found, tmp_path / "out").read_text()


def test_an_expert_that_was_left_on_is_noticed(attacked, pico_sets):
    """The control can fail: where the expert takes part, the curves differ."""
    subjects = attacked()
    _, on, off, anchor = subjects.models
    subjects.models[2] = Subject(off.name, on.reader, anchor.reader)
    found = audit_relearning(subjects, pico_sets["maths"], pico_sets["public"], BRIEF)
    assert found["is_same"] is False


def test_the_text_is_half_public_and_half_of_the_validation_split(pico_sets):
    batch = relearning._batches(pico_sets["maths"], pico_sets["public"], BRIEF)
    streams = [pico_sets["public"].splits["train"], pico_sets["maths"].splits["validation"]]
    for step in range(3):
        rows = [row.tolist() for row in batch(step)]
        own = [stream.tokens.tolist() for stream in (streams[0], streams[0], streams[1])]
        for row, tokens in zip(rows, own, strict=True):
            assert any(tokens[i : i + len(row)] == row for i in range(0, len(tokens), 16))


def test_only_a_mixture_with_the_expert_on_is_tried(attacked, pico_sets):
    with pytest.raises(ConfigError, match="expert on"):
        audit_relearning(
            attacked(without=["maths"]), pico_sets["maths"], pico_sets["public"], BRIEF
        )
