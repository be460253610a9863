"""Bodies of requests, in the form that OpenAI's clients send, with fields of ours for sources.

A field that would change an answer and is not supported is refused, never ignored: so is every
unknown one, for it may be a misspelt `experts`. Knows nothing of tokens, models and people.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from flexolmo.bundle.strict import parse_json
from flexolmo.bundle.terms import PURPOSES, PurposeName
from flexolmo.files import canonical_json
from flexolmo.serving.policy import Wish
from flexolmo.serving.refusal import Refusal

MAX_TEXTS = 128  # prompts, and answers to one prompt
MAX_STOPS = 4
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
ExpertName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExpertChoice(_Strict):
    """Sources to use: exactly `only`, or all but `without`. Public text always takes part."""

    only: Annotated[list[ExpertName], Field(max_length=1000)] | None = None
    without: Annotated[list[ExpertName], Field(max_length=1000)] | None = None

    @model_validator(mode="after")
    def _say_one(self) -> "ExpertChoice":
        if (self.only is None) == (self.without is None):
            raise ValueError("give either only or without, as a list of names")
        return self


class StreamOptions(_Strict):
    """Extras of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list["TextPart"], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextPart(_Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


@dataclass(frozen=True)
class Ask:
    """One request, in whichever form it came."""

    prompts: Sequence[str | Sequence[int] | Sequence[Message]]
    wish: Wish
    purposes: frozenset[PurposeName]
    n: int
    max_new_tokens: int | None  # 0: the prompt is only read; None: as many as there is room for
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    stops: Sequence[str]
    num_logprobs: int | None
    echoes: bool
    traces: bool = False

    @property
    def num_texts(self) -> int:
        """Texts that are asked for: prompts times n."""
        return len(self.prompts) * self.n


class Body(_Strict):
    """Fields that both kinds of request have."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    experts: ExpertChoice | None = Field(None, description="Sources to use; all, by default.")
    purpose: PurposeName | Annotated[list[PurposeName], Field(max_length=20)] | None = Field(
        None, description="Purposes of the use, by which owners' terms and policies are judged."
    )
    n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Number of likeliest tokens to choose among."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    trace: bool | None = Field(
        None, description="Find spans of the answer in enabled sources' training text."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        None, description="Ignored: who asks is proven by the key or token."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true alone")
        return self

    @property
    def includes_usage(self) -> bool:
        """True if a stream's last chunk is to say how many tokens were used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _ask(self, **rest: Any) -> Ask:
        """The request, with what the two kinds say each in its own way."""
        experts = self.experts or ExpertChoice(without=[])
        purposes = [self.purpose] if isinstance(self.purpose, str) else self.purpose
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return Ask(
            wish=Wish(
                None if experts.only is None else tuple(experts.only), tuple(experts.without or ())
            ),
            purposes=frozenset(purposes or ()),
            n=self.n or 1,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stops=tuple(stops or ()),
            traces=bool(self.trace),
            **rest,
        )


class CompletionBody(Body):
    """Body of a request to continue texts, or, with `echo` and `max_tokens` 0, to score them."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _read_for_something(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is for scoring: give echo: true with it, and logprobs")
        return self

    def ask(self) -> Ask:
        """The request that this body makes."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self._ask(
            prompts=self.prompt if several else [self.prompt],
            max_new_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            num_logprobs=self.logprobs,
            echoes=bool(self.echo),
        )


class ChatBody(Body):
    """Body of a request to answer a chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: "TextFormat | None" = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description="Ignored."
    )

    @model_validator(mode="after")
    def _agree(self) -> "ChatBody":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1 or 0 in limits:
            raise ValueError("give max_completion_tokens, or max_tokens, of at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs: true alone")
        return self

    def ask(self) -> Ask:
        """The request that this body makes."""
        return self._ask(
            prompts=[self.messages],
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            echoes=False,
        )


class TextFormat(_Strict):
    """The only form of answers."""

    type: Literal["text"]


BodyKind = TypeVar("BodyKind", CompletionBody, ChatBody)
# Said in place of a list of what each of several allowed forms lacks.
_FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": f"a text of 1 to 200 characters, or a list of up to {MAX_STOPS} of them",
    "purpose": f"a purpose ({', '.join(PURPOSES)}), or a list of them",
    "content": 'a text, or a list of parts like {"type": "text", "text": "..."}',
}


def read_body(data: bytes, kind: type[BodyKind]) -> BodyKind:
    """The body in `data`; Refusal (400) that names the first field that is wrong."""
    try:
        value = parse_json(data)
        if b"\\u" in data:
            canonical_json(value)  # fails for half of a character, which JSON can spell
    except UnicodeError:
        raise Refusal(400, "invalid_text", "The body holds text that is not Unicode.") from None
    except ValueError as e:
        raise Refusal(400, "invalid_json", f"The body is not JSON: {e}.") from None
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        problem = min(e.errors(include_input=False), key=lambda x: x["type"] != "extra_forbidden")
        raise _explain(problem, kind) from None


def _explain(problem: Mapping[str, Any], kind: type[Body]) -> Refusal:
    """The refusal that `problem` is worth, which quotes no text of the body but unknown names."""
    where = [part for part in problem["loc"] if isinstance(part, str)]
    field = where[0] if where else None
    if problem["type"] == "extra_forbidden":
        name = where[-1][:64]
        near = difflib.get_close_matches(name, kind.model_fields, n=1) if len(where) == 1 else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return Refusal(
            400, "unsupported_field", f"{name!a} is not supported here.{hint}", field=name
        )
    form = next((part for part in where if part in _FORMS), None)
    if form is not None:
        message = f"{form}: expected {_FORMS[form]}."
    else:
        said = problem["msg"].removeprefix("Value error, ")
        message = f"{'.'.join(map(str, problem['loc']))}: {said}." if field else f"{said}."
    return Refusal(400, "invalid_value", message, field=field)
