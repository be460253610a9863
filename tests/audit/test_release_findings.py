"""The release report: which results it takes, what leaves, what stays, and what it says."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.audit import results as room
from flexolmo.audit.cards import bill_of_materials, data_card
from flexolmo.audit.release import coarse, make_coarse, make_findings, memorised_spans
from flexolmo.audit.results import AUDITS, Results, read_results, summarise, summarise_control
from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.release import ReleaseReport
from flexolmo.data.batches import open_set
from flexolmo.data.documents import read_documents
from flexolmo.errors import ConfigError, DataError
from flexolmo.files import canonical_json, read_json, write_json
from flexolmo.report.release_page import make_shown, render_release
from made_reports import BUDGET, attack

WINDOW = 24  # characters of text in a row that no copy that leaves may hold


@pytest.fixture(scope="module")
def attacked(house, pico_sets, tmp_path_factory):
    """An owner's bundle, and results of attacks on it."""
    return attack(house, pico_sets["maths"], tmp_path_factory.mktemp("attacked"))


@pytest.fixture
def given_results(attacked):
    """Both results, read, free to change."""
    return [copy.deepcopy(read_results(path)) for path in attacked.results.values()]


def opened(attacked):
    return open_bundle(attacked.bundle, None, allow_unknown_signer=True)


def texts_of(directory: Path) -> list[str]:
    """Every document of a set, of all splits."""
    return [
        " ".join(d.text.split())
        for split in ("train", "validation", "heldout")
        for d in read_documents(directory / f"{split}.jsonl.zst")
    ]


def test_nothing_that_leaves_quotes_the_text_and_what_stays_does(
    attacked, given_results, pico_sets
):
    made = make_findings(opened(attacked), pico_sets["maths"], given_results)
    findings = made.report.findings
    manifest = opened(attacked).manifest
    leaving = "\n".join(
        [
            made.report.model_dump_json(),
            render_release(made.report),
            json.dumps(bill_of_materials(manifest, findings, made.report.created)),
            json.dumps(data_card(manifest, findings, made.report.created)),
        ]
    )
    leaving = " ".join(leaving.split())
    stays = " ".join(render_release(made.report, made.stays).split())
    documents = texts_of(pico_sets["maths"].directory)
    pieces = {t[i : i + WINDOW] for t in documents for i in range(0, len(t) - WINDOW, 3)}
    assert len(pieces) > 1000
    assert not [piece for piece in pieces if piece in leaving]
    assert [piece for piece in pieces if piece in stays]
    assert pico_sets["maths"].digest not in leaving  # of which a guess could be tried
    assert "must not leave" in stays and "may leave" not in stays
    assert len(made.stays["worst_documents"]) == 12


def test_a_report_says_what_was_promised_attacked_and_not(attacked, given_results, pico_sets):
    public = pico_sets["public"]
    made = make_findings(opened(attacked), pico_sets["maths"], given_results, public=public)
    page = render_release(made.report)
    assert made.report.findings["not_made"] == ["statistics", "canaries", "relearning"]
    for said in (
        "There is no guarantee",
        AUDITS["canaries"].question,
        "off equals the anchor, to the bit",
        "fewer than 20",
        "IBAN",
        "Distance from public text",
        "500 steps of 8 sequences",
        opened(attacked).digests["manifest.json"],
    ):
        assert said in page, said
    assert "membership_auc" not in made.report.measures  # of so few documents no limit is judged
    extraction = made.report.measures["extraction"]
    found = read_json(attacked.results["extraction"] / "extraction.json")["subjects"]
    highs = [found[s]["extracted"]["interval"][1] for s in ("alone", "on")]
    assert extraction.high == pytest.approx(max(highs), abs=1e-4)
    (found,) = [r for r in given_results if r.audit == "membership"]
    found.found["documents"] |= {"members": 30, "others": 20}
    made = make_findings(opened(attacked), pico_sets["maths"], [found])
    highs = [x["interval"][1] for s in ("alone", "on") for x in found.found["subjects"][s].values()]
    assert made.report.measures["membership_auc"].high == pytest.approx(max(highs), abs=1e-4)


