"""Keys, and signatures that hold for exactly the bytes they were made for."""

import base64
import json
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from flexolmo.bundle import signing
from flexolmo.bundle.signing import (
    create_key,
    encode_public,
    key_id,
    read_private_key,
    read_signature,
    sign_files,
)
from flexolmo.errors import SignatureError
from flexolmo.files import digest_bytes

DIGESTS = {name: digest_bytes(name.encode()) for name in ("a.json", "b.safetensors", "signer.pub")}


def encode_any(key):
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
    return sign_files("x.bundle", DIGESTS, read_private_key(keys / "ann"))


# --- keys --------------------------------------------------------------------------------------


def test_a_new_key_is_private_and_has_its_public_half_beside_it(tmp_path):
    public = create_key(tmp_path / "new" / "owner.pem")
    private = tmp_path / "new" / "owner.pem"
    assert public == tmp_path / "new" / "owner.pem.pub"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.read_bytes() == encode_public(read_private_key(private))
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
        (encode_any(ed25519.Ed25519PrivateKey.generate().public_key()), "another kind"),
        (encode_any(ec.generate_private_key(ec.SECP384R1()).public_key()), "another kind"),
    ],
)
def test_what_is_no_p256_key_is_refused(pem, message, tmp_path):
    with pytest.raises(SignatureError, match=message):
        key_id(pem)
    (tmp_path / "k").write_bytes(pem)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(SignatureError, match="no private key"):
        read_private_key(tmp_path / "k")


def test_a_missing_private_key_is_refused(tmp_path):
    with pytest.raises(SignatureError, match="cannot be read"):
        read_private_key(tmp_path / "none")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_private_key_that_others_may_read_or_change_is_refused(tmp_path, mode):
    create_key(tmp_path / "my key")
    (tmp_path / "my key").chmod(mode)
    with pytest.raises(SignatureError, match=rf"mode 0{mode:o}.*chmod 600 '.*/my key'"):
        read_private_key(tmp_path / "my key")
    (tmp_path / "my key").chmod(0o400)
    read_private_key(tmp_path / "my key")


def test_a_key_with_a_passphrase_opens_with_it_alone(tmp_path, monkeypatch):
    path = tmp_path / "k"
    public = create_key(path, "säsam").read_bytes()
    assert b"ENCRYPTED" in path.read_bytes()
    assert encode_public(read_private_key(path, "säsam")) == public
    for wrong in ("other", "x"):
        with pytest.raises(SignatureError, match="does not open the key"):
            read_private_key(path, wrong)
    with pytest.raises(SignatureError, match="--passphrase-file, or set FLEXOLMO_KEY_PASSPHRASE"):
        read_private_key(path)
    monkeypatch.setattr(signing.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(signing.getpass, "getpass", lambda prompt: "säsam")
    assert encode_public(read_private_key(path)) == public
    monkeypatch.setattr(signing.getpass, "getpass", lambda prompt: "")
    monkeypatch.setenv("FLEXOLMO_KEY_PASSPHRASE", "säsam")
    assert encode_public(read_private_key(path)) == public
    with pytest.raises(SignatureError, match="passphrase is empty"):
        create_key(tmp_path / "other", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k", "k.pub"]


# --- signatures --------------------------------------------------------------------------------


def test_a_signature_names_its_files_and_its_subject(keys, signature):
    public = (keys / "ann.pub").read_bytes()
    found = read_signature(signature, public)
    assert found == signing.Signed("x.bundle", key_id(public), DIGESTS)


def test_a_signature_by_the_model_signing_package_is_read(keys, tmp_path):
    """The other way round is tested with a whole bundle."""
    from model_signing import hashing
    from model_signing import signing as stock

    (tmp_path / "x.bundle").mkdir()
    for name in DIGESTS:
        (tmp_path / "x.bundle" / name).write_text(name)
    config = stock.Config().use_elliptic_key_signer(private_key=keys / "ann")
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False))
    config.sign(tmp_path / "x.bundle", tmp_path / "signature.sig")
    signature = (tmp_path / "signature.sig").read_bytes()
    found = read_signature(signature, (keys / "ann.pub").read_bytes())
    assert (found.subject, found.digests) == ("x.bundle", DIGESTS)


def test_another_key_is_refused(keys, signature):
    with pytest.raises(SignatureError, match=r"signature\.sig.*signer\.pub"):
        read_signature(signature, (keys / "bob.pub").read_bytes())


@pytest.mark.parametrize("at", ["payload", "sig"])
def test_a_forged_payload_or_signature_is_refused(keys, signature, at):
    public = (keys / "ann.pub").read_bytes()
    envelope = json.loads(signature)["dsseEnvelope"]
    payload, sig = envelope["payload"], envelope["signatures"][0]["sig"]
    if at == "payload":
        other = base64.b64decode(payload).replace(b"x.bundle", b"y.bundle")
        payload = base64.b64encode(other).decode()
    else:
        sig = json.loads(sign_files("y.bundle", DIGESTS, read_private_key(keys / "ann")))[
            "dsseEnvelope"
        ]
        sig = sig["signatures"][0]["sig"]
    forged = signing._signature_file(public, payload, sig)
    with pytest.raises(SignatureError, match="not a signature by the key"):
        read_signature(forged, public)


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
        read_signature(change(signature), (keys / "ann.pub").read_bytes())
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


def first_file(statement):
    """The first file of a statement."""
    return statement["predicate"]["resources"][0]


def change_statement(change):
    statement = signing._statement("x.bundle", DIGESTS)
    change(statement)
    return statement


def test_a_hand_made_signature_of_the_right_statement_holds(keys):
    honest = sign_statement(keys / "ann", change_statement(lambda s: None))
    assert read_signature(honest, (keys / "ann.pub").read_bytes()).subject == "x.bundle"


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
        change_statement(lambda s: s["predicate"]["serialization"].update(allow_symlinks=0)),
        change_statement(lambda s: s["predicate"]["resources"].append(dict(first_file(s)))),
        change_statement(lambda s: first_file(s).update(digest=first_file(s)["digest"].upper())),
    ],
)
def test_a_trusted_signer_cannot_sign_in_another_manner(keys, statement):
    with pytest.raises(SignatureError, match=r"signature\.sig|was signed"):
        read_signature(sign_statement(keys / "ann", statement), (keys / "ann.pub").read_bytes())


@pytest.mark.parametrize("change", [lambda p: p + b"\n", lambda p: b"x" + p, lambda p: p[:50]])
def test_a_signer_key_has_one_spelling_only(keys, signature, change):
    with pytest.raises(SignatureError, match=r"signer\.pub"):
        read_signature(signature, change((keys / "ann.pub").read_bytes()))
