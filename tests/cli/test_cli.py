"""The command line: help that helps, and errors that are sentences, not tracebacks."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import flexolmo.cli
from flexolmo.bundle.trust import ANY_SIGNER
from flexolmo.cli import app, main
from flexolmo.errors import SourceUnavailable
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import load_mixture
from flexolmo.numbers import format_percent
from flexolmo.research.tasks.items import Item
from made_items import choice_items, task_of, written_items

NAMES = ("amber", "basalt", "zinc")


def walk(command, path=()):
    """Every verb and group of verbs with the words that lead to it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


VERBS = dict(walk(typer.main.get_command(app)))


# --- help ---------------------------------------------------------------------------------------


def test_there_is_one_verb_for_each_stage():
    assert {path[0] for path in VERBS if path} == {
        "data",
        "anchor",
        "expert",
        "mix",
        "generate",
        "policy",
        "serve",
        "trace",
        "audit",
        "eval",
        "demo",
        "study",
        "plan",
        "doctor",
    }
    assert {path[1] for path in VERBS if path[:1] == ("mix",) and path[1:]} == {
        "check",
        "build",
        "add",
        "remove",
        "refresh",
        "prove-optout",
        "verify-optout",
        "inspect",
        "export",
        "import",
    }


@pytest.mark.parametrize("path", VERBS, ids=lambda p: " ".join(p) or "flexolmo")
def test_help_explains_every_option(path):
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    command = VERBS[path]
    assert command.help and command.help.split("\n")[0].split(".")[0] in result.output
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert any(name in result.output for name in parameter.opts), parameter.opts
            assert parameter.help or parameter.name == "help", f"{parameter.name} has no help"
        else:
            assert parameter.name.rstrip("_") in result.output.lower()
            assert parameter.help
    for name, inner in getattr(command, "commands", {}).items():
        assert (name in result.output or inner.hidden) and inner.help


@pytest.mark.parametrize("path", [p for p, c in VERBS.items() if hasattr(c, "commands")])
def test_a_group_without_a_verb_shows_its_verbs(path):
    result = CliRunner().invoke(app, list(path))
    verbs = VERBS[path].commands.items()
    assert all(name in result.output for name, verb in verbs if not verb.hidden)


def test_examples_in_help_are_commands_that_exist():
    for path, command in VERBS.items():
        if hasattr(command, "commands"):
            continue
        known = {o for p in command.params for o in p.opts}
        for line in map(str.strip, (command.help or "").splitlines()):
            words = line[max(line.find("flexolmo "), 0) :].split()
            if words[:1] == ["flexolmo"]:
                assert tuple(words[1 : 1 + len(path)]) == path
                assert {w for w in words if w.startswith("-")} <= known, line