def test_a_guarantee_is_told_with_all_its_numbers(house, pico_sets, tmp_path):
    tensors = house.tensors("maths", "evidence")
    recipe = {"budget": BUDGET, "privacy": {"epsilon": 8.0}}
    claims = {"data_card_digest": pico_sets["maths"].commitment, "recipe": recipe}
    bundle = house.write(tmp_path, "maths", tensors, "evidence", **claims)
    made = make_findings(
        open_bundle(bundle, None, allow_unknown_signer=True), pico_sets["maths"], []
    )
    page = render_release(made.report)
    for said in ("7.996", "one unit added or removed", "0.1634", "0.9123", "2.345", "PRV (Opacus)"):
        assert said in page, said
    assert "There is no guarantee" not in page
    assert "no epsilon covers it" in page  # the report itself


@pytest.mark.parametrize("value", ["much", True, 10**400, [8], None])
def test_settings_of_a_router_that_are_no_numbers_are_not_told(attacked, pico_sets, value):
    bundle = opened(attacked)
    router = bundle.manifest.router
    settings = dict.fromkeys(("epsilon", "delta", "min_documents"), value)
    changed = router.model_copy(update={"settings": settings})
    manifest = bundle.manifest.model_copy(update={"router": changed})
    made = make_findings(replace(bundle, manifest=manifest), pico_sets["maths"], [])
    assert "The router's table" not in render_release(made.report)


def test_results_of_another_bundle_are_refused(house, attacked, given_results, pico_sets, tmp_path):
    again = house.write(
        tmp_path,
        "maths",
        house.tensors("maths", "evidence"),
        "evidence",
        data_card_digest=pico_sets["maths"].commitment,
        recipe=opened(attacked).manifest.recipe,
        serial=2,
    )
    other = open_bundle(again, None, allow_unknown_signer=True)
    with pytest.raises(DataError, match="is of the bundle sha256"):
        make_findings(other, pico_sets["maths"], given_results)
    with pytest.raises(ConfigError, match="Give the set that it was trained on"):
        make_findings(opened(attacked), pico_sets["news"], given_results)
    with pytest.raises(ConfigError, match="both the results of membership"):
        make_findings(opened(attacked), pico_sets["maths"], given_results[:1] * 2)


def test_results_that_name_no_bundle_are_refused(attacked, given_results, pico_sets):
    given_results[0].found["about"]["origin"] = None
    with pytest.raises(DataError, match="Attack the signed bundle"):
        make_findings(opened(attacked), pico_sets["maths"], given_results)


def canaries(origin, planted_in=None):
    """Results of canaries, of a twin."""
    subject = {
        "membership": {"auc": 0.9, "interval": [0.85, 0.95]},
        "epsilon": {"epsilon": 2.6},
        "exposure": {},
    }
    return {
        "audit": "canaries",
        "about": {"origin": origin},
        "subjects": {"alone": subject, "off": subject},
        "canaries": 120,
        "planted": 57,
        "planted_in": planted_in,
        "tokens": 32,
        "off_equals_anchor": True,
        "run": {"config": {"delta": 1e-6}},
    }


def test_canaries_are_taken_of_a_twin_on_the_same_set_alone(
    attacked, given_results, pico_sets, tmp_path
):
    origin = given_results[0].origin | {"bundle": "sha256:twin"}
    commitment = pico_sets["maths"].commitment
    twin = Results("canaries", tmp_path, canaries(origin, commitment), None)
    made = make_findings(opened(attacked), pico_sets["maths"], [*given_results, twin])
    (told,) = [x for x in made.report.findings["attacks"] if x["audit"] == "canaries"]
    assert told["is_of_a_twin"]
    assert "what the owner says is this text with canaries" in render_release(made.report)
    for stranger in (
        canaries(origin | {"anchor": "sha256:other"}, commitment),
        canaries(origin | {"recipe": "sha256:other"}, commitment),
        canaries(origin, pico_sets["news"].commitment),  # of an owner with the same recipe
        canaries(origin),
    ):
        with pytest.raises(DataError, match="with canaries planted in it"):
            one = Results("canaries", tmp_path, stranger, None)
            make_findings(opened(attacked), pico_sets["maths"], [one])


