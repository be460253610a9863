"""Which experts may take part in a request. No torch: this is what a deployer audits."""

from collections.abc import Collection, Iterable

from flexolmo.errors import PolicyError


def choose_experts(
    available: Collection[str], *, without: Iterable[str] = (), only: Iterable[str] | None = None
) -> frozenset[str]:
    """The experts to enable: all `available` but `without`, or exactly `only`.

    Public text always takes part; `only=[]` is the anchor alone.

    Raises:
        PolicyError: a name that is not available (a typing error must not switch a source on),
            or both `without` and `only` given.
    """
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
    return frozenset(available) - without if only is None else frozenset(named)
