"""Nobody is taken for anybody else: API keys and tokens, genuine, forged and late."""

import base64
import datetime
import hashlib
import hmac
import http.server
import json
import os
import re
import stat
import threading
import time
from pathlib import Path
from typing import ClassVar

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.serving import tokens
from flexolmo.serving.identity import NoIdentity, ProvenIdentity
from flexolmo.serving.keys import add_key, read_keys, revoke_key
from flexolmo.serving.policy import Principal
from flexolmo.serving.refusal import Refusal

ISSUER = "https://login.example.org/realms/clinic"
TODAY = datetime.datetime.now(datetime.UTC).date()
DAY = datetime.timedelta(days=1)


def refused(identity, authorization):
    """Status and code of the refusal."""
    with pytest.raises(Refusal) as caught:
        identity.identify(authorization)
    words = str(caught.value)
    assert authorization is None or len(authorization) < 20 or authorization[7:] not in words
    return caught.value.status, caught.value.code


# --- API keys -----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def by_key(tmp_path, file):
    """Identity by the keys in `file` alone."""
    add_key(file, "somebody else", ["clinic"], ["admin"])
    (tmp_path / "auth.toml").write_text('api_keys = "keys.json"\n')
    return ProvenIdentity(tmp_path / "auth.toml")


def test_a_key_stands_for_its_person_groups_and_roles(by_key, file):
    key = add_key(file, "alice", ["ward", "clinic"], ["doctor"], TODAY)
    assert refused(by_key, f"Bearer {key}") == (401, "invalid_api_key")
    by_key.reread()
    expected = Principal("alice", frozenset({"clinic", "ward"}), frozenset({"doctor"}))
    assert by_key.identify(f"Bearer {key}") == expected == by_key.identify(f"bearer  {key} ")


def test_only_a_keys_hash_is_kept_in_a_file_that_its_user_alone_reads(file):
    key = add_key(file, "alice")
    data = file.read_bytes()
    assert key.encode() not in data and key.split("_")[2].encode() not in data
    assert hashlib.sha256(key.encode()).hexdigest().encode() in data
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(key.split("_")[2]) == 64 and add_key(file, "alice") != key


@pytest.mark.parametrize(
    "wrong", [None, "", "Bearer", "Bearer ", "Basic YTpi", "Token x", "Bearer x", "Bearer x.y.z"]
)
def test_without_a_key_nobody_is_let_in(by_key, wrong):
    assert refused(by_key, wrong)[0] == 401


def test_a_changed_key_is_no_key(by_key, file):
    key = add_key(file, "alice")
    by_key.reread()
    for place in range(len("flexolmo_"), len(key)):
        other = "0" if key[place] != "0" else "1"
        assert refused(by_key, f"Bearer {key[:place]}{other}{key[place + 1 :]}")[0] == 401
    assert refused(by_key, f"Bearer {key}0")[0] == 401
    assert refused(by_key, f"Bearer {key[:-1]}")[0] == 401


def test_a_revoked_key_is_refused_and_others_go_on(by_key, file):
    keys = [add_key(file, name) for name in ("alice", "bob")]
    number = keys[0].split("_")[1]
    assert revoke_key(file, number).revoked == TODAY
    assert revoke_key(file, number).revoked == TODAY
    by_key.reread()
    assert refused(by_key, f"Bearer {keys[0]}") == (401, "revoked_api_key")
    assert by_key.identify(f"Bearer {keys[1]}").subject == "bob"
    with pytest.raises(ConfigError, match="has no key 'ffff'"):
        revoke_key(file, "ffff")


def test_a_key_ends_after_its_last_day(by_key, file):
    key = add_key(file, "alice", expires=TODAY)
    content = json.loads(file.read_text())
    content["keys"][-1]["expires"] = str(TODAY - DAY)
    file.write_text(json.dumps(content))
    by_key.reread()
    assert refused(by_key, f"Bearer {key}") == (401, "expired_api_key")
    with pytest.raises(ConfigError, match="would have expired"):
        add_key(file, "alice", expires=TODAY - DAY)


@pytest.mark.parametrize("subject, groups", [("", []), ("a\nb", []), ("a", [""]), ("a" * 257, [])])
def test_names_that_cannot_be_judged_get_no_key(file, subject, groups):
    with pytest.raises(ConfigError, match="cannot name"):
        add_key(file, subject, groups)
    assert not file.exists()