def test_canaries_that_contradict_the_epsilon_that_is_stated_are_much(tmp_path):
    found = Results("canaries", tmp_path, canaries({}), None)
    assert summarise(found, None).level == "much"  # by their AUC
    assert summarise(found, 8.0).level == "little"
    assert summarise(found, None).headline.unit == "auc"
    contradicted = summarise(found, 2.0)
    assert contradicted.headline.unit == "epsilon" and contradicted.headline.value == 2.6
    assert contradicted.level == "much" and "do not release" in contradicted.verdict


def test_a_control_is_of_another_expert_beside_the_same_anchor_that_is_found_out(
    attacked, given_results, pico_sets
):
    first = given_results[0]
    with pytest.raises(DataError, match="is no control"):
        summarise_control(first, first.origin)
    other = copy.deepcopy(first)
    other.found["about"]["origin"]["bundle"] = "sha256:overfitted"
    membership([other], {"ratio": (0.6, [0.55, 0.64])})  # some
    with pytest.raises(DataError, match="expected 'much'"):
        make_findings(opened(attacked), pico_sets["maths"], given_results, controls=[other])
    membership([other], {"ratio": (0.97, [0.91, 0.99])})
    made = make_findings(opened(attacked), pico_sets["maths"], given_results, controls=[other])
    assert "an overfitted expert: 0.970" in render_release(made.report)
    other.found["about"]["origin"]["anchor"] = "sha256:other"
    with pytest.raises(DataError, match="is no control"):
        summarise_control(other, first.origin)


@pytest.mark.parametrize(
    ("auc", "interval", "level", "said"),
    [
        (0.51, [0.48, 0.55], "little", "Hardly"),
        (0.60, [0.52, 0.65], "some", "To some degree"),
        (0.60, [0.45, 0.75], "unclear", "Not shown, and not excluded: so few"),
        (0.80, [0.7, 0.9], "much", "Yes"),
        (0.50, [0.4, 0.6], "unclear", "Not shown, and not excluded: so few"),  # not the strongest
    ],
)
def test_membership_is_judged_by_the_upper_end_of_any_attack(
    given_results, auc, interval, level, said
):
    found = membership(given_results, {"zlib": (auc, interval)})
    summary = summarise(found, None)
    assert summary.level == level and summary.verdict.startswith(said)
    assert summary.headline.most == interval[1] and "zlib" in summary.headline.measure
    assert "On the anchor, which never saw the text, it does so 99 times" in summary.verdict


def membership(given_results, of_the_expert, others=(0.505, [0.49, 0.51])) -> Results:
    """Results of membership in which these attacks on the expert alone gave these figures."""
    (found,) = [r for r in given_results if r.audit == "membership"]
    for subject, by_attack in found.found["subjects"].items():
        for name, x in by_attack.items():
            figures = of_the_expert.get(name, others) if subject == "alone" else others
            if subject == "anchor":  # never saw the text: decides nothing
                figures = (0.99, [0.98, 1.0])
            x["auc"], x["interval"] = figures
    return found


def test_an_attack_that_succeeds_is_not_hidden_by_one_that_knows_little(
    attacked, given_results, pico_sets
):
    figures = {"zlib": (0.8, [0.7, 0.9]), "loss": (0.6, [0.2, 0.97])}
    found = membership(given_results, figures)
    summary = summarise(found, None)
    assert summary.level == "much" and "zlib" in summary.headline.measure
    assert "leaves 97 open" in summary.verdict
    found.found["documents"] |= {"members": 20, "others": 20}
    made = make_findings(opened(attacked), pico_sets["maths"], [found])
    assert made.report.measures["membership_auc"].high == 0.97


def test_an_attack_that_is_wrong_more_often_than_by_guessing_says_nothing(given_results):
    summary = summarise(membership(given_results, {}, (0.3, [0.2, 0.4])), None)
    assert summary.level == "unclear" and "wrong more often" in summary.verdict
    some = {"zlib": (0.51, [0.48, 0.54])}  # one of them is as by guessing
    assert summarise(membership(given_results, some, (0.3, [0.2, 0.4])), None).level == "little"


