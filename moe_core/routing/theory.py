"""What LocMoE's and Expert-Token Resonance's theorems say, as numbers: cosine thresholds, capacity bounds, success."""

from __future__ import annotations

import math

import numpy as np
from scipy import special


def cap_probability(delta: float, width: int, two_sided: bool = True) -> float:
    """p_delta = P(|cos| >= delta) of a random unit vector in R^width (LocMoE, eq. 8); one-sided: half of it.

    The complementary incomplete beta I_{1-delta^2}((d-1)/2, 1/2): the form 1 - I underflows below 1e-16.
    """
    if delta < 0:
        return 1.0 if two_sided else 1.0 - cap_probability(-delta, width, two_sided=False)
    p = float(special.betainc((width - 1) / 2, 0.5, max(0.0, 1.0 - delta * delta)))
    return p if two_sided else p / 2


def capacity_bound(delta: float, width: int, num_experts: int, two_sided: bool = True) -> float:
    """Tokens per expert so that one of its own reaches it on average: 1/(n p_delta) (LocMoE, eq. 9), or infinity."""
    p = cap_probability(delta, width, two_sided)
    return 1.0 / (num_experts * p) if p > 0 else math.inf


def capacity_bound_erfc(delta: float, width: int, num_experts: int) -> float:
    """LocMoE's closed form for large d, 1/(n erfc(sqrt(delta^2 d/(2-delta^2)))): an approximation, not a bound."""
    p = math.erfc(math.sqrt(delta * delta * width / (2 - delta * delta)))
    return 1.0 / (num_experts * p) if p > 0 else math.inf


def capacity_bound_exp(delta: float, width: int, num_experts: int) -> float:
    """LocMoE's weaker closed form, exp(delta^2 d/(2-delta^2))/n: below the exact bound."""
    exponent = delta * delta * width / (2 - delta * delta)
    return math.exp(exponent) / num_experts if exponent < 709 else math.inf


def delta_of_capacity(capacity: float, width: int, num_experts: int) -> float:
    """The threshold at which the exp form gives `capacity`: sqrt(2 L/(d+L)), L = ln(n C)."""
    log = math.log(num_experts * capacity)
    return math.sqrt(2 * log / (width + log))


def cosine_edges(width: int, number: int = 256) -> np.ndarray:
    """Thresholds of the cosine histogram: -1 (counts every token), then even ratios from 0.05/sqrt(d) to 1."""
    return np.concatenate([[-1.0], np.geomspace(0.05 / math.sqrt(width), 1.0, number)])


def low_quantile(at_least_B: np.ndarray, edges_B: np.ndarray, quantile: float) -> float:
    """The largest edge that all but `quantile` of the tokens reach. at_least_B: tokens whose cosine >= each edge.

    At most one edge (a few percent) below the exact quantile, never above it; 0 if that is negative.
    """
    if at_least_B[0] == 0:
        return 0.0
    reached = np.flatnonzero(at_least_B >= (1 - quantile) * at_least_B[0])
    return max(0.0, float(edges_B[reached[-1]]))


def token_choice_success(tokens: int, num_experts: int, right: float, capacity: int) -> float:
    """Share of tokens that reach their right expert when tokens choose (ETR, theorem 5, loads binomial).

    right: probability that a token picks its right expert; an expert keeps `capacity` of what arrives, blindly.
    """
    from scipy import stats  # takes a second to import, which no other use of a router should pay

    kept = stats.binom(tokens, 1 / num_experts).expect(lambda load: np.minimum(load, capacity))
    return float(right * kept / (tokens / num_experts))


def expert_choice_success(tokens: int, outranked: float, capacity: int) -> float:
    """Probability that the right token is among an expert's `capacity` best (ETR, theorem 5).

    outranked: probability that an irrelevant token ranks above it.
    """
    from scipy import stats  # as above

    return float(stats.binom.cdf(capacity - 1, tokens - 1, outranked))


def expert_choice_bound(tokens: int, outranked: float, capacity: int) -> tuple[float, float]:
    """(lower, upper) bound of `expert_choice_success` where theorem 5 gives one, else 0 and 1."""
    expected = (tokens - 1) * outranked
    upper = math.exp(-expected / 8) if capacity <= expected / 2 else 1.0
    lower = 1 - math.exp(-3 * capacity / 16) if capacity >= 2 * tokens * outranked else 0.0
    return lower, upper
