"""Proportions, means over seeds, and how sure one can be of them. Needs only numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mpi_mlx.rollouts.rewards import normalise_answer

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution
# Two-sided 95% quantiles of Student's t for 1 .. 30 degrees of freedom.
T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
    2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555,
    2.0518, 2.0484, 2.0452, 2.0423,
)


@dataclass(frozen=True)
class Mean:
    """A mean with its 95% interval; the interval is None when a single value says nothing about spread."""

    value: float
    interval: tuple[float, float] | None
    n: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


def same_text(a: str, b: str) -> bool:
    """Equal but for runs of blanks: how whole traces are compared."""
    return a.split() == b.split()


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """95% interval of one proportion (Wilson, 1927); stays within 0..1 and honest at 0 and n.

    >>> wilson_interval(8, 10)     # (0.490, 0.943)
    """
    if n <= 0:
        return 0.0, 1.0
    share = successes / n
    denominator = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / denominator
    return max(0.0, centre - reach), min(1.0, centre + reach)


def t_quantile(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t (beyond 30 degrees by its expansion, good to 1e-4)."""
    if degrees <= len(T95):
        return T95[degrees - 1]
    return Z95 + (Z95**3 + Z95) / (4 * degrees) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * degrees**2)


def proportion_variance(share: float, n: int) -> float:
    """Sampling variance of a share of n examples, with two right and two wrong ones added (Agresti and Coull, 1998):
    that all of them are right does not make it certain.

    >>> proportion_variance(1.0, 96)     # 0.98 * 0.02 / 100
    """
    share = (share * n + 2) / (n + 4)
    return share * (1 - share) / (n + 4)


def difference_variance(
    a: tuple[float, int],
    b: tuple[float, int],
    right_a: Mapping[str, bool] | None = None,
    right_b: Mapping[str, bool] | None = None,
) -> float:
    """Sampling variance of the difference of two (share, n).

    On the same examples (``right_a``, ``right_b``: which of them) only those count that one side alone has right,
    with half an example added to each of the four outcomes (Agresti and Min, 2005). Without, both vary alone.
    """
    if not right_a or not right_b or right_a.keys() != right_b.keys():
        return proportion_variance(*a) + proportion_variance(*b)
    n = len(right_a) + 2
    apart = [int(right_a[k]) - int(right_b[k]) for k in right_a]
    return (sum(map(abs, apart)) + 1 - sum(apart) ** 2 / n) / n**2


def mean_over_seeds(values: Sequence[float], sampling: Sequence[float] = (), *, shared: bool = False) -> Mean:
    """Mean of one figure a seed (or document), with the t interval over them.

    ``sampling``: what each figure varies by alone, for want of more examples, as variances. The interval is at
    least as wide as they make it: values that agree by chance must not look certain. ``shared``: all figures come
    from the same examples, so that more seeds do not make up for them.

    >>> mean_over_seeds([0.9, 0.94, 0.98])     # 0.94, +-4.3027 * 0.04 / sqrt(3)
    """
    found = np.asarray(values, np.float64)
    if not len(found):
        raise ValueError("no values to average")
    mean = float(found.mean())
    if len(found) == 1:
        return Mean(mean, None, 1)
    reach = t_quantile(len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    if len(sampling):  # known from n examples each: the normal quantile
        least = float(np.mean(sampling)) / (1 if shared else len(found))
        reach = max(reach, Z95 * math.sqrt(least))
    return Mean(mean, (mean - reach, mean + reach), len(found))


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean of N values; the same seed gives the same interval."""
    found = np.asarray(values, np.float64)
    if not len(found):
        raise ValueError("no values to resample")
    picked = np.random.default_rng(seed).integers(len(found), size=(resamples, len(found)))
    low, high = np.quantile(found[picked].mean(1), (0.025, 0.975))
    return float(low), float(high)


def paired_difference(
    a: Mapping[object, float],
    b: Mapping[object, float],
    sampling: Mapping[object, float] = MappingProxyType({}),
    *,
    shared: bool = False,
) -> Mean:
    """Mean of a - b over the keys (seeds, documents or examples) that both have, with the t interval.

    Pairing removes what seeds and documents contribute by being easy or hard. ``sampling``: the variance of each
    key's difference, and ``shared``: see :func:`mean_over_seeds`.
    """
    keys = [k for k in a if k in b]
    if not keys:
        raise ValueError("no seed or document in common")
    variances = [sampling[k] for k in keys] if sampling else ()
    return mean_over_seeds([a[k] - b[k] for k in keys], variances, shared=shared)


def right_answers(predictions: Sequence[dict], model: str, document_in_context: bool) -> dict[str, bool]:
    """Which examples a model had right in a mode, by id, from the lines of predictions.jsonl."""
    mode = model, document_in_context
    return {p["id"]: p["correct"] for p in predictions if (p["model"], p["document_in_context"]) == mode}


def majority_share(answers: Iterable[str]) -> float:
    """What always giving the most frequent of these answers would earn; 0 for none."""
    counts = Counter(map(normalise_answer, answers))
    return max(counts.values()) / counts.total() if counts else 0.0


def share(flags: Iterable[bool]) -> float | None:
    """Mean of booleans, None for none."""
    found = list(flags)
    return sum(found) / len(found) if found else None