@given(st.integers(0, 10**7), st.integers(1, 1000))
def test_counts_that_leave_are_coarse(count, least):
    told = coarse(count, least)
    assert (told is None) == (count < least)
    if told is not None:
        assert told >= least and abs(told - count) <= max(5, 0.05 * count, least - count)
        assert told == least or (told % 10 == 0 and len(str(told).rstrip("0")) <= 2)


@given(st.integers(0, 60), st.integers(20, 40))
def test_of_too_few_documents_nothing_that_follows_from_their_number_leaves(documents, least):
    exact = {
        "counts": {"documents": documents, "bytes": 98_765, "tokens": 4321, "removed_as_public": 0},
        "personal": {"IBAN": {"documents": min(documents, 19), "matches": 77}},
        "overlap": {"short": 0.123, "short_tokens": 8, "long": 0, "long_tokens": 50},
    }
    told = make_coarse(exact, least)
    is_told = documents >= least
    assert (told["counts"]["bytes"] is not None) == is_told
    assert (told["counts"]["tokens"] is not None) == is_told
    assert (told["overlap"]["short"] is not None) == is_told
    assert told["personal"]["IBAN"] == {"documents": None, "matches": None}


def test_what_stays_does_not_take_a_missing_file_for_nothing_found(
    attacked, given_results, pico_sets
):
    found = [Results(r.audit, r.path, r.found, None) for r in given_results]
    made = make_findings(opened(attacked), pico_sets["maths"], found)
    page = render_release(made.report, made.stays)
    assert page.count("Not known: there are no results of") == 2
    made = make_findings(opened(attacked), pico_sets["maths"], given_results)
    assert "Not known: there are no results" not in render_release(made.report, made.stays)


def test_a_number_that_is_withheld_is_not_told_as_small(attacked, pico_sets):
    """Five documents may hold 77 addresses, and a text of 19 may have a million bytes."""
    made = make_findings(opened(attacked), pico_sets["maths"], [])
    text = made.report.findings["text"]
    text["counts"] |= {"documents": None, "bytes": None, "tokens": None}
    for found in text["personal"].values():
        found |= {"documents": None, "matches": None}
    text["overlap"] = {"short": 0.0, "short_tokens": 8, "long": None, "long_tokens": 50}
    page = " ".join(render_release(made.report).split()).partition("The text</h2>")[2]
    kinds = len(text["personal"])
    assert page.count("not told") == kinds + 2  # matches; bytes and tokens
    assert page.count("fewer than 20") == kinds + 3  # documents of each; and of the text
    assert "Less than 1 % of all spans" in page
    card = data_card(opened(attacked).manifest, made.report.findings, "2026-11-22")
    assert "fewer than 20 documents. The text" in card["description"]


def test_what_was_signed_shows_the_same_when_read_again(attacked, given_results, pico_sets):
    made = make_findings(opened(attacked), pico_sets["maths"], given_results).report
    personal = made.findings["text"]["personal"]
    made.findings["text"]["personal"] = {k: {"documents": 30, "matches": 40} for k in personal}
    again = ReleaseReport.model_validate_json(canonical_json(made.model_dump(mode="json")))
    manifest = opened(attacked).manifest
    assert list(again.findings["text"]["personal"]) != list(personal)
    assert make_shown(again, manifest) == make_shown(made, manifest)


def test_sizes_of_splits_leave_coarse(attacked, given_results, pico_sets):
    (found,) = [r for r in given_results if r.audit == "membership"]
    found.found["documents"] |= {"members": 63, "others": 7}
    made = make_findings(opened(attacked), pico_sets["maths"], [found])
    (told,) = made.report.findings["attacks"]
    assert told["settings"]["members"] == told["texts"] == 60
    assert told["settings"]["others"] == "fewer than 20"
    assert "figures of attacks are exact" in render_release(made.report)


