"""The privacy budget of one expert: its settings, and the noise with which training keeps to it.

Two things that leave the house are worked out from an owner's text: the router's table, a sum with
Gaussian noise (`model.private_statistics`), and the weights, by steps that each read a Poisson
sample of units and add Gaussian noise (`train.dp_sgd`). Their privacy losses are composed
numerically, so the two together keep to one epsilon. Knows no text, and no torch of its own.
"""

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field

from flexolmo.config import Settings
from flexolmo.data.units import Unit
from flexolmo.errors import ConfigError

LEAST_NOISE = 0.3  # in clipping norms, that a step ever has
LARGEST_NOISE = 1e3
SLACK = 1e-3  # relative, by which the noise that is found may be above the least that is enough
WHOLE_ORDERS = [n for n in range(2, 64) if n != 11]  # of those that Opacus tries
WIDE = 100.0  # loss from which on all are tried: a domain wider than need be would cost more


class PrivacySettings(Settings):
    """Differential privacy of an expert: whether any one unit of text is there changes the chance
    of any bundle by a factor of e^epsilon at most, but for a chance of delta."""

    epsilon: float = Field(
        gt=0,
        le=50,
        description="Epsilon of all that is worked out from the text, together: the weights, and "
        "the router's table, which has router.epsilon of it.",
    )
    delta: float = Field(
        1e-6,
        ge=1e-10,
        le=1e-3,
        description="Chance with which that factor may be exceeded: well below one over the number "
        "of units.",
    )
    unit: Unit = Field(
        "document",
        description="Text that is protected as one: document (a source document), unit (all texts "
        "of one value of data prepare --unit-field), or sequence (train.seq_len tokens).",
    )
    clip_norm: float = Field(
        0.1, gt=0, description="Largest norm of the gradient that one unit gives to a step."
    )
    row_share: float = Field(
        1e-4,
        ge=0,
        lt=1,
        description="Share of the text that a token must make up, by the noised table, for its "
        "rows of embedding and head to learn: the others would learn noise alone.",
    )
    windows: int = Field(
        1, ge=1, description="Windows of train.seq_len tokens of a unit that a step reads at most."
    )
    units_at_once: int | None = Field(
        None,
        ge=1,
        description="Units whose gradients are found at once, which takes memory for each: the "
        "same numbers but for rounding. None: 1 on a processor, on a GPU up to 16.",
    )


@lru_cache(maxsize=64)
def spent_epsilon(
    delta: float, noise: float, rate: float, steps: int, table_noise: float | None
) -> float:
    """Upper bound on the epsilon of a table and `steps` of training, for adding or removing a unit.

    Args:
        noise: deviation of a step's noise, in clipping norms.
        rate: chance of a unit to be in a step.
        table_noise: deviation of the table's, in documents' lengths; None: no table.
    Source: Gopi et al. 2021 (arXiv 2106.02848), as Opacus computes it.
    """
    accountant = _accountant()
    table = [] if table_noise is None else [(table_noise, 1.0, 1)]
    accountant.history = [*table, (noise, rate, steps)]
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # the logarithm of 1 - rate
        warnings.simplefilter("ignore")  # how wide a domain is looked at, which is wide enough
        return float(accountant.get_epsilon(delta))


def find_noise(
    settings: PrivacySettings, rate: float, steps: int, table_noise: float | None
) -> float:
    """Least noise, in clipping norms, with which `steps` of training keep to the budget; arguments
    as for `spent_epsilon`.

    Raises:
        ConfigError: the table's noise leaves nothing to train with.
    """
    from scipy.optimize import brentq  # a second to import, which training without noise need not

    def overspent(noise: float) -> float:
        return spent_epsilon(settings.delta, noise, rate, steps, table_noise) - settings.epsilon

    high = 1.0
    while overspent(high) > 0:
        high *= 2.0
        if high > LARGEST_NOISE:
            raise ConfigError(
                f"privacy.epsilon {settings.epsilon:g} leaves nothing to train with: lower "
                "router.epsilon, the table's part of it, or train.steps, or give more units."
            )
    low = high / 2.0
    while low > LEAST_NOISE and overspent(low) <= 0:
        low /= 2.0
    low = max(low, LEAST_NOISE)
    if overspent(low) <= 0:
        return low
    found: float = brentq(overspent, low, high, rtol=SLACK)
    while overspent(found) > 0:
        found *= 1.0 + SLACK
    return found


def _accountant() -> Any:
    try:
        from opacus.accountants import PRVAccountant
    except ImportError:
        raise ConfigError(
            "Private training needs Opacus, which is not installed: pip install flexolmo[private]."
        ) from None
    accountant = PRVAccountant()
    accountant._get_domain = _find_domain
    return accountant


def _find_domain(
    prvs: list[Any], num_self_compositions: list[int], eps_error: float, delta_error: float
) -> Any:
    """Losses that the accountant looks at: Opacus' own rule, but for the Rényi orders.

    Each order gives a bound on the loss. Opacus takes the least over orders of which three in five
    are fractional, and those take three quarters of all its time; whole ones alone give a domain
    that is as wide or a little wider, which is as safe.
    Source: Gopi et al. 2021, remark 5.6, as in Opacus' `compute_safe_domain_size`.
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.prv import Domain

    def bound(history: list[tuple[float, float, int]], delta: float) -> float:
        accountant = RDPAccountant()
        accountant.history = history
        found = float(accountant.get_epsilon(delta, alphas=WHOLE_ORDERS))
        return found if found < WIDE else float(accountant.get_epsilon(delta))

    steps = sum(num_self_compositions)
    all_of_them = [
        (prv.noise_multiplier, prv.sample_rate, count)
        for prv, count in zip(prvs, num_self_compositions, strict=True)
    ]
    together = bound(all_of_them, delta_error / 4)
    each = [bound([(noise, rate, 1)], delta_error / (8 * steps)) for noise, rate, _ in all_of_them]
    widest = max(together, *each, eps_error) + 3
    mesh = eps_error / np.sqrt(steps * np.log(12 / delta_error) / 2)
    return Domain.create_aligned(-widest, widest, mesh)
