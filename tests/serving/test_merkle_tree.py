"""The tree against the recursive definitions and the checking algorithms of RFC 9162."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.serving.tree import (
    EMPTY_ROOT,
    Frontier,
    consistency_ranges,
    hash_leaf,
    hash_node,
    hash_ranges,
    inclusion_ranges,
    is_consistent,
    is_included,
)

MOST = 70


def sha256(data):
    return hashlib.sha256(data).digest()


LEAVES = [sha256(b"\0%d" % i) for i in range(MOST)]


# --- RFC 9162, section 2.1.1, 2.1.3.1 and 2.1.4.1 -------------------------------------------------


def largest_power_below(n):
    return max(2**i for i in range(20) if 2**i < n)


def mth(d):
    if not d:
        return sha256(b"")
    if len(d) == 1:
        return d[0]
    k = largest_power_below(len(d))
    return sha256(b"\1" + mth(d[:k]) + mth(d[k:]))


def path(m, d):
    if len(d) == 1:
        return []
    k = largest_power_below(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m, d, is_known):
    if m == len(d):
        return [] if is_known else [mth(d)]
    k = largest_power_below(len(d))
    if m <= k:
        return [*subproof(m, d[:k], is_known), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


# --- RFC 9162, section 2.1.3.2 and 2.1.4.2 --------------------------------------------------------


def verify_inclusion(leaf, index, size, root, proof):
    if index >= size:
        return False
    fn, sn, r = index, size - 1, leaf
    for p in proof:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            r = sha256(b"\1" + p + r)
            if not fn & 1:
                while not (fn & 1 or fn == 0):
                    fn, sn = fn >> 1, sn >> 1
        else:
            r = sha256(b"\1" + r + p)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r == root


def verify_consistency(first, second, first_hash, second_hash, proof):
    if first == second:
        return not proof and first_hash == second_hash
    if first & (first - 1) == 0:
        proof = [first_hash, *proof]
    fn, sn = first - 1, second - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    if not proof:
        return False
    fr = sr = proof[0]
    for c in proof[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            fr, sr = sha256(b"\1" + c + fr), sha256(b"\1" + c + sr)
            if not fn & 1:
                while not (fn & 1 or fn == 0):
                    fn, sn = fn >> 1, sn >> 1
        else:
            sr = sha256(b"\1" + sr + c)
        fn, sn = fn >> 1, sn >> 1
    return (fr, sr, sn) == (first_hash, second_hash, 0)


# --- the laws -------------------------------------------------------------------------------------


def test_roots_are_those_that_certificate_transparency_publishes():
    """Test vectors of github.com/transparency-dev/merkle."""
    texts = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    texts.append("606162636465666768696a6b6c6d6e6f")
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    tree = Frontier()
    assert tree.root() == EMPTY_ROOT == sha256(b"")
    for text, root in zip(texts, roots, strict=True):
        tree.append(hash_leaf(bytes.fromhex(text)))
        assert tree.root().hex() == root


def test_a_growing_tree_has_the_root_of_the_definition_at_every_size():
    tree = Frontier()
    for size in range(MOST):
        assert tree.root() == mth(LEAVES[:size])
        assert (tree.size, len(tree.hashes)) == (size, size.bit_count())
        assert Frontier(size, tree.hashes).root() == tree.root()
        tree.append(LEAVES[size])


def test_a_copy_grows_apart():
    tree = Frontier()
    for leaf in LEAVES[:5]:
        tree.append(leaf)
    root = tree.root()
    tree.copy().append(LEAVES[5])
    assert (tree.size, tree.root()) == (5, root)


def test_a_tree_of_the_wrong_number_of_subtrees_is_refused():
    with pytest.raises(ValueError, match="2 subtrees for 4 leaves"):
        Frontier(4, LEAVES[:2])


def test_every_inclusion_proof_is_the_definitions_and_holds():
    for size in range(1, 40):
        root = mth(LEAVES[:size])
        for index in range(size):
            proof = hash_ranges(LEAVES, inclusion_ranges(index, size))
            assert proof == path(index, LEAVES[:size])
            for check in (is_included, verify_inclusion):
                assert check(LEAVES[index], index, size, root, proof)


def test_every_consistency_proof_is_the_definitions_and_holds():
    for new in range(1, 40):
        for old in range(1, new + 1):
            proof = hash_ranges(LEAVES, consistency_ranges(old, new))
            assert proof == subproof(old, LEAVES[:new], True)
            roots = mth(LEAVES[:old]), mth(LEAVES[:new])
            for check in (is_consistent, verify_consistency):
                assert check(old, new, *roots, proof)


def test_every_tree_begins_with_the_empty_one_and_with_no_other_of_no_leaves():
    assert is_consistent(0, 9, EMPTY_ROOT, mth(LEAVES[:9]), [])
    assert not is_consistent(0, 9, LEAVES[0], mth(LEAVES[:9]), [])
    assert not is_consistent(0, 9, EMPTY_ROOT, mth(LEAVES[:9]), LEAVES[:1])


sizes = st.integers(1, MOST)


@given(st.data(), sizes)
def test_an_inclusion_proof_that_is_changed_anyhow_holds_only_where_the_rfc_says_so(data, size):
    index = data.draw(st.integers(0, size - 1))
    root, proof = mth(LEAVES[:size]), path(index, LEAVES[:size])
    at = data.draw(st.integers(0, len(proof)))
    how = data.draw(st.sampled_from(["drop", "add", "change", "size", "index", "leaf", "root"]))
    leaf, new_index, new_size = LEAVES[index], index, size
    if how == "drop":
        proof = proof[:at] + proof[at + 1 :]
    elif how == "add":
        proof = [*proof[:at], LEAVES[0], *proof[at:]]
    elif how == "change" and at < len(proof):
        proof = [*proof[:at], LEAVES[0], *proof[at + 1 :]]
    elif how == "size":
        new_size = data.draw(st.integers(index + 1, MOST))
    elif how == "index":
        new_index = data.draw(st.integers(0, size - 1))
    elif how == "leaf":
        leaf = data.draw(st.sampled_from(LEAVES))
    else:
        root = data.draw(st.sampled_from([root, LEAVES[0]]))
    expected = verify_inclusion(leaf, new_index, new_size, root, proof)
    assert is_included(leaf, new_index, new_size, root, proof) == expected


@given(st.data(), sizes, sizes, st.integers(0, MOST - 1))
def test_no_proof_shows_that_a_tree_continues_another_one_that_differs(data, a, b, changed):
    old, new = sorted((a, b))
    altered = [*LEAVES[:changed], sha256(b"other"), *LEAVES[changed + 1 :]]
    proof = hash_ranges(LEAVES, consistency_ranges(old, new))
    found = is_consistent(old, new, mth(altered[:old]), mth(LEAVES[:new]), proof)
    assert found == (changed >= old)
    forged = hash_ranges(altered, consistency_ranges(old, new))
    found = is_consistent(old, new, mth(LEAVES[:old]), mth(altered[:new]), forged)
    assert found == (changed >= old)


@pytest.mark.parametrize("old, new", [(3, 2), (-1, 2)])
def test_a_tree_cannot_shrink(old, new):
    with pytest.raises(ValueError, match=f"a tree of {old} before one of {new}"):
        consistency_ranges(old, new)


@pytest.mark.parametrize("index, size", [(2, 2), (-1, 2), (0, 0)])
def test_there_is_no_proof_of_a_leaf_outside_the_tree(index, size):
    with pytest.raises(ValueError, match=f"leaf {index} of a tree of {size}"):
        inclusion_ranges(index, size)


def test_too_few_leaves_are_no_proof():
    with pytest.raises(ValueError, match="the leaves end before number 8"):
        hash_ranges(LEAVES[:7], [(0, 4), (4, 8)])


def test_a_leaf_cannot_pass_for_a_node():
    left, right = LEAVES[:2]
    assert hash_leaf(left + right) != hash_node(left, right)
