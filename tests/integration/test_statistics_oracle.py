"""Statistics equal those of SciPy and statsmodels, on the same numbers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from evaluation.statistics import student
from evaluation.statistics.intervals import wilson_interval
from evaluation.statistics.mixed import crossed_mean, variance_of_crossed_mean
from evaluation.statistics.significance import holm, mcnemar

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # of their own and of their optimisers on the way
]


def test_students_distribution_is_scipys():
    stats: Any = import_module("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 30, 99, 200, 201, 1000, 4000):
        for confidence in (0.5, 0.9, 0.95, 0.999):
            expected = stats.t.ppf(0.5 + confidence / 2, freedom)
            assert student.quantile(confidence, freedom) == pytest.approx(expected, rel=2e-8)


def test_mcnemars_test_is_the_exact_one_of_statsmodels():
    tables: Any = import_module("statsmodels.stats.contingency_tables")
    for first, second in [(0, 0), (1, 0), (7, 3), (40, 22), (300, 260), (2000, 1500)]:
        expected = tables.mcnemar([[5, first], [second, 9]], exact=True).pvalue
        assert mcnemar(first, second) == pytest.approx(expected, rel=1e-8)


def test_holm_and_wilson_are_those_of_statsmodels():
    multiple: Any = import_module("statsmodels.stats.multitest")
    proportion: Any = import_module("statsmodels.stats.proportion")
    p_values = np.random.default_rng(0).uniform(size=40) ** 3
    assert holm(p_values.tolist()) == pytest.approx(multiple.multipletests(p_values, method="holm")[1])
    for right, items in [(0, 5), (3, 7), (250, 300), (300, 300)]:
        ours = wilson_interval(right, items)
        theirs = proportion.proportion_confint(right, items, method="wilson")
        assert (ours.low, ours.high) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("seed_spread", [0.5, 1.0])
def test_the_mixed_summary_has_the_mean_and_the_error_of_mixed_lm_with_crossed_effects(seed_spread):
    pandas: Any = import_module("pandas")
    formulas: Any = import_module("statsmodels.formula.api")
    rng = np.random.default_rng(2)
    num_seeds, num_clusters = 4, 12
    values = rng.normal(size=num_clusters)[None, :] + seed_spread * rng.normal(size=num_seeds)[:, None]
    values = 0.3 + values + 0.6 * rng.normal(size=(num_seeds, num_clusters))
    seeds, clusters = np.indices(values.shape)
    frame = pandas.DataFrame(
        {"value": values.ravel(), "seed": seeds.ravel(), "cluster": clusters.ravel(), "group": 1}
    )
    effects = {"seed": "0 + C(seed)", "cluster": "0 + C(cluster)"}
    fitted = formulas.mixedlm("value ~ 1", frame, groups="group", vc_formula=effects, re_formula="0").fit(
        reml=True, method=["lbfgs", "powell"]
    )
    assert min(fitted.vcomp) > 0.01  # no effect at its bound, where the optimiser stops short
    assert crossed_mean(values).value == pytest.approx(float(fitted.fe_params["Intercept"]), abs=1e-4)
    variance, _ = variance_of_crossed_mean(values)
    assert variance**0.5 == pytest.approx(float(fitted.bse_fe["Intercept"]), rel=1e-3)