@pytest.mark.parametrize(
    ("share", "interval", "level"),
    [
        (0.0, [0.0, 0.01], "little"),
        (0.0, [0.0, 0.02], "unclear"),
        (0.01, [0.005, 0.03], "some"),
        (0.02, [0.01, 0.03], "much"),
    ],
)
@pytest.mark.parametrize("kind", ["extracted", "exact", "near"])
def test_extraction_is_judged_by_what_was_written_and_what_could_be(
    attacked, given_results, pico_sets, kind, share, interval, level
):
    (found,) = [r for r in given_results if r.audit == "extraction"]
    found.found["documents"] = 1000
    for subject, x in found.found["subjects"].items():
        is_own = subject in ("alone", "on")
        nothing = {"share": 0.0, "interval": [0.0, 0.004]} if is_own else {"share": 1.0}
        x["extracted"] |= nothing
        x["near"] = copy.deepcopy(x["exact"])
        for curve in (x["exact"], x["near"]):
            curve["discoverable"]["0.9"][6] |= nothing  # within a million
        decides = x[kind] if kind == "extracted" else x[kind]["discoverable"]["0.9"][6]
        if is_own:
            decides |= {"share": share, "interval": interval}
    summary = summarise(found, None)
    assert summary.level == level and summary.headline.most == interval[1]
    assert "within 2 samples" in summary.verdict and "a million attempts" in summary.verdict
    made = make_findings(opened(attacked), pico_sets["maths"], [found])
    assert made.report.measures["extraction"].high == interval[1]


def test_no_limit_is_held_to_extraction_that_sampled_nothing(attacked, given_results, pico_sets):
    (found,) = [r for r in given_results if r.audit == "extraction"]
    for x in found.found["subjects"].values():
        del x["extracted"]
    made = make_findings(opened(attacked), pico_sets["maths"], [found])
    (told,) = made.report.findings["attacks"]
    assert not made.report.measures and "Nothing was sampled" in told["verdict"]
    assert "a million attempts" in told["headline"]["measure"]


def test_spans_known_by_heart_are_found_in_samples():
    own = "x" * 30 + " the patient of room nine was sent home on Tuesday " + "y" * 30
    document = {
        "document": 7,
        "prefix": "On",
        "continuation": own,
        "log_probability": -3.0,
        "best": "he said the patient of room nine was sent home on Tuesday and left",
        "similarities": [0.2, 0.4],
    }
    (found,) = memorised_spans([document], 0.9)
    assert found["span"] == " the patient of room nine was sent home on Tuesday "
    assert not found["is_extracted"] and found["similarity"] == 0.4
    assert memorised_spans([document | {"best": "nothing of the kind"}], 0.9) == []
    unsampled = {k: v for k, v in document.items() if k not in ("best", "similarities")}
    assert memorised_spans([unsampled], 0.9)[0]["span"] == own
    assert memorised_spans([unsampled | {"log_probability": -20.0}], 0.9) == []
    assert memorised_spans([unsampled | {"log_probability": None}], 0.9) == []


def test_files_that_are_no_results_are_refused_plainly(attacked, tmp_path):
    with pytest.raises(DataError, match="0 attacks"):
        read_results(tmp_path)
    write_json(tmp_path / "membership.json", {"subjects": {}})
    with pytest.raises(DataError, match="Make the attack again with this release"):
        read_results(tmp_path)
    found = read_json(attacked.results["membership"] / "membership.json")
    write_json(tmp_path / "membership.json", {k: v for k, v in found.items() if k != "subjects"})
    with pytest.raises(DataError, match=r"is not as this release writes it \(KeyError"):
        summarise(read_results(tmp_path), None)
    write_json(tmp_path / "membership.json", found)
    write_json(tmp_path / room.STAYS_FILE, {"audit": "membership", "origin": {"bundle": "x"}})
    with pytest.raises(DataError, match="is of another bundle than"):
        read_results(tmp_path)
    write_json(tmp_path / room.STAYS_FILE, {"audit": "extraction"})
    assert read_results(tmp_path).stays is None


@pytest.mark.parametrize(
    "value",
    [[0.2, float("nan")], [-3, 5], [0.4, 0.3], ["a", 1], [0.1, None], [10**400, 1], [], None],
)
@pytest.mark.parametrize("audit", ["membership", "extraction"])
def test_an_interval_that_is_none_is_refused_plainly(attacked, pico_sets, tmp_path, audit, value):
    found = read_json(attacked.results[audit] / f"{audit}.json")
    for x in found["subjects"].values():
        for figure in x.values():
            if isinstance(figure, dict) and "interval" in figure:
                figure["interval"] = value
    path = tmp_path / f"{audit}.json"
    path.write_text(json.dumps(found))
    with pytest.raises(DataError, match="Make the attack again"):
        make_findings(opened(attacked), pico_sets["maths"], [read_results(path)])


