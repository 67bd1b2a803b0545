"""
study/stats.py against scipy 1.17.1 and statsmodels 0.15.0 (numpy 2.4.6). Each golden number stands beside the call that made it:

    wilson       statsmodels.stats.proportion.proportion_confint(k, n, method="wilson"),
                 and scipy.stats.binomtest(k, n).proportion_ci(method="wilson"), which agree to 1e-12
    sign_test    scipy.stats.binomtest(a, a + b, 0.5).pvalue
    holm         statsmodels.stats.multitest.multipletests(p, method="holm")[1]
    bootstrap_rank  scipy.stats.spearmanr(x, y)[0], and bootstrap of it with paired=True
    bootstrap_*  scipy.stats.bootstrap(..., n_resamples=100000, method="percentile"), which differs from itself by 1e-3 from
                 seed to seed here, and so may we
"""
import math

import numpy as np
import pytest

from study.stats import bootstrap_mean, bootstrap_rank, bootstrap_ratio, holm, sign_test, wilson


@pytest.mark.parametrize("k, n, low, high", [
    (0, 20, 0.0, 0.1611251580528194),
    (1, 20, 0.008881448800795402, 0.2361311934467421),
    (20, 20, 0.8388748419471804, 1.0),
    (173, 300, 0.5201332672229635, 0.6312614771892728),
    (299, 300, 0.9813633063054688, 0.9994113422781488),
    (1, 1, 0.2065493143772374, 1.0),
    (0, 1, 0.0, 0.7934506856227627),
    (868, 1319, 0.6320489794182524, 0.6831815398699419),
])
def test_wilson(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-12)


def test_wilson_other_confidence_and_nothing_known():
    assert wilson(7, 30, confidence=0.99) == pytest.approx((0.09526697661156022, 0.46799096910476556), abs=1e-12)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("a, b, p", [
    (0, 0, 1.0), (0, 1, 1.0), (1, 5, 0.21875), (5, 1, 0.21875), (3, 3, 1.0), (12, 4, 0.076812744140625),
    (30, 60, 0.0020602656809630745), (0, 11, 0.0009765625), (171, 114, 0.0008778854784150968), (700, 619, 0.027573696259397113),
])
def test_sign_test(a, b, p):
    assert sign_test(a, b) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("p, adjusted", [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.5], [0.5]),
    ([], []),
    ([0.9, 0.8, 0.02, 0.02, 0.02, 1.0], [1.0, 1.0, 0.12, 0.12, 0.12, 1.0]),
    ([1e-12, 0.2, 0.011, 0.049, 0.013, 0.0125, 0.3], [7e-12, 0.4, 0.066, 0.147, 0.066, 0.066, 0.4]),
])
def test_holm(p, adjusted):
    assert holm(p) == pytest.approx(adjusted, rel=1e-12)


D = [0.3 * math.sin(7 * i) + (0.5 if i % 10 == 0 else 0) - 0.05 for i in range(150)]
E = [0.4 * d + 0.05 * math.cos(3 * i) for i, d in enumerate(D)]


def test_bootstrap_mean():
    assert bootstrap_mean(D) == pytest.approx((-8.65842721550288e-06, -0.0412, 0.0417), abs=2e-3)
    assert bootstrap_mean(D) == bootstrap_mean(D) != bootstrap_mean(D, seed=1)         # a seed, and no other source of chance
    assert bootstrap_mean([0.25] * 40) == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_ratio_keeps_pairs_together():
    assert bootstrap_ratio(np.add(E, 1), np.add(D, 1)) == pytest.approx((1.0002854805290091, 0.9757, 1.0264), abs=2e-3)
    assert bootstrap_ratio([1.0, 3.0, 8.0], [2.0, 6.0, 16.0]) == pytest.approx((0.5, 0.5, 0.5))      # unpaired resamples would spread


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(low <= 0.1 <= high for _, low, high in (bootstrap_mean(rng.normal(0.1, 1, 100)) for _ in range(60)))
    assert hits >= 52                                                                   # of 60; 57 expected, P(< 52) < 1 %


F, G = [math.cos(5 * i) + 0.3 * d for i, d in enumerate(D)], [round(10 * e) for e in E]      # G: 6 values, most of them often


@pytest.mark.parametrize("x, y, correlation, low, high", [(D, E, 0.9319685319347527, 0.9074, 0.9457), (D, F, 0.06379839103960176, -0.1019, 0.2276), (D, G, 0.9101494093857389, 0.8783, 0.9307)])
def test_bootstrap_rank(x, y, correlation, low, high):
    assert bootstrap_rank(x, y) == pytest.approx((correlation, low, high), abs=4e-3)
    assert bootstrap_rank(x, y)[0] == pytest.approx(correlation, rel=1e-12) and bootstrap_rank(y, x)[0] == pytest.approx(correlation, rel=1e-12)
    assert bootstrap_rank(np.exp(x), y)[0] == pytest.approx(correlation, rel=1e-12)                 # ranks alone count


def test_bootstrap_rank_of_what_never_changes():
    assert all(math.isnan(value) for value in bootstrap_rank([1.0] * 9, range(9)))
    assert bootstrap_rank(range(9), range(9)) == pytest.approx((1, 1, 1)) and bootstrap_rank(range(9), range(0, -9, -1)) == pytest.approx((-1, -1, -1))