def test_keys_that_others_may_change_or_that_are_none_are_not_read(by_key, file):
    key = add_key(file, "alice")
    by_key.reread()
    good = file.read_bytes()
    os.chmod(file, 0o620)
    with pytest.raises(ConfigError, match="mode 0620"):
        by_key.reread()
    os.chmod(file, 0o600)
    for bad in (b"", b"[]", good[:-4], good.replace(b'"alice"', b'""'), good.replace(b"256", b"1")):
        file.write_bytes(bad)
        with pytest.raises(ConfigError, match="not a file of API keys"):
            by_key.reread()
    twice = good.replace(b'"subject": "alice"', b'"subject": "bob", "subject": "alice"')
    file.write_bytes(twice)
    with pytest.raises(ConfigError, match="appears twice"):
        by_key.reread()
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        by_key.reread()
    assert by_key.identify(f"Bearer {key}").subject == "alice"  # as it was


def test_many_who_add_keys_at_once_lose_none(file):
    threads = [threading.Thread(target=add_key, args=(file, f"user {n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.subject for key in read_keys(file).values()} == {f"user {n}" for n in range(8)}


# --- tokens -------------------------------------------------------------------------------------


def public_jwk(key, kid, **more):
    """The public half of `key` as a JSON Web Key."""
    kind = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    algorithm = next(a for k, a in kind.items() if isinstance(key, k))
    return algorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid} | more


@pytest.fixture(scope="module")
def private():
    """Keys of the issuer by id, and one of nobody's."""
    return {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ec": ec.generate_private_key(ec.SECP256R1()),
        "ed": ed25519.Ed25519PrivateKey.generate(),
        "stranger": ec.generate_private_key(ec.SECP256R1()),
    }


def claims(**changes):
    """Claims of a good token, but for `changes`; None takes a claim out."""
    now = int(time.time())
    usual = {
        "iss": ISSUER,
        "aud": "flexolmo",
        "sub": "alice",
        "exp": now + 600,
        "nbf": now,
        "groups": ["clinic", "/ward 7"],
        "realm": {"roles": ["doctor"]},
    }
    return {name: value for name, value in (usual | changes).items() if value is not None}


@pytest.fixture
def write_auth(tmp_path, private):
    """`write_auth(**settings)`: the path of settings with tokens checked by a file of keys."""
    keys = [public_jwk(private[kid], kid) for kid in ("rsa", "ec", "ed")]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))

    def write(**changes):
        usual = {"issuer": ISSUER, "audience": "flexolmo", "jwks": "jwks.json"}
        usual |= {"roles_claim": "realm.roles"}
        given = {name: value for name, value in (usual | changes).items() if value is not None}
        lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
        (tmp_path / "auth.toml").write_text("\n".join(["[tokens]", *lines]))
        return tmp_path / "auth.toml"

    return write


@pytest.fixture
def by_token(write_auth):
    return ProvenIdentity(write_auth())


@pytest.fixture
def sign(private):
    """`sign(**changes of claims)`: a token with the signature of one of `private`."""

    def make(kid="ec", algorithm="ES256", key=None, headers=None, **changes):
        said = {n: v for n, v in ({"kid": kid} | (headers or {})).items() if v is not None}
        payload = json.dumps(claims(**changes)).encode()  # claims that `jwt.encode` would refuse
        return "Bearer " + jwt.api_jws.encode(payload, key or private[kid], algorithm, headers=said)

    return make


@pytest.mark.parametrize("kid, algorithm", [("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")])
def test_a_genuine_token_names_its_person(by_token, sign, kid, algorithm):
    found = by_token.identify(sign(kid, algorithm))
    assert found == Principal("alice", frozenset({"clinic", "/ward 7"}), frozenset({"doctor"}))