@pytest.mark.parametrize(
    "change",
    [
        {"audit": ["a"]},
        {"about": {"origin": 3}},
        {"about": {"origin": {"bundle": "x"}}},
        {"subjects": []},
        {"subjects": {}},
        {"documents": "many"},
        {"documents": {"members": "many", "others": 3}},
        {"run": {"config": [3]}},
        {"run": 3},
    ],
)
@pytest.mark.parametrize("audit", ["membership", "extraction"])
def test_results_of_another_form_are_refused_plainly(attacked, tmp_path, audit, change):
    found = read_json(attacked.results[audit] / f"{audit}.json")
    write_json(tmp_path / "membership.json", found | change)
    with pytest.raises(DataError, match="Make the attack again"):
        summarise(read_results(tmp_path), None)


@pytest.mark.parametrize(
    "stays",
    [
        [],
        3,
        {"more": float("nan")},
        {"worst": 3, "documents": 3},
        {"worst": [3], "documents": [{}]},
    ],
)
@pytest.mark.parametrize("audit", ["membership", "extraction"])
def test_what_stays_in_another_form_is_refused_plainly(attacked, pico_sets, tmp_path, audit, stays):
    found = read_json(attacked.results[audit] / f"{audit}.json")
    write_json(tmp_path / f"{audit}.json", found)
    if isinstance(stays, dict):  # of this attack
        stays = {"audit": audit, "origin": found["about"]["origin"]} | stays
    (tmp_path / room.STAYS_FILE).write_text(json.dumps(stays))
    with pytest.raises(DataError, match="ake the attack again"):
        make_findings(opened(attacked), pico_sets["maths"], [read_results(tmp_path)])


@pytest.mark.parametrize(
    ("auc", "spelled", "level"),
    [
        ([0.48, 0.54], [0.0, 0.2], "little"),
        ([0.48, 0.54], [0.3, 0.5], "some"),  # more than public pairs spell
        ([0.45, 0.75], [0.1, 0.3], "unclear"),
        ([0.45, 0.75], [0.3, 0.5], "some"),
        ([0.7, 0.9], [0.3, 0.5], "much"),
    ],
)
def test_a_table_is_judged_by_documents_and_by_words_of_one_document(tmp_path, auc, spelled, level):
    def share(interval):
        return {"share": sum(interval) / 2, "interval": interval}

    found = {
        "count_recovery": {"determined": share([0.0, 0.1])},
        "rare_words": {"spelled": share(spelled), "by_public": share([0.05, 0.2])},
        "membership": {"calibrated": {"auc": sum(auc) / 2, "interval": auc}},
        "token_presence": {},
        "tokens": {"told": 30, "pairs": 40},
        "min_documents": 8,
        "epsilon": None,
    }
    summary = summarise(Results("statistics", tmp_path, found, None), None)
    assert summary.level == level and "30 tokens and 40 pairs" in summary.verdict


def test_relearning_that_brings_something_back_is_much(tmp_path):
    found = {
        "extra": {"bits_per_byte": 0.02, "interval": [0.01, 0.03]},
        "is_same": None,
        "documents": 9,
        "run": {"config": {}},
    }

    def level(**changes):
        return summarise(Results("relearning", tmp_path, found | changes, None), None).level

    assert level() == "much"
    assert level(extra={"bits_per_byte": 0.0, "interval": [-0.1, 0.1]}) == "unclear"
    assert level(extra={"bits_per_byte": 0.0, "interval": [-0.01, 0.01]}) == "little"
    assert level(is_same=True) == "little"


def test_the_set_may_be_opened_anew(attacked, given_results, pico_set_dirs):
    """The same set in the same place gives the same report, but for the time."""
    made = [
        make_findings(
            opened(attacked), open_set(pico_set_dirs["maths"]), given_results, created=at
        ).report
        for at in ("2026-11-22T04:30:00Z", "2026-11-22T04:30:00Z")
    ]
    assert made[0] == made[1]