def imported_by_running(*words):
    """Top-level packages that Python has after running the command line, and torch's compiler."""
    code = (
        "import sys\nfrom flexolmo.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print({n.split('.')[0] for n in sys.modules} | ({'torch._dynamo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_help_imports_nothing_heavy():
    found = imported_by_running("--help")
    assert "typer" in found
    heavy = {"torch", "numpy", "scipy", "transformers", "tokenizers", "pydantic", "pyarrow"}
    assert not found & (heavy | {"matplotlib", "jinja2", "pandas", "sklearn", "datasketch"})


def test_writing_a_text_imports_neither_stock_nor_a_compiler(house, trust_dir):
    model = str(house.mixture_dir(NAMES))
    options = ["--trust", str(trust_dir), "--prompt", "one", "--max-new-tokens", "1"]
    found = imported_by_running("generate", "--model", model, *options)
    assert "torch" in found
    heavy = {"transformers", "scipy", "sklearn", "pandas", "sympy", "matplotlib", "jinja2"}
    assert not found & (heavy | {"torch._dynamo", "datasketch", "pyarrow"})


def test_the_version_is_told(works):
    assert works("--version").strip() == "0.1.0"


# --- refusals -----------------------------------------------------------------------------------


def is_plain_refusal(result, *parts):
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err
    return err


def test_what_someone_must_mend_is_said_in_a_sentence(run, house, pico_set_dirs, tmp_path):
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    bad_toml = tmp_path / "bad.toml"
    bad_toml.write_text("[train")
    model = house.mixture_dir(NAMES)
    anchor, public = house.anchor_dir, pico_set_dirs["public"]
    train = ("anchor", "train", "--data", public, "--out", tmp_path / "a")
    for words, parts in (
        ((*train, "--recipe", tmp_path / "absent.toml"), ["ConfigError", "absent.toml"]),
        ((*train, "--recipe", bad_toml), ["ConfigError", "bad.toml", "TOML"]),
        ((*train, "--set", "train.stepz=3"), ["ConfigError", "train.stepz"]),
        ((*train, "--set", "steps"), ["section.key=value"]),
        (("demo", "--out", tmp_path / "d", "--recipe", bad_toml), ["bad.toml"]),
        (("demo", "--out", tmp_path / "d", "--set", "sead=1"), ["Did you mean seed?"]),
        (("demo", "--out", tmp_path / "d", "--sets", "code,nosuch"), ["nosuch", "academic"]),
        (("generate", "--model", tmp_path / "none", "--prompt", "x"), [tmp_path / "none"]),
        (("eval", "sets", "--model", tmp_path / "none", "--data", public), [tmp_path / "none"]),
        (("eval", "--limit", "3"), ["--model"]),
        (("eval", "--model", tmp_path), ["CheckpointError", "holds no model"]),
        (("eval", "--model", model, "--without", "news"), ["Unknown expert news"]),
        (("eval", "--model", model, "--tasks", "arc"), ["Unknown task arc", "arc_easy"]),
        (("eval", "--model", model, "--items", tmp_path / "none"), ["not a directory"]),
        (("eval", "--suite", "mine", "--model", model), ["flexolmo31"]),
        (("mix", "inspect", tmp_path), ["mixture.json"]),
        (("mix", "inspect", tmp_path / "none"), ["none does not exist", "flexolmo mix build"]),
        (
            ("mix", "import", tmp_path / "none", "--dry-run"),
            ["none does not exist; expected a directory with config.json"],
        ),
        (("anchor", "inspect", tmp_path), ["anchor.json"]),
        (
            ("mix", "build", tmp_path / "none", house.bundle("amber"), "-o", tmp_path / "m"),
            [tmp_path / "none"],
        ),
        (
            ("generate", "--model", model, "--prompt", "x", "--without", "news"),
            ["PolicyError", "Unknown expert news", "amber, basalt, zinc"],
        ),
        (("generate", "--model", model, "--prompt", "x", "--only", "amber,news"), ["news"]),
        *(
            (("generate", "--model", model, "--prompt", "x", option, text), ["PolicyError", option])
            for option in ("--without", "--only")
            for text in ("", " ", ",", "amber,", "amber,,zinc")
        ),
        (
            ("generate", "--model", model, "--prompt", "x", "--only", "amber", "--without", "zinc"),
            ["not both"],
        ),
        (
            ("generate", "--model", anchor, "--prompt", "x", "--without", "amber"),
            ["Unknown expert amber", "none"],
        ),
        (("generate", "--model", model, "--prompt", "x", "--top-p", "0"), ["top_p"]),
        (("generate", "--model", model, "--prompt", "long " * 999), ["512 positions"]),
        (("mix", "build", anchor, public, "-o", tmp_path / "m"), ["missing: manifest.json"]),
        (("mix", "build", anchor, bad_toml, "-o", tmp_path / "m"), ["bad.toml"]),
        (("mix", "remove", model, "news"), ["No expert news"]),
        (("mix", "export", model, "-o", tmp_path / "hf", "--to", "gguf"), ["gguf", "hf"]),
        (
            ("mix", "export", model, "-o", tmp_path / "hf", "--code", "--data", public),
            ["--data refits a router", "--code"],
        ),
        (
            ("mix", "export", house.mixture_dir(NAMES, "rich"), "-o", tmp_path / "hf"),
            ["amber, basalt, zinc also change", "--scope ffn"],
        ),
        (("expert", "verify", public), ["missing: manifest.json"]),
        (
            ("expert", "verify", house.bundle("amber"), "--trust", nobody),
            ["SignatureError", "unknown key"],
        ),
        (
            (
                *("expert", "pack", tmp_path, "--key", "k", "--owner", "A", "--licence", "MIT"),
                *("--purpose", "any"),
            ),
            ["expert.json"],
        ),
        (
            (
                *("expert", "pack", tmp_path, "--key", "k", "--owner", "A", "--licence", "MIT"),
                *("--purpose", "research"),
            ),
            ["'research'", "general-research", "flexolmo expert purposes"],
        ),
        (("eval", "sets", "--model", model, "--data", tmp_path), ["card.json"]),
        (
            ("eval", "sets", "--model", model, "--data", public, "--split", "train"),
            ["heldout", "validation"],
        ),
    ):
        is_plain_refusal(run(*words), *parts)
    assert not (tmp_path / "m").exists() and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["nosuch"],
        ["mix", "nosuch"],
        ["generate"],
        ["generate", "--prompt", "x"],
        ["generate", "--model", "m", "--prompt", "x", "--temperature", "-1"],
        ["generate", "--model", "m", "--prompt", "x", "--nosuch"],
        ["mix", "build", "anchor", "b", "-o", "m", "--top-k", "0"],
        [
            "expert",
            "pack",
            "r",
            "--key",
            "k",
            "--owner",
            "A",
            "--licence",
            "M",
            "--purpose",
            "any",
            "--valid-until",
            "soon",
        ],
        ["expert", "pack", "r", "--key", "k", "--owner", "A", "--licence", "M"],  # no purpose
        ["expert", "revoke", "--key", "k", "--owner", "A"],  # no reason
        ["mix", "refresh", "m"],
    ],
)
def test_a_command_that_cannot_be_read_is_refused_with_usage(run, words):
    err = is_plain_refusal(run(*words))
    assert "Usage" in err