def test_one_name_may_stand_for_a_list_and_none_for_an_empty_one(by_token, sign):
    assert by_token.identify(sign(groups="clinic")).groups == {"clinic"}
    assert by_token.identify(sign(groups=None, realm=None)) == Principal("alice")


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"sub": None},
        {"iss": None},
        {"aud": None},
        {"exp": int(time.time()) - 31},
        {"nbf": 4_000_000_000},
        {"iat": 4_000_000_000},
        {"iss": ISSUER + "/"},
        {"iss": [ISSUER]},
        {"aud": "another"},
        {"aud": []},
        {"aud": ["another", "flexolm"]},
        {"sub": ""},
        {"sub": 7},
        {"sub": "a\x1b[0m"},
        {"groups": [1]},
        {"groups": {"clinic": True}},
        {"groups": ["x"] * 2 + [f"g{n}" for n in range(600)]},
        {"realm": {"roles": 7}},
        {"exp": "soon"},
        {"exp": 1e400},
    ],
)
def test_a_signed_token_whose_claims_do_not_hold_is_refused(by_token, sign, changes):
    assert refused(by_token, sign(**changes))[0] == 401


@pytest.mark.parametrize("leeway, is_let_in", [(0, False), (60, True)])
def test_clocks_may_differ_by_the_leeway_and_no_more(write_auth, sign, leeway, is_let_in):
    identity = ProvenIdentity(write_auth(leeway_seconds=leeway))
    for skewed in (sign(exp=int(time.time()) - 20), sign(nbf=int(time.time()) + 20)):
        if is_let_in:
            assert identity.identify(skewed).subject == "alice"
        else:
            assert refused(identity, skewed)[0] == 401


def encode(header, payload, signature=b""):
    """A token put together by hand."""
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    return "Bearer " + b".".join(base64.urlsafe_b64encode(p).rstrip(b"=") for p in parts).decode()


@pytest.mark.parametrize("name", ["none", "None", "NONE", "", None, "HS256", "ES256K", ["ES256"]])
def test_an_algorithm_that_is_not_on_the_list_is_refused(by_token, name):
    assert refused(by_token, encode({"alg": name, "kid": "ec"}, claims()))[0] == 401


def test_a_public_key_is_no_secret_to_sign_with(by_token, private, tmp_path):
    """Key confusion: HMAC with what everybody knows of the issuer's key."""
    public = private["rsa"].public_key()
    known = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        (tmp_path / "jwks.json").read_bytes(),
        json.dumps(public_jwk(private["rsa"], "rsa")).encode(),
        b"",
    ]
    for secret in known:
        for name, digest in (("HS256", "sha256"), ("RS256", "sha256"), ("HS512", "sha512")):
            signed = encode({"alg": name, "kid": "rsa"}, claims())[7:].rpartition(".")[0]
            mac = hmac.digest(secret, signed.encode(), digest)
            forged = encode({"alg": name, "kid": "rsa"}, claims(), mac)
            assert refused(by_token, forged)[0] == 401


def test_a_shared_secret_cannot_be_asked_for(write_auth, tmp_path):
    with pytest.raises(ConfigError, match="algorithms"):
        ProvenIdentity(write_auth(algorithms=["HS256"]))
    with pytest.raises(ConfigError, match="algorithms"):
        ProvenIdentity(write_auth(algorithms=["none"]))
    secret = {"kty": "oct", "kid": "x", "k": base64.urlsafe_b64encode(b"s" * 32).decode()}
    path = write_auth()
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [secret]}))
    identity = ProvenIdentity(path)
    token = jwt.encode(claims(), b"s" * 32, "HS256", headers={"kid": "x"})
    assert refused(identity, f"Bearer {token}")[0] == 401


def test_a_token_of_a_stranger_or_for_a_key_of_another_kind_is_refused(by_token, sign, private):
    stranger = private["stranger"]
    assert refused(by_token, sign("ec", key=stranger))[0] == 401
    assert refused(by_token, sign("stranger"))[0] == 401
    assert refused(by_token, sign("rsa", key=stranger))[0] == 401
    assert refused(by_token, sign("ec", headers={"kid": None}))[0] == 401  # three keys: which?
    own = public_jwk(stranger, "own")
    assert refused(by_token, sign("ec", key=stranger, headers={"jwk": own}))[0] == 401
    assert refused(by_token, sign("ec", headers={"crit": ["x"], "x": 1}))[0] == 401
    token = sign("ec")
    assert refused(by_token, token[:-6] + "AAAAAA")[0] == 401
    assert by_token.identify(token).subject == "alice"


