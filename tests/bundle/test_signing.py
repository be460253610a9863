"""Keys, trusted owners, and signatures that hold for exactly the bytes they were made for."""

import base64
import json
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from flexolmo.bundle import signing
from flexolmo.bundle.signing import (
    TrustedOwners,
    create_key,
    key_id,
    read_public_key,
    sign_files,
    verify_files,
)
from flexolmo.errors import SignatureError
from flexolmo.files import digest_bytes

DIGESTS = {name: digest_bytes(name.encode()) for name in ("a.json", "b.safetensors", "signer.pub")}


def encode_public(key):
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two private key files."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("ann", "bob"):
        create_key(directory / name)
    return directory


@pytest.fixture(scope="module")
def signature(keys):
    return sign_files("x.bundle", DIGESTS, keys / "ann")


# --- keys --------------------------------------------------------------------------------------


def test_a_new_key_is_private_and_has_its_public_half_beside_it(tmp_path):
    public = create_key(tmp_path / "new" / "owner.pem")
    private = tmp_path / "new" / "owner.pem"
    assert public == tmp_path / "new" / "owner.pem.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.read_bytes() == read_public_key(private)
    assert sorted(p.name for p in private.parent.iterdir()) == ["owner.pem", "owner.pem.pub"]


@pytest.mark.parametrize("existing", ["k", "k.pub"])
def test_a_key_is_never_overwritten(tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    with pytest.raises(SignatureError, match="not overwritten"):
        create_key(tmp_path / "k")
    assert [p.name for p in tmp_path.iterdir()] == [existing]


def test_a_key_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "k.pub").write_text("mine")
    monkeypatch.setattr(signing.os.path, "lexists", lambda path: False)
    with pytest.raises(SignatureError, match="cannot be written"):
        create_key(tmp_path / "k")
    assert [p.name for p in tmp_path.iterdir()] == ["k.pub"]


def test_a_key_id_is_the_digest_of_the_der_key(keys):
    pem = (keys / "ann.pub").read_bytes()
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    assert key_id(pem) == digest_bytes(der)
    assert key_id(pem.replace(b"\n", b"\r\n")) == key_id(pem)


@pytest.mark.parametrize(
    "pem, message",
    [
        (b"", "no PEM public key"),
        (b"\xff" * 100, "no PEM public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no PEM public key"),
        (encode_public(ed25519.Ed25519PrivateKey.generate().public_key()), "another kind"),
        (encode_public(ec.generate_private_key(ec.SECP384R1()).public_key()), "another kind"),
    ],
)
def test_what_is_no_p256_key_is_refused(pem, message, tmp_path):
    with pytest.raises(SignatureError, match=message):
        key_id(pem)
    (tmp_path / "k").write_bytes(pem)
    with pytest.raises(SignatureError, match="no private key"):
        read_public_key(tmp_path / "k")


def test_a_missing_or_locked_private_key_is_refused(tmp_path):
    with pytest.raises(SignatureError, match="cannot be read"):
        read_public_key(tmp_path / "none")
    locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "locked").write_bytes(locked)
    with pytest.raises(SignatureError, match="without a password"):
        read_public_key(tmp_path / "locked")


# --- trusted owners ----------------------------------------------------------------------------


def test_trusted_owners_are_the_pub_files_of_a_directory(keys, tmp_path):
    (tmp_path / "Ann & Co.pub").write_bytes((keys / "ann.pub").read_bytes())
    (tmp_path / ".hidden").write_text("ignored")
    trusted = TrustedOwners.load(tmp_path)
    ann, bob = (key_id((keys / f"{n}.pub").read_bytes()) for n in ("ann", "bob"))
    assert trusted.owner_of(ann) == "Ann & Co"
    assert trusted.key_of("Ann & Co") == ann
    assert trusted.owner_of(bob) is None
    assert trusted.key_of("bob") is None


def test_a_trust_directory_with_anything_else_is_refused_by_name(keys, tmp_path):
    (tmp_path / "ann.pub").write_bytes((keys / "ann.pub").read_bytes())
    (tmp_path / "bob.pem").write_bytes((keys / "bob.pub").read_bytes())
    (tmp_path / "dir.pub").mkdir()
    (tmp_path / "long.pub").write_bytes(bytes(1 << 20))
    with pytest.raises(SignatureError, match=r"(?s)bob\.pem.*dir\.pub.*long\.pub"):
        TrustedOwners.load(tmp_path)
    with pytest.raises(SignatureError, match="cannot be read"):
        TrustedOwners.load(tmp_path / "none")


def test_bad_trusted_keys_are_all_named(keys):
    ann = (keys / "ann.pub").read_bytes()
    with pytest.raises(SignatureError) as e:
        TrustedOwners.from_keys(
            {"ann": ann, "eve": ann, "bob": (keys / "bob").read_bytes(), "a/b": ann, "nil": b""}
        )
    for line in ("'eve': same key as 'ann'", "'bob': ", "a private key", "'a/b': ", "'nil': "):
        assert line in str(e.value)
    assert "BEGIN" not in str(e.value)


# --- signatures --------------------------------------------------------------------------------


def test_a_signature_holds_for_its_files_and_names_its_subject(keys, signature):
    assert verify_files(DIGESTS, signature, (keys / "ann.pub").read_bytes()) == "x.bundle"


