"""An expert whose owner lets nobody use it today is left out where that is asked for, and only
that: what does not hold up refuses the mixture as ever."""

import datetime
import shutil
from itertools import combinations

import pytest
import torch

from flexolmo.bundle import bundle as bundle_room
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import BundleError, MergeError, RevokedError
from flexolmo.merge.mixture import build_mixture, load_mixture, remove_experts
from flexolmo.model.assemble import expert_tensors
from made_bundles import TERMS, terms_until
from made_mixtures import NAMES, flip
from made_owners import entry, id_of, revoke

TODAY = datetime.datetime.now(datetime.UTC).date()
DAY = datetime.timedelta(days=1)
WHYS = {
    "amber": "amber was revoked by its owner on 2026-11-23: A patient objected.",
    "basalt": f"basalt: the owner's terms begin on {TODAY + DAY}.",
    "zinc": f"zinc: the owner's terms expired on {TODAY - DAY}.",
}


@pytest.fixture
def trust(house, tmp_path):
    """Directory of trusted owners."""
    (tmp_path / "trust").mkdir()
    for owner, key in house.keys.items():
        shutil.copy(f"{key}.pub", tmp_path / "trust" / f"{owner}.pub")
    return tmp_path / "trust"


def make(house, where, barred, trust, router="evidence"):
    """A mixture in which `barred` are revoked (amber), have not begun (basalt) or have ended."""
    days = {
        "basalt": TERMS.model_copy(update={"valid_from": TODAY + DAY}),
        "zinc": terms_until(TODAY - DAY).model_copy(update={"valid_from": TODAY - 9 * DAY}),
    }
    bundles = {}
    for name in NAMES:
        terms = days[name] if name in barred and name in days else TERMS
        tensors = house.tensors(name, router)
        bundles[name] = house.write(
            where / "out", name, tensors, router, terms=terms, today=TODAY - DAY
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.merge.mixture._refuse_late", lambda *_: None)
        patch.setattr(bundle_room, "_find_content_problems", lambda *_: [])
        build_mixture(house.anchor_dir, [*bundles.values()], where / "m", house.trusted)
    if "amber" in barred:
        revoke(trust, house.keys["Ann"], entry("expert", name="amber", up_to_serial=1))
    return where / "m"


@pytest.mark.parametrize(
    ("router", "barred"),
    [
        *(("evidence", c) for n in range(4) for c in combinations(NAMES, n)),
        *((r, c) for r in ("linear", "rich") for c in ((), ("amber",), ("basalt", "zinc"))),
    ],
)
def test_what_is_left_is_bit_for_bit_a_mixture_that_never_held_it(
    house, tmp_path, trust, router, barred
):
    model = make(house, tmp_path, barred, trust, router)
    found = load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)
    assert {name: x.why for name, x in found.barred.items()} == {n: WHYS[n] for n in barred}
    assert found.expert_names == [n for n in NAMES if n not in barred] == sorted(found.facts)
    untils = {name: x.until for name, x in found.barred.items() if x.until}
    assert untils == ({"basalt": TODAY + DAY} if "basalt" in barred else {})
    assert all(x.facts.owner == "Ann" or name == "zinc" for name, x in found.barred.items())
    never = house.mixture(tuple(found.expert_names), router)
    ids = house.wild.ids(2, 12)
    assert torch.equal(found.model(ids), never.model(ids))
    one, two = found.model.state_dict(), never.model.state_dict()
    if not found.expert_names:  # a mixture built of nobody has the router that is usual
        return
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for name in barred:
        with pytest.raises(KeyError):
            expert_tensors(found.model, name)


def test_it_is_left_out_only_where_that_is_asked_for(house, tmp_path, trust):
    model = make(house, tmp_path, ["amber", "zinc"], trust)
    with pytest.raises(RevokedError, match="amber"):
        load_mixture(model, TrustedOwners.load(trust))
    with pytest.raises(MergeError, match="zinc: the owner's terms expired"):
        load_mixture(model, house.trusted)
    remove_experts(model, ["amber", "zinc"], TrustedOwners.load(trust))
    assert load_mixture(model, TrustedOwners.load(trust)).expert_names == ["basalt"]


def test_those_that_are_not_chosen_are_left_out_too(house, tmp_path, trust):
    model = make(house, tmp_path, ["zinc"], trust)
    owners = TrustedOwners.load(trust)
    found = load_mixture(model, owners, experts=["basalt"], leaves_out_barred=True)
    whys = {"amber": "amber was not chosen to be loaded.", "zinc": WHYS["zinc"]}
    assert {name: x.why for name, x in found.barred.items()} == whys
    assert found.expert_names == list(found.facts) == ["basalt"]


def test_a_revoked_key_bars_all_that_it_signed(house, tmp_path, trust):
    model = make(house, tmp_path, [], trust)
    shutil.copy(f"{house.keys['Ann']}.pub", trust / "Ann.until-2099-01-01.pub")
    (trust / "Ann.pub").unlink()
    key = house.keys["Ann"]
    revoke(trust, key, entry("key", key_id=id_of(key)))
    found = load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)
    assert found.expert_names == ["zinc"] and set(found.barred) == {"amber", "basalt"}


def test_no_weight_of_it_is_read(house, tmp_path, trust, monkeypatch):
    model = make(house, tmp_path, ["amber", "zinc"], trust)
    read = []
    right = bundle_room.read_weights
    monkeypatch.setattr(
        bundle_room, "read_weights", lambda file, *args: read.append(file) or right(file, *args)
    )
    load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)
    assert len(read) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["manifest.json", "signature.sig", "signer.pub"])
def test_a_changed_byte_refuses_the_mixture_also_in_what_would_be_left_out(
    house, tmp_path, trust, name, file
):
    model = make(house, tmp_path, ["amber", "zinc"], trust)
    path = model / "experts" / f"{name}.bundle" / file
    path.chmod(0o600)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    flip(path, 0.5, 1)
    with pytest.raises(BundleError, match=rf"{name}\.bundle"):
        load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)
    path.unlink()
    with pytest.raises(BundleError, match=rf"{name}\.bundle"):
        load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)


def test_a_barred_bundle_of_which_the_index_says_something_else_refuses_the_mixture(
    house, tmp_path, trust
):
    model = make(house, tmp_path, ["amber"], trust)
    index = model / "mixture.json"
    text = index.read_text()
    assert text.count('"tokens_seen": 7') == 3
    index.write_text(text.replace('"tokens_seen": 7', '"tokens_seen": 8', 1))
    with pytest.raises(MergeError, match=r"amber\.bundle is not the bundle that was verified"):
        load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)


def test_another_bundle_in_the_place_of_a_barred_one_refuses_the_mixture(house, tmp_path, trust):
    """It is whole, well signed and barred too."""
    model = make(house, tmp_path, ["amber"], trust)
    tensors = house.tensors("amber", "evidence")
    other = house.write(tmp_path, "amber", tensors, "evidence", tokens_seen=8)
    shutil.rmtree(model / "experts" / "amber.bundle")
    shutil.copytree(other, model / "experts" / "amber.bundle")
    with pytest.raises(MergeError, match=r"amber\.bundle is not the bundle that was verified"):
        load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)


def test_an_untrusted_signer_refuses_the_mixture_though_the_terms_have_ended(
    house, tmp_path, trust
):
    model = make(house, tmp_path, ["zinc"], trust)
    (trust / "Bob.pub").unlink()
    with pytest.raises(BundleError, match=r"zinc\.bundle.*unknown key"):
        load_mixture(model, TrustedOwners.load(trust), leaves_out_barred=True)