def test_a_key_for_encryption_or_a_short_one_signs_nothing(write_auth, private, sign, tmp_path):
    path = write_auth()
    weak = rsa.generate_private_key(65537, 1024)
    keys = [public_jwk(private["ec"], "ec", use="enc"), public_jwk(weak, "weak")]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))
    identity = ProvenIdentity(path)
    assert refused(identity, sign("ec"))[0] == 401
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        token = sign("weak", "RS256", key=weak)
    assert refused(identity, token)[0] == 401


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(st.binary(max_size=30).map(base64.urlsafe_b64encode).map(bytes.decode)).map(
            ".".join
        ),
    )
)
def test_hostile_tokens_are_refused_whatever_they_are(by_token, text):
    with pytest.raises(Refusal) as caught:
        by_token.identify("Bearer " + text)
    assert caught.value.status == 401


def test_a_header_that_is_deep_or_long_is_refused(by_token):
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode()
    assert refused(by_token, f"Bearer {deep}.e30.")[0] == 401
    assert refused(by_token, "Bearer " + "a" * (tokens.MAX_TOKEN_CHARACTERS + 1))[0] == 401


def test_claims_whose_own_names_hold_dots_are_found(write_auth, sign):
    identity = ProvenIdentity(write_auth(groups_claim="https://example.org/groups"))
    assert identity.identify(sign(**{"https://example.org/groups": ["a"]})).groups == {"a"}


# --- an issuer that is asked for its keys -------------------------------------------------------


class Issuer(http.server.BaseHTTPRequestHandler):
    """An identity provider: `documents` by path."""

    documents: ClassVar[dict] = {}
    asked: ClassVar[list] = []

    def do_GET(self):
        self.asked.append(self.path)
        found = self.documents.get(self.path)
        self.send_response(404 if found is None else found.get("status", 200))
        for name, value in (found or {}).get("headers", {}).items():
            self.send_header(name, value)
        self.end_headers()
        if found is not None:
            self.wfile.write(found["body"])

    def log_message(self, *_):
        pass


@pytest.fixture
def issuer(private):
    """A running issuer; `documents` say what it answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Issuer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    discovery = {"issuer": server.address, "jwks_uri": f"{server.address}/jwks"}
    Issuer.documents = {
        "/.well-known/openid-configuration": {"body": json.dumps(discovery).encode()},
        "/jwks": {"body": json.dumps({"keys": [public_jwk(private["ec"], "ec")]}).encode()},
    }
    Issuer.asked = []
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]`: seconds that the monotonic clock of tokens shows."""
    now = [1000.0]
    monkeypatch.setattr(tokens.time, "monotonic", lambda: now[0])
    return now


def test_keys_are_found_by_discovery_and_fetched_only_by_refresh(write_auth, sign, issuer, clock):
    identity = ProvenIdentity(write_auth(issuer=issuer.address, jwks=None))
    good = sign(iss=issuer.address)
    assert refused(identity, good) == (503, "issuer_unavailable") and not Issuer.asked
    identity.refresh()
    assert identity.identify(good).subject == "alice"
    for _ in range(3):
        identity.refresh()
    assert Issuer.asked == ["/.well-known/openid-configuration", "/jwks"]


def test_a_new_key_is_fetched_once_it_is_seen_but_not_at_will(
    write_auth, sign, issuer, clock, private
):
    identity = ProvenIdentity(write_auth(issuer=issuer.address, jwks=issuer.address + "/jwks"))
    identity.refresh()
    new = sign("ed", "EdDSA", iss=issuer.address)
    Issuer.documents["/jwks"] = {
        "body": json.dumps({"keys": [public_jwk(private["ed"], "ed")]}).encode()
    }
    for _ in range(5):
        assert refused(identity, new) == (401, "invalid_token")
        identity.refresh()
    assert len(Issuer.asked) == 1  # whatever tokens say, once in ten seconds
    clock[0] += 10
    identity.refresh()
    assert identity.identify(new).subject == "alice"
    assert refused(identity, sign(iss=issuer.address))[0] == 401  # the former key is gone


def test_an_issuer_that_is_down_keeps_its_keys_for_an_hour(write_auth, sign, issuer, clock):
    identity = ProvenIdentity(write_auth(issuer=issuer.address, jwks=issuer.address + "/jwks"))
    identity.refresh()
    good = sign(iss=issuer.address)
    Issuer.documents = {}
    clock[0] += 301
    with pytest.raises(ConfigError, match="cannot be fetched"):
        identity.refresh()
    assert identity.identify(good).subject == "alice"
    clock[0] += 3400
    assert refused(identity, good) == (503, "issuer_unavailable")


