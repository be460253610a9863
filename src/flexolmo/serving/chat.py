"""Chats to token ids, by a model's chat template.

A template is a Jinja program that comes with a model, so it runs in a sandbox. It writes control
tokens, such as those that begin and end a turn; what people wrote must not. So each message goes
through the template between two marks, and what is found between them is encoded as plain text,
which can spell no control token.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError
from flexolmo.files import read_json
from flexolmo.serving.refusal import Refusal

# Noncharacters of Unicode, which no text for interchange holds.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}")
_MAX_TEMPLATE_BYTES = 1 << 20


def _refuse(message: str) -> NoReturn:
    """The function that templates call for a chat they cannot take."""
    raise TemplateError(message)


class ChatTemplate:
    """The template in `source`; ConfigError if it is not one."""

    def __init__(self, source: str, tokenizer: Tokenizer):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as e:
            raise ConfigError(f"The chat template is not one: {e}.") from None
        self._tokenizer = tokenizer
        self._controls = {
            token["content"]: token["id"]
            for token in tokenizer.definition.get("added_tokens") or []
            if token["id"] in tokenizer.controls
        } | {tokenizer.eos: tokenizer.eos_id}
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat whose answer comes next; Refusal (400) if the template has no form
        for it."""
        if any(mark in m["content"] for m in messages for mark in (_BEGIN, _END)):
            raise Refusal(
                400, "invalid_text", "A message holds U+FDD0 or U+FDD1.", field="messages"
            )
        marked = [{**m, "content": f"{_BEGIN}{m['content']}{_END}"} for m in messages]
        try:
            text = self._template.render(
                messages=marked,
                add_generation_prompt=True,
                bos_token=self._tokenizer.eos,
                eos_token=self._tokenizer.eos,
            )
        except Exception as e:  # a template is a program of somebody else's
            said = f": {e}" if isinstance(e, TemplateError) else ""
            raise Refusal(
                400, "invalid_chat", f"The model's chat template refuses{said}.", field="messages"
            ) from None
        ids: list[int] = []
        for number, part in enumerate(_MARKED.split(text)):
            is_message = number % 2 == 1
            if not is_message and (_BEGIN in part or _END in part):
                raise Refusal(
                    400,
                    "invalid_chat",
                    "The model's chat template takes messages apart, which is not supported.",
                    field="messages",
                )
            ids += self._tokenizer.encode(part) if is_message else self._encode_own(part)
        return ids

    def _encode_own(self, text: str) -> list[int]:
        """Token ids of the template's own text, control tokens included."""
        ids: list[int] = []
        for part in self._control.split(text):
            ids += (
                [self._controls[part]] if part in self._controls else self._tokenizer.encode(part)
            )
        return ids


def find_template(directory: Path) -> str | None:
    """The `chat_template` in the tokenizer_config.json of `directory`; None if there is none."""
    path = Path(directory) / "tokenizer_config.json"
    config: Any = read_json(path, ConfigError) if path.is_file() else {}
    found = config.get("chat_template") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None
