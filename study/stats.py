"""The statistics of the study, each a few lines with its source. Standard library, and numpy for
the resampling.

    k of n answers are right                      wilson(k, n)        interval of the accuracy
    SLOT repaired `fixed` and broke `broken`      sign_test(fixed, broken)       a fair coin?
    many settings were tried                      holm(p_values)      p-values that are still honest
    a difference measured on every sample         bootstrap_mean(differences)    its mean
    a ratio of two such means                     bootstrap_ratio(a, b)          mean(a) / mean(b)
    does x tell the order of y?                   bootstrap_rank(x, y)           rank correlation

All intervals are two-sided, 95 %. tests/test_study_stats.py holds the numbers of scipy and
statsmodels against them.
"""
import functools
import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000


def wilson(k, n, confidence=0.95):
    """(low, high) for the share k/n: all shares p that a score test would not reject.
    Wilson, JASA 22 (1927) 209.

    The textbook's p ± 1.96 sqrt(p(1-p)/n) would call 0 of 20 an accuracy of exactly 0; this says
    0 to 16 %.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    low = max(0.0, middle - half) if k > 0 else 0.0
    high = min(1.0, middle + half) if k < n else 1.0
    return low, high


def sign_test(a, b):
    """Two-sided exact p that a and b out of a + b changes are equally likely: the binomial test at
    1/2, which on paired yes/no answers is McNemar's exact test (Psychometrika 12 (1947) 153).
    Samples that did not change say nothing and do not count."""
    n, least = a + b, min(a, b)
    tail = sum(math.comb(n, i) for i in range(least + 1))       # integers, so exact for any n
    return min(1.0, 2 * tail / 2 ** n)


def holm(p_values):
    """Adjusted p-values in the order given: the smallest times m, the next times m - 1, ..., never
    falling, at most 1. Rejecting those below 0.05 errs anywhere in the family with probability 0.05
    at most. Holm, Scand. J. Stat. 6 (1979) 65."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# ---- resampling. Efron, Ann. Stat. 7 (1979) 1: percentiles of the figure over resamples

@functools.lru_cache(maxsize=4)
def draws(n, seed):
    """(RESAMPLES, n) float32: how often each of n samples is drawn when n are drawn with
    replacement. All figures of one table use the same draws, so pairs stay pairs."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return counts.astype(np.float32)


def resampled_means(values, seed):
    """(RESAMPLES,) means of resampled values."""
    return draws(len(values), seed) @ np.asarray(values, dtype=np.float32) / len(values)


def percentiles(values):
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(differences, seed=0):
    """(mean, low, high) of paired differences."""
    return float(np.mean(differences)), *percentiles(resampled_means(differences, seed))


def bootstrap_ratio(a, b, seed=0):
    """(ratio, low, high) of mean(a) / mean(b), a and b measured on the same samples. Resamples of a
    denominator near 0 make the interval as wide as it deserves to be."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = resampled_means(a, seed) / resampled_means(b, seed)
    return float(np.mean(a) / np.mean(b)), *percentiles(ratios)


def bootstrap_rank(x, y, seed=0):
    """(correlation, low, high) of the ranks of x and y: Spearman's, Am. J. Psychol. 15 (1904) 72.
    Equal values share their mean rank; nan where all values of one are equal."""
    once_each = np.ones((1, len(x)), dtype=np.float32)
    parts = np.split(draws(len(x), seed), 20)                   # bounds the memory
    resampled = np.concatenate([rank_correlations(x, y, part) for part in parts])
    return float(rank_correlations(x, y, once_each)[0]), *percentiles(resampled)


def rank_correlations(x, y, counts):
    """For samples that are drawn counts (R, n) times -> (R,) correlations of their ranks."""
    a, b = resampled_ranks(x, counts), resampled_ranks(y, counts)               # (R, n) each
    n = counts.sum(1, keepdims=True)
    a = a - (counts * a).sum(1, keepdims=True) / n
    b = b - (counts * b).sum(1, keepdims=True) / n
    with np.errstate(invalid="ignore"):
        spread = np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
        return (counts * a * b).sum(1) / spread


def resampled_ranks(values, counts):
    """(R, n): the rank of every sample among those drawn, the mean rank where values are equal."""
    order = np.argsort(values, kind="stable")
    _, starts, group = np.unique(np.asarray(values)[order], return_index=True, return_inverse=True)
    drawn = np.add.reduceat(counts[:, order].astype(np.float64), starts, axis=1)    # of each value
    ranks = np.empty(counts.shape)
    ranks[:, order] = (drawn.cumsum(1) - drawn / 2)[:, group]
    return ranks
