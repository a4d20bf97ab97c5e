"""Few-shot results -> their means over the five data sets, which the paper's Figure 3 draws beside each of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean

from classification.data.few_shot import FEW_SHOT
from results.runs import Result

OF_ONE = "classification few_shot "
AVERAGE = f"{OF_ONE}average"


def with_averages(results: Iterable[Result]) -> list[Result]:
    """The same results, and for each seed and number of shots that all data sets have, their mean as one more."""
    results = list(results)
    found: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in results:
        if result.table.startswith(OF_ONE):
            key = json.dumps([result.settings, result.seed, list(result.scores)], sort_keys=True, default=str)
            found[key].setdefault(result.table.removeprefix(OF_ONE), result)
    for datasets in found.values():
        if datasets.keys() == FEW_SHOT.keys():
            first, *_ = datasets.values()
            means = {shots: fmean(each.scores[shots] for each in datasets.values()) for shots in first.scores}
            results.append(replace(first, table=AVERAGE, scores=means))
    return results