@pytest.mark.parametrize(
    "document",
    [
        {"body": b"{"},
        {"body": b"[]"},
        {"body": b'{"keys": []}'},
        {"body": b'{"keys": {}}'},
        {"body": b"[" * 100_000},
        {"body": b" " * (tokens.MAX_DOCUMENT_BYTES + 1)},
        {"body": b"", "status": 302, "headers": {"Location": "/other"}},
        {"body": b"", "status": 500},
    ],
)
def test_an_issuer_that_answers_nonsense_changes_nothing(write_auth, sign, issuer, clock, document):
    identity = ProvenIdentity(write_auth(issuer=issuer.address, jwks=issuer.address + "/jwks"))
    identity.refresh()
    Issuer.documents = {"/jwks": document, "/other": Issuer.documents["/jwks"]}
    clock[0] += 301
    with pytest.raises(ConfigError, match="cannot be fetched"):
        identity.refresh()
    assert identity.identify(sign(iss=issuer.address)).subject == "alice"


@pytest.mark.parametrize(
    "said", [{"issuer": "https://other.example"}, {"jwks_uri": "http://x.org"}]
)
def test_discovery_by_another_issuer_or_to_an_open_address_is_refused(write_auth, issuer, said):
    discovery = {"issuer": issuer.address, "jwks_uri": f"{issuer.address}/jwks"} | said
    body = json.dumps(discovery).encode()
    Issuer.documents["/.well-known/openid-configuration"] = {"body": body}
    identity = ProvenIdentity(write_auth(issuer=issuer.address, jwks=None))
    with pytest.raises(ConfigError, match="cannot be fetched"):
        identity.refresh()
    assert "/jwks" not in Issuer.asked


def test_reading_the_settings_again_keeps_fetched_keys(write_auth, sign, issuer, clock):
    identity = ProvenIdentity(write_auth(issuer=issuer.address, jwks=issuer.address + "/jwks"))
    identity.refresh()
    Issuer.documents = {}
    identity.reread()
    assert identity.identify(sign(iss=issuer.address)).subject == "alice"
    write_auth(issuer=issuer.address, jwks=issuer.address + "/jwks", audience="other")
    identity.reread()
    assert refused(identity, sign(iss=issuer.address))[0] == 503


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "nobody could ask"),
        ("api_key = 'x'", "Did you mean api_keys"),
        ("[tokens]\nissuer = 'https://x.org'", "audience"),
        ("[tokens]\nissuer = 'http://x.org'\naudience = 'a'", "https://"),
        ("[tokens]\nissuer = 'https://x'\naudience = 'a'\njwks = 'ftp://x'", "https://"),
        ("[tokens]\nissuer = 'https://x'\naudience = 'a'\njwks = 'none.json'", "none.json"),
        ("[tokens]\nissuer = 'https://x'\naudience = ''", "audience"),
        ("[tokens]\nissuer = 'https://x'\naudience = 'a'\nleeway_seconds = 9999", "leeway"),
        ("api_keys = 'missing.json'", "missing.json"),
        ("[", "TOML"),
    ],
)
def test_settings_that_let_in_nobody_or_anybody_are_refused(tmp_path, text, words):
    path = tmp_path / "auth.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        ProvenIdentity(path)


def test_keys_and_tokens_can_be_taken_together(write_auth, sign, file):
    key = add_key(file, "robot")
    path = write_auth()
    path.write_text('api_keys = "keys.json"\n' + path.read_text())
    identity = ProvenIdentity(path)
    assert identity.identify(f"Bearer {key}").subject == "robot"
    assert identity.identify(sign()).subject == "alice"
    assert {p.name for p in identity.files} == {"auth.toml", "keys.json", "jwks.json"}


def test_without_identity_everybody_is_local():
    assert NoIdentity().identify(None) == NoIdentity().identify("Bearer x") == Principal("local")


def test_the_settings_in_the_guide_are_settings(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", guide, re.S)
    (tmp_path / "auth.toml").write_text(text)
    assert ProvenIdentity(tmp_path / "auth.toml").files == [tmp_path / "auth.toml"]
    rows = set(re.findall(r"^\| (`[a-z_`, ]+) \|", guide.split("| key of")[1], re.M))
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named >= set(tokens.TokenSettings.model_fields)
