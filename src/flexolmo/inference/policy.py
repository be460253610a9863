"""Choice of the experts that take part in a request. No torch: a deployer audits this file."""

import datetime
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from flexolmo.errors import PolicyError

if TYPE_CHECKING:
    from flexolmo.bundle.terms import Terms


def choose_experts(
    available: "Collection[str] | Mapping[str, Terms]",
    *,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> frozenset[str]:
    """The experts to enable: all `available` but `without`, or exactly `only`.

    With a mapping, each expert's value is its terms, whose days (UTC) are asked about now.
    Public text always takes part; `only=[]` is the anchor alone.

    Raises:
        PolicyError: a name that is not available (a typing error must not switch a source on),
            a text in place of a list of names, both `without` and `only` given, or an expert
            whose terms have not begun or have expired.
    """
    refuse_bare_text(without)
    refuse_bare_text(only)
    without = set(without)
    if only is not None and without:
        raise PolicyError(
            "Give either the experts to use alone (only) or those to leave out (without), not both."
        )
    named = without if only is None else set(only)
    unknown = sorted(named - set(available))
    if unknown:
        raise PolicyError(
            f"Unknown expert {', '.join(unknown)}: this mixture holds "
            f"{', '.join(sorted(available)) or 'none'}."
        )
    chosen = frozenset(available) - without if only is None else frozenset(named)
    if isinstance(available, Mapping):
        today = datetime.datetime.now(datetime.UTC).date()
        lines = [
            f"{name}: {why}"
            for name in sorted(chosen)
            for why in available[name].refusals_of_day(today)
        ]
        if lines:
            raise PolicyError(
                f"Not to be used today: {'; '.join(lines)}. Switch them off, or ask their owners."
            )
    return chosen


def refuse_bare_text(names: object) -> None:
    """Raise PolicyError for a text where names are expected: its letters would be taken for names,
    and an empty one for no names at all."""
    if isinstance(names, str | bytes):
        raise PolicyError(f"Expert names are given as a list; found the text {names!r}.")


def parse_names(text: str, option: str) -> list[str]:
    """The names in a comma-separated text, given as `option`.

    Raises PolicyError for an empty one: an unset variable of a script would else switch nothing.
    """
    names = [n.strip() for n in text.split(",")]
    if "" in names:
        raise PolicyError(
            f"{option} {text!r} has an empty name: give names with a comma between them, or leave "
            f"{option} out."
        )
    return names