def test_changed_missing_and_extra_files_are_all_named(keys, signature):
    digests = {**DIGESTS, "a.json": digest_bytes(b"other"), "new": digest_bytes(b"new")}
    del digests["signer.pub"]
    with pytest.raises(SignatureError) as e:
        verify_files(digests, signature, (keys / "ann.pub").read_bytes())
    for line in ("a.json: found", "new: found", "signer.pub: found no such file"):
        assert line in str(e.value)
    assert "b.safetensors" not in str(e.value)


def test_another_key_is_refused(keys, signature):
    with pytest.raises(SignatureError, match=r"signature\.sig.*signer\.pub"):
        verify_files(DIGESTS, signature, (keys / "bob.pub").read_bytes())


@pytest.mark.parametrize("at", ["payload", "sig"])
def test_a_forged_payload_or_signature_is_refused(keys, signature, at):
    public = (keys / "ann.pub").read_bytes()
    envelope = json.loads(signature)["dsseEnvelope"]
    payload, sig = envelope["payload"], envelope["signatures"][0]["sig"]
    if at == "payload":
        other = base64.b64decode(payload).replace(b"x.bundle", b"y.bundle")
        payload = base64.b64encode(other).decode()
    else:
        sig = json.loads(sign_files("y.bundle", DIGESTS, keys / "ann"))["dsseEnvelope"]
        sig = sig["signatures"][0]["sig"]
    forged = signing._signature_file(public, payload, sig)
    with pytest.raises(SignatureError, match="not a signature by the key"):
        verify_files(DIGESTS, forged, public)


def respell(change):
    def apply(signature):
        whole = json.loads(signature)
        change(whole)
        return json.dumps(whole, separators=(",", ":")).encode()

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + b"\n",
        lambda s: s.replace(b'":', b'": ', 1),
        lambda s: s[:-1],
        lambda s: b"",
        lambda s: b"[]",
        lambda s: b"{}",
        lambda s: b"\xff",
        lambda s: b"[" * 60_000,
        respell(lambda w: w["verificationMaterial"]["publicKey"].pop("hint")),
        respell(lambda w: w.update(note="text that nobody signed")),
        respell(lambda w: w["dsseEnvelope"].update(payload=3)),
        respell(lambda w: w["dsseEnvelope"].update(payload="é")),
        respell(lambda w: w["dsseEnvelope"].update(signatures=[])),
        respell(lambda w: w["dsseEnvelope"]["signatures"][0].update(keyid="text")),
        respell(lambda w: w["dsseEnvelope"]["signatures"].append({"sig": "", "keyid": ""})),
        respell(lambda w: w.update(mediaType="application/vnd.dev.sigstore.bundle+json")),
    ],
)
def test_a_signature_file_has_one_spelling_only(keys, signature, change, capsys):
    with pytest.raises(SignatureError, match=r"signature\.sig"):
        verify_files(DIGESTS, change(signature), (keys / "ann.pub").read_bytes())
    assert capsys.readouterr().out == ""


def sign_statement(key_file, statement):
    """A genuine signature over any payload, as a dishonest owner could make."""
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    kind = b"application/vnd.in-toto+json"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    from cryptography.hazmat.primitives.hashes import SHA256

    sig = key.sign(pae, ec.ECDSA(SHA256()))
    return signing._signature_file(
        encode_public(key.public_key()),
        base64.b64encode(payload).decode(),
        base64.b64encode(sig).decode(),
    )


def change_statement(change):
    statement = signing._statement("x.bundle", DIGESTS)
    change(statement)
    return statement


def test_a_hand_made_signature_of_the_right_statement_holds(keys):
    honest = sign_statement(keys / "ann", change_statement(lambda s: None))
    assert verify_files(DIGESTS, honest, (keys / "ann.pub").read_bytes()) == "x.bundle"


@pytest.mark.parametrize(
    "statement",
    [
        b"not json",
        b"[]",
        b"{}",
        change_statement(lambda s: s.update(text="a secret")),
        change_statement(lambda s: s["predicate"].update(text="a secret")),
        change_statement(lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")),
        change_statement(lambda s: s["subject"].append(s["subject"][0])),
        change_statement(lambda s: s["subject"][0].update(digest={"sha256": "00" * 32})),
        change_statement(lambda s: s["predicate"]["resources"].pop()),
        change_statement(lambda s: s["predicate"]["resources"][0].update(algorithm="blake2")),
        change_statement(lambda s: s["predicate"]["serialization"].update(ignore_paths=["b"])),
        change_statement(lambda s: s["predicate"]["serialization"].update(allow_symlinks=True)),
    ],
)
def test_a_trusted_signer_cannot_sign_in_another_manner(keys, statement):
    with pytest.raises(SignatureError, match=r"signature\.sig|was signed"):
        verify_files(
            DIGESTS, sign_statement(keys / "ann", statement), (keys / "ann.pub").read_bytes()
        )


@pytest.mark.parametrize("change", [lambda p: p + b"\n", lambda p: b"x" + p, lambda p: p[:50]])
def test_a_signer_key_has_one_spelling_only(keys, signature, change):
    with pytest.raises(SignatureError, match=r"signer\.pub"):
        verify_files(DIGESTS, signature, change((keys / "ann.pub").read_bytes()))


def test_signing_with_no_key_is_refused(tmp_path):
    (tmp_path / "k").write_text("no key")
    with pytest.raises(SignatureError, match="no private key"):
        sign_files("x.bundle", DIGESTS, tmp_path / "k")
