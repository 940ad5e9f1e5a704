"""Tune a classifier of handwritten digits: the objective is the cross-validated accuracy of one configuration.

    paraval run examples/digits.py:run --configs examples/digits.jsonl --num-workers 2 --output results.csv

The configurations of digits.jsonl were drawn at random; this script prints them anew::

    python examples/digits.py > examples/digits.jsonl

One of them asks for more principal components than an image has pixels. It fails, alone, and says so in the results.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from paraval import RunningJob

SCALERS = {"none": "passthrough", "standard": StandardScaler(), "minmax": MinMaxScaler()}


def run(job: RunningJob) -> dict[str, Any]:
    """Cross-validate the classifier that ``job`` describes.

    Args:
        job: with ``scaler``, ``n_components`` (of a PCA), ``kernel``, ``C`` and ``gamma`` (times 1 / n_components).

    Returns:
        The mean accuracy on ten folds as the objective; its standard deviation and the number of support vectors as
        metadata.
    """
    images, labels = digits()
    n_components = job["n_components"]
    classifier = make_pipeline(
        SCALERS[job["scaler"]],
        PCA(n_components, whiten=True, random_state=0),
        SVC(kernel=job["kernel"], C=job["C"], gamma=job["gamma"] / n_components),
    )
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    # error_score="raise": a configuration that cannot be fitted is a failed job, not a NaN and a warning.
    scores = cross_validate(classifier, images, labels, cv=folds, error_score="raise", return_estimator=True)
    accuracy = scores["test_score"]
    vectors = sum(int(fitted[-1].n_support_.sum()) for fitted in scores["estimator"])
    return {
        "objective": float(accuracy.mean()),
        "metadata": {"accuracy_std": float(accuracy.std()), "support_vectors": vectors // folds.get_n_splits()},
    }


@functools.cache
def digits() -> tuple[Any, Any]:
    """Load the images (1797 of 8 by 8 pixels) and their labels, once for all jobs."""
    threadpool_limits(limits=1)  # the jobs run in parallel; the linear algebra inside each of them should not
    images, labels = load_digits(return_X_y=True)
    return images, labels


def configurations(number: int = 48, seed: int = 7) -> Iterator[dict[str, Any]]:
    """Draw ``number`` configurations, the eighth of them impossible."""
    draw = random.Random(seed)
    for index in range(number):
        yield {
            "scaler": draw.choice(sorted(SCALERS)),
            "n_components": 100 if index == 7 else draw.randint(4, 40),
            "kernel": draw.choice(["rbf", "poly", "linear", "sigmoid"]),
            "C": float(f"{10 ** draw.uniform(-2, 2):.3g}"),
            "gamma": float(f"{10 ** draw.uniform(-2, 1):.3g}"),
        }


if __name__ == "__main__":
    for configuration in configurations():
        print(json.dumps(configuration))
