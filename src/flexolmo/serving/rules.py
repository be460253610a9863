"""Cedar policies in files: read, named and validated, with errors that say file and line.

Each policy must have an @id, by which decisions and the audit log name it. Knows what a policy may
say (`flexolmo.cedarschema`), not who asks.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cedarpy

from flexolmo.bundle.strict import raise_listed
from flexolmo.bundle.terms import PURPOSES
from flexolmo.errors import PolicyError
from flexolmo.files import canonical_json, digest_bytes, parse_json, read_bytes

SCHEMA_FILE = Path(__file__).with_name("flexolmo.cedarschema")
SCHEMA = cedarpy.Schema.from_str(SCHEMA_FILE.read_text(encoding="utf-8"))
MAX_FILE_BYTES = 1 << 20
# Cedar's parser calls itself for each level and ends the process when the stack is used up: at
# 1,000 brackets, or at 5,000 nested ifs, which take 80,000 characters.
MAX_POLICY_CHARACTERS = 32 << 10
MAX_DEPTH = 100
_MAX_NAME = 200


def read_rules(directory: Path) -> tuple[dict[str, str], str]:
    """The policies in the `*.cedar` files of `directory`, and a digest of these files.

    Returns:
        The text of each policy, by a name of file and @id such as "clinic.cedar: ward-notes"; and a
        digest that any change of a byte, of a file's name or of the schema changes. Files whose
        name starts with a dot are left out.

    Raises:
        PolicyError: no such directory, a file that cannot be read, or policies that are malformed,
            do not fit the schema, name a purpose that there is not, or have no @id of their own;
            each with its file and line.
    """
    directory = Path(directory)
    try:
        found = sorted(path for path in directory.iterdir() if path.suffix == ".cedar")
    except OSError as e:
        raise PolicyError(
            f"The policies in {directory} cannot be read ({e.strerror}). Name a directory of "
            "*.cedar files."
        ) from None
    rules: dict[str, str] = {}
    digests = {"": digest_bytes(SCHEMA_FILE.read_bytes())}
    problems = []
    for path in found:
        if path.name.startswith("."):
            continue
        try:
            if not path.name.isprintable():  # it stands in reasons and in the audit log
                raise ValueError("expected a name of printable characters")
            data = read_bytes(path, MAX_FILE_BYTES)
            text = data.decode("utf-8")
            _refuse_hidden_characters(text)
        except (OSError, ValueError) as e:
            problems.append(f"{path.name}: {e}")
            continue
        digests[path.name] = digest_bytes(data)
        for line, policy, depth in split_policies(text):
            try:
                name = f"{path.name}: {check_policy(policy, depth)}"
                if name in rules:
                    raise ValueError("expected an @id of its own, found that of a policy above")
                rules[name] = policy
            except ValueError as e:
                problems.append(f"{path.name}, policy at line {line}: {e}")
    raise_listed(
        PolicyError,
        f"The policies in {directory} cannot be used:",
        problems,
        "Correct these, then try again: flexolmo policy check.",
    )
    return rules, digest_bytes(canonical_json(digests))


def _refuse_hidden_characters(text: str) -> None:
    """ValueError for a character that could show a reader another policy than Cedar reads."""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        hidden = [c for c in line if not c.isprintable() and c != "\t"]
        if hidden:
            raise ValueError(f"line {number} has the invisible character U+{ord(hidden[0]):04X}")


_TOKEN = re.compile(
    r'//[^\r\n]*|"(?:[^"\\]|\\.)*(?:"|\Z)|(?P<opens>[(\[{])|(?P<closes>[)\]}])|(?P<ends>;)',
    re.DOTALL,
)
_BLANK = re.compile(r"(?:\s|//[^\r\n]*)*")


def split_policies(text: str) -> Iterator[tuple[int, str, int]]:
    """Line where it begins, text, and depth of brackets of each policy in `text`.

    Cedar's own errors name no line, hence this. Each policy is parsed alone afterwards, so that one
    cut in a wrong place would be refused. What follows the last semicolon is given too, unless it
    is blank.
    """
    start = depth = deepest = 0
    tokens = [(found.end(), found.lastgroup) for found in _TOKEN.finditer(text)]
    for end, kind in [*tokens, (len(text), "ends")]:
        depth += (kind == "opens") - (kind == "closes")
        deepest = max(deepest, depth)
        if kind == "ends":
            blank = _BLANK.match(text, start, end)
            begin = blank.end() if blank else start
            if begin < end:
                yield text.count("\n", 0, begin) + 1, text[begin:end], deepest
            start, depth, deepest = end, 0, 0


def check_policy(text: str, depth: int) -> str:
    """The @id of the one policy in `text`; ValueError if it cannot be used."""
    if len(text) > MAX_POLICY_CHARACTERS or depth > MAX_DEPTH:
        raise ValueError(
            f"expected at most {MAX_POLICY_CHARACTERS} characters and {MAX_DEPTH} brackets within "
            f"each other, found {len(text)} and {depth}"
        )
    parsed = parse_json(cedarpy.policies_to_json_str(text))
    if parsed["templates"]:
        raise ValueError("a template, with ?principal or ?resource, would never permit or forbid")
    (policy,) = parsed["staticPolicies"].values()
    name = policy.get("annotations", {}).get("id") or ""
    if not 1 <= len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(
            f'expected a name for people, @id("..."), before the policy, of 1 to {_MAX_NAME} '
            "printable characters"
        )
    checked = cedarpy.validate_policies(text, SCHEMA)
    if not checked.validation_passed:
        errors = [e.error.removeprefix("for policy `policy0`, ") for e in checked.errors]
        raise ValueError("; ".join(errors))
    unknown = sorted(set(_purposes_in(policy)) - set(PURPOSES))
    if unknown:
        raise ValueError(f"no purpose {', '.join(unknown)}; there are {', '.join(PURPOSES)}")
    return name


def _purposes_in(value: Any) -> Iterator[str]:
    """Every purpose named in a policy's JSON form; the schema itself allows any name."""
    if isinstance(value, dict):
        if value.get("type") == "FlexOlmo::Purpose" and "id" in value:
            yield value["id"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _purposes_in(item)