@pytest.mark.parametrize("flag", [("--seq-len", "0"), ("--threads", "0"), ("--max-bytes", "-1")])
def test_a_number_that_cannot_be_is_refused(run, house, pico_set_dirs, tmp_path, flag):
    is_plain_refusal(
        run(
            "eval",
            "sets",
            "--model",
            house.mixture_dir(["amber"]),
            "--data",
            pico_set_dirs["maths"],
            "--out",
            tmp_path / "eval",
            *flag,
        )
    )


def test_two_sets_of_one_name_are_refused(run, house, pico_set_dirs, tmp_path):
    data = ["--data", pico_set_dirs["maths"]] * 2
    is_plain_refusal(
        run(
            "eval",
            "sets",
            "--model",
            house.mixture_dir(["amber"]),
            *data,
            "--out",
            tmp_path / "eval",
        ),
        "maths",
    )


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexolmo.merge.index.read_about", stop)
    code, _, err = run("mix", "inspect", "m")
    assert code == 130 and "Traceback" not in err
    assert "Run the same command again" in err


def test_a_defect_of_ours_is_not_dressed_up(monkeypatch):
    def break_(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("flexolmo.merge.index.read_about", break_)
    monkeypatch.setattr(sys, "argv", ["flexolmo", "mix", "inspect", "m"])
    with pytest.raises(ZeroDivisionError):
        main()


# --- the verbs that work ------------------------------------------------------------------------


def test_a_coordinator_builds_adds_removes_and_inspects(works, house, trust_dir, tmp_path):
    model = tmp_path / "m"
    bundles = [house.bundle(n) for n in NAMES]
    said = works(
        "mix",
        "build",
        house.anchor_dir,
        *bundles[:2],
        "--trust",
        trust_dir,
        "-o",
        model,
        "--top-k",
        "2",
    )
    assert "public + amber, basalt" in said
    works("mix", "add", model, bundles[2], "--trust", trust_dir)
    about = read_about(model)
    assert json.loads(works("mix", "inspect", model, "--json")) == about
    told = works("mix", "inspect", model)
    claimed = [(name, e["owner"], e["licence"]) for name, e in about["experts"].items()]
    assert len(claimed) == 3 and all(value in told for row in claimed for value in row)
    assert about["anchor_digest"] in told and "active for a token: 2" in told
    index = (model / "mixture.json").read_text()
    edited = re.sub(r'("weights_bytes|"tokens_seen)": \d+', r'\1": ["much"]', index)
    (model / "mixture.json").write_text(edited)  # which is nobody's signature
    assert "much" in works("mix", "inspect", model)
    (model / "mixture.json").write_text(index)
    assert read_about(model)["top_k"] == 2
    said = works("mix", "remove", model, *NAMES)
    assert "no owner" in said
    works("mix", "add", model, bundles[0], "--trust-any-signer")
    assert load_mixture(model, ANY_SIGNER).expert_names == ["amber"]


def test_a_coordinator_checks_what_bundles_do_and_keeps_limits(
    run, works, house, pico_set_dirs, trust_dir, tmp_path, monkeypatch
):
    from flexolmo.evaluation import influence

    for name, value in (("PUBLIC_BYTES", 1500), ("FORM_BYTES", 200), ("OWN_TOKENS", 12)):
        monkeypatch.setattr(influence, name, value)
    public, model = ("--public", pico_set_dirs["public"]), tmp_path / "m"
    door = (house.bundle("amber"), "--anchor", house.anchor_dir, *public, "--trust", trust_dir)
    said = works("mix", "check", *door, "--out", tmp_path / "check.json")
    found = json.loads((tmp_path / "check.json").read_text())
    weight = found["experts"]["amber"]["public"]["weight"]
    assert format_percent(weight) in said and found["newcomers"] == ["amber"] and "others:" in said
    claim = ("--require", "claims<=0.01%", "--seed", found["seed"])
    code, said, err = run("mix", "check", *door, *claim)
    assert code == 2 and "amber: claims is" in err and "the limit is 0.01\u00a0%" in err
    assert format_percent(weight) in said
    assert run("mix", "check", *door, "--require", "")[0] == 2
    code, _, err = run("mix", "check", house.bundle("amber"), *public, "--trust", trust_dir)
    assert code == 2 and "--anchor" in err and "--model" in err
    build = ("mix", "build", house.anchor_dir, house.bundle("amber"), "--trust", trust_dir)
    code, _, err = run(*build, "-o", model, "--require", "claims<=99%")
    assert code == 2 and "give --public" in err
    code, _, err = run(*build, "-o", model, *public, "--require", "claims<=0.01%")
    assert code == 2 and "amber: claims is" in err and not model.exists()
    works(*build, "-o", model, *public, "--require", "claims<=99.5%")
    assert read_about(model)["influence"]["limits"] == {"claims": 0.995}
    add = ("mix", "add", model, house.bundle("zinc"), "--trust", trust_dir)
    assert run(*add)[0] == 2
    works(*add, *public)
    about = read_about(model)["influence"]
    assert about["limits"] == {"claims": 0.995} and set(about["experts"]) == {"amber", "zinc"}
    other = ("--public", pico_set_dirs["maths"])
    code, _, err = run("mix", "add", model, house.bundle("basalt"), "--trust", trust_dir, *other)
    assert code == 2 and "measured on the public set" in err
    last = (house.bundle("basalt"), "--model", model, *public, "--trust", trust_dir)
    works("mix", "check", *last, "--out", tmp_path / "check.json")
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["newcomers"] == ["basalt"] and len(found["experts"]) == 3
    assert found["limits"] == {"claims": 0.995}
    works("mix", "add", model, *last[:1], *public, "--trust", trust_dir, "--require", "others<=9")
    assert read_about(model)["influence"]["limits"] == {"claims": 0.995, "others": 9.0}


def test_a_bundle_larger_than_allowed_is_not_added(run, house, trust_dir, tmp_path):
    start = ("mix", "build", house.anchor_dir, house.bundle("amber"), "-o", tmp_path / "m")
    code, _, err = run(*start, "--trust", trust_dir, "--max-bytes", "10")
    assert code == 2 and "expected at most 10" in err and not (tmp_path / "m").exists()
    model, bundle = house.mixture_dir(["amber"]), house.bundle("zinc")
    code, _, err = run("mix", "add", model, bundle, "--trust", trust_dir, "--max-bytes", "10")
    assert code == 2 and "expected at most 10" in err


def test_an_owner_trains_on_no_other_anchor_than_agreed(
    run, works, house, owner_keys, pico_set_dirs, tmp_path
):
    anchor = tmp_path / "anchor"
    shutil.copytree(house.anchor_dir, anchor)
    train = ("expert", "train", "--anchor", anchor, "--data", pico_set_dirs["maths"])
    train += ("--name", "maths", "--out", tmp_path / "run")
    key = owner_keys["Ann"]
    for words, parts in (
        (("--anchor-digest", "sha256:" + "7" * 64), ["CheckpointError", "expected sha256:77"]),
        (("--trust-coordinator", f"{key}.pub"), ["SignatureError", "anchor.sig"]),
    ):
        is_plain_refusal(run(*train, *words), *parts)
    assert house.anchor.digest in works("anchor", "sign", anchor, "--key", key)
    checked = ("--anchor-digest", house.anchor.digest, "--trust-coordinator", f"{key}.pub")
    assert json.loads(works(*train, *checked, "--plan", "--json"))
    (anchor / "generation_config.json").write_text("{}")
    is_plain_refusal(run(*train, *checked), "generation_config.json: changed")
    assert not (tmp_path / "run").exists()


def test_no_command_opens_a_mixture_without_being_told_whom_to_trust(
    run, works, house, trust_dir, public_set, tmp_path, monkeypatch
):
    monkeypatch.delenv("FLEXOLMO_TRUST")
    model = house.build(["amber"], tmp_path / "m")
    stranger = tmp_path / "trusted"
    stranger.mkdir()
    tail = ("--prompt", "x", "--max-new-tokens", "1")
    for words in (
        ("generate", "--model", model, *tail),
        ("eval", "--model", model),
        ("eval", "sets", "--model", model, "--data", public_set),
        ("eval", "harness", "--model", model, "--tasks", "x"),
        ("mix", "build", house.anchor_dir, house.bundle("amber"), "-o", tmp_path / "m2"),
        ("mix", "add", model, house.bundle("zinc")),
        ("mix", "export", model, "-o", tmp_path / "hf"),
    ):
        code, _, err = run(*words)
        assert code == 2 and "SignatureError: Nobody was said to be trusted" in err, (words, err)
        code, _, err = run(*words, "--trust", stranger)
        assert code == 2 and "unknown key" in err and "amber" in err, (words, err)
    assert run("mix", "remove", model, "zinc")[0] == 2
    for trust in (("--trust", trust_dir), ("--trust-any-signer",)):
        works("generate", "--model", model, *tail, *trust)
    works("mix", "remove", model, "amber", "--trust", stranger)  # who goes needs no trust


def test_a_bundle_is_verified_and_inspected(works, house, trust_dir, monkeypatch):
    monkeypatch.delenv("FLEXOLMO_TRUST")
    bundle = house.bundle("amber")
    said = works("expert", "verify", bundle, "--trust", trust_dir)
    assert "trusted owner Ann" in said and house.anchor.digest in said
    assert "unknown key" in works("expert", "verify", bundle, "--trust-any-signer")
    shown = json.loads(works("expert", "inspect", bundle, "--trust", trust_dir, "--json"))
    assert shown["verified"] is True and shown["claims"]["name"] == "amber"
    shown = json.loads(works("expert", "inspect", house.anchor_dir, "--json"))
    assert shown["verified"] is False and "missing" in shown["why_not"]


def test_people_see_each_claim_of_a_bundle_and_no_tensor(works, house, trust_dir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bundle = house.bundle("amber")
    found = json.loads(works("expert", "inspect", bundle, "--trust", trust_dir, "--json"))
    told = works("expert", "inspect", bundle, "--trust", trust_dir)
    claims = found["claims"]
    claimed = [
        claims[k] for k in ("name", "owner", "serial", "licence", "created", "anchor_digest")
    ]
    claimed += [claims["data_card_digest"], claims["weights_digest"], claims["terms"]["text"]]
    claimed += [f"{claims['tokens_seen']:,} tokens", found["key_id"], *found["file_bytes"]]
    assert all(str(claim) in told for claim in claimed)
    assert not any(name in told for name in claims["tensors"])
    assert "trusted owner Ann" in told and "no guarantee" in told
    monkeypatch.setenv("COLUMNS", "60")
    narrow = works("expert", "inspect", bundle, "--trust", trust_dir)
    assert found["key_id"] in re.sub(r"[\s│]", "", narrow)  # people compare all of it
    monkeypatch.delenv("FLEXOLMO_TRUST", raising=False)
    assert "unknown key" in works("expert", "inspect", bundle)
    assert "missing: manifest.json" in works("expert", "inspect", house.anchor_dir)


@pytest.mark.parametrize(
    "flags, options",
    [
        ([], {}),
        (["--without", "zinc, amber"], {"without": ["amber", "zinc"]}),
        (["--only", "zinc"], {"only": ["zinc"]}),
        (["--only", "public"], {"only": []}),
        (["--mix", "probabilities"], {"mix": "probabilities"}),
    ],
)
def test_generating_prints_the_prompt_and_what_python_would_give(works, house, flags, options):
    from flexolmo.inference.generate import generate
    from flexolmo.inference.sampling import Sampling

    said = works(
        "generate",
        "--model",
        house.mixture_dir(NAMES),
        "--prompt",
        "the time",
        *flags,
        "--max-new-tokens",
        "9",
        "--temperature",
        "0.9",
        "--top-k",
        "50",
        "--seed",
        "4",
    )
    sampling = Sampling(max_new_tokens=9, temperature=0.9, top_k=50, seed=4)
    text = generate(house.mixture(NAMES), ["the time"], sampling=sampling, **options)[0]
    assert said.replace("\r\n", "\n") == f"the time{text}\n"


def test_what_cannot_be_mixed_is_refused(run, house, tmp_path):
    tail = ("--prompt", "x", "--max-new-tokens", "1", "--mix")
    for model, mix, said in (
        (house.mixture_dir(NAMES), "logits", "states and probabilities are"),
        (house.anchor_dir, "probabilities", "holds no mixture"),
        (house.mixture_dir(NAMES, "linear"), "probabilities", "kind linear"),
    ):
        is_plain_refusal(run("generate", "--model", model, *tail, mix), said)


def test_an_anchor_alone_generates_as_a_mixture_with_nothing_on(works, house):
    tail = ("--prompt", "the time", "--max-new-tokens", "9", "--temperature", "0")
    assert (
        works("generate", "--model", house.anchor_dir, *tail)
        == works("generate", "--model", house.mixture_dir(NAMES), "--only", "public", *tail)
        != works("generate", "--model", house.mixture_dir(NAMES), *tail)
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_lacks_a_character_gets_its_escape(house, monkeypatch, encoding):
    words = ["--model", house.anchor_dir, "--max-new-tokens", "3", "--prompt", "caf\xe9 \u4e2d"]
    monkeypatch.setattr(sys, "argv", ["flexolmo", "generate", *map(str, words)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    written = sys.stdout.buffer.getvalue()
    assert written.startswith("caf\xe9 \u4e2d".encode(encoding, "backslashreplace"))


@pytest.mark.parametrize(
    "prompt, place", [("a\udcff", "0xff at place 1"), ("-", "0xe9 at place 3")]
)
def test_a_prompt_that_is_not_utf_8_is_refused(run, house, monkeypatch, prompt, place):
    """A byte of an argument that is not UTF-8 comes as half of a character from the system."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    words = ("generate", "--model", house.anchor_dir, "--prompt", prompt)
    is_plain_refusal(run(*words), "not UTF-8", place)


def test_a_mixture_that_a_kill_moved_aside_is_put_back(works, house, tmp_path):
    """Where two directories cannot change places in one step, a kill may leave none."""
    model = house.build(["amber"], tmp_path / "model")
    for words in (
        ("generate", "--model", model, "--prompt", "x", "--max-new-tokens", "3"),
        ("mix", "inspect", model),
    ):
        said = works(*words)
        (tmp_path / ".model.abcdefgh.aside").mkdir()
        model.rename(tmp_path / ".model.abcdefgh.aside" / "old")
        assert works(*words) == said
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_evaluating_writes_a_table_figures_and_json(
    works, house, pico_set_dirs, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    said = works(
        "eval",
        "sets",
        "--model",
        house.mixture_dir(["amber"]),
        "--data",
        pico_set_dirs["public"],
        "--data",
        pico_set_dirs["maths"],
        "--out",
        tmp_path / "eval",
        "--max-bytes",
        "500",
        "--seq-len",
        "64",
        "--threads",
        "1",
    )
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(found["bits_per_byte"]) == {
        "anchor",
        "expert amber",
        "mixture",
        "mixture without amber",
    }
    assert f"{found['bits_per_byte']['mixture']['maths']:.3f}" in said
    assert found["run"]["data"]["anchor"] == house.anchor.digest
    assert found["run"]["config"]["max_bytes"] == 500
    for name in ("bits_per_byte", "optout", "routing"):
        assert (tmp_path / "eval" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_exact_export_says_so(works, house, tmp_path):
    said = works("mix", "export", house.mixture_dir(["zinc"], "stock"), "-o", tmp_path / "hf")
    assert "exact" in said
    assert json.loads((tmp_path / "hf" / "flexolmo.json").read_text())["exact"] is True


def test_an_export_with_its_code_takes_any_mixture(works, house, tmp_path):
    said = works("mix", "export", house.mixture_dir(NAMES, "rich"), "--code", "-o", tmp_path / "hf")
    assert "exact" in said and "README.md" in said
    assert (tmp_path / "hf" / "modeling_flexolmo.py").is_file()


@pytest.mark.parametrize("with_data", [True, False])
def test_another_routers_export_prints_its_cost_in_bits_per_byte(
    works, house, pico_set_dirs, tmp_path, monkeypatch, with_data
):
    from flexolmo.inference import own_text

    own = own_text.own_windows
    monkeypatch.setattr(
        own_text, "own_windows", lambda m, **o: own(m, **{**o, "sequences": 2, "tokens": 40})
    )
    data = [f"--data={pico_set_dirs[n]}" for n in ("public", "maths")] if with_data else []
    said = works(
        "mix", "export", house.mixture_dir(NAMES), "--to", "hf", "-o", tmp_path / "hf", *data
    )
    about = json.loads((tmp_path / "hf" / "flexolmo.json").read_text())
    cost = about["bits_per_byte"]
    assert about["exact"] is False and "bits per byte" in said and "evidence" in said
    assert set(cost) == ({"public", "maths"} if with_data else {"text of its own"})
    for name, row in cost.items():
        line = next(x for x in said.splitlines() if x.startswith(name))
        for part in (
            f"{row['ours']:.3f}",
            f"{row['stock']:.3f}",
            f"{row['stock'] / row['ours'] - 1:+.1%}",
        ):
            assert part in line


def test_a_stock_checkpoint_is_imported(run, works, house, tmp_path):
    works("mix", "export", house.mixture_dir(NAMES, "stock"), "-o", tmp_path / "hf")
    said = works("mix", "import", tmp_path / "hf", "--dry-run", "--names", "one,two,three")
    assert "4 experts in 2 layers, 4 active per token; float32; 1 of 1 files" in said
    assert "two.bundle" in said and "the same names and shapes" in said
    refused = run("mix", "import", tmp_path / "hf", "--names", "one,two,three")
    is_plain_refusal(refused, "needs --names, --key and --out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    works(
        "mix",
        "import",
        tmp_path / "hf",
        "--names",
        "one, two,three",
        "--key",
        house.keys["Ann"],
        "--owner",
        "Ann",
        "-o",
        tmp_path / "m",
    )
    assert read_about(tmp_path / "m")["experts"]["two"]["licence"] == "Apache-2.0"
    assert load_mixture(tmp_path / "m", ANY_SIGNER).expert_names == ["one", "three", "two"]


def test_a_key_is_made_once(run, works, tmp_path):
    said = works("expert", "key", tmp_path / "me.pem")
    assert "secret" in said and (tmp_path / "me.pem.pub").exists()
    before = (tmp_path / "me.pem").read_bytes()
    is_plain_refusal(run("expert", "key", tmp_path / "me.pem"), "not overwritten")
    assert (tmp_path / "me.pem").read_bytes() == before


def test_the_entry_point_is_main():
    import importlib.metadata

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="flexolmo")
    assert script.load() is flexolmo.cli.main


# --- tasks ----------------------------------------------------------------------------------------


@pytest.fixture
def made_tasks(monkeypatch):
    """A suite of two small tasks and one that cannot be had, in place of the 31."""

    def gone(_):
        raise SourceUnavailable("it is in no package")

    tasks = (
        task_of("arc_easy", choice_items()),
        task_of("squad", written_items(), "answer"),
        task_of("drop", [], load=gone),
    )
    for module in ("suite", "run", "summary"):
        monkeypatch.setattr(f"flexolmo.research.tasks.{module}.TASKS", tasks)


def test_tasks_run_into_tables_and_files_and_are_compared(
    works, house, tmp_path, made_tasks, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "160")
    model = house.mixture_dir(["amber", "basalt"])
    said = works(
        "eval",
        "--suite",
        "flexolmo31",
        "--model",
        model,
        "--out",
        tmp_path / "all",
        "--threads",
        "1",
    )
    assert "arc_easy" in said and "it is in no package" in said and "not whole" in said
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert results["missing"] == {"drop": "it is in no package"}
    assert results["model"]["enabled"] == ["amber", "basalt"] and results["run"]["commit"] != ""
    works(
        "eval",
        "--model",
        model,
        "--without",
        "basalt",
        "--out",
        tmp_path / "without",
        "--threads",
        "1",
    )
    said = works(
        "eval",
        "compare",
        tmp_path / "all",
        tmp_path / "without",
        "--out",
        tmp_path / "compared.json",
        "--draws",
        "200",
    )
    assert "arc_easy" in said and "average of groups" in said
    found = json.loads((tmp_path / "compared.json").read_text())
    assert found["bits_per_byte"]["overall"]["difference"] != 0


@pytest.mark.parametrize("field", ["text", "note"])
def test_text_that_holds_items_is_found_before_training(
    works, tmp_path, made_tasks, monkeypatch, field
):
    asked = "the quick brown fox jumps over the lazy dog while seven owls look on in the dark"
    monkeypatch.setattr(
        "flexolmo.research.tasks.suite.TASKS",
        (task_of("squad", [Item("w0", question=asked)], "answer"),),
    )
    (tmp_path / "corpus.jsonl").write_text(
        "\n".join(
            json.dumps({"id": f"d{i}", field: t})
            for i, t in enumerate(["nothing of it", f"It said: {asked.upper()}!", asked[:20], None])
        )
    )
    (tmp_path / "b.docx").write_bytes(b"PK")
    words = ("eval", "contamination", tmp_path, "--text-field", field, "--out", tmp_path / "c.json")
    said = works(*words)
    assert "1 of 3 documents hold items" in said and "1 records without text" in said
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["remove"] == ["d1"]
    assert found["reading"]["not_read"] == {"of kind .docx": ["b.docx"]}
