"""General rows mixed into training rows, so that a model that learns one job goes on seeing others.

Does not know: where the rows come from, how they are trained on.
"""

from __future__ import annotations

import numpy as np

from luthier.data.dataset import Rows

STREAM = 0x7265706C  # keeps these draws apart from the split's and the epochs' of the same seed
ELSEWHERE = -1  # the file number of rows that are not in the run's own data


def mix(train: Rows, general: Rows, share: float, seed: int) -> tuple[Rows, int]:
    """(`train` with about `share` x its number of general rows behind it, how many).

    The rows are drawn by the seed without repeats, all of them again when they do not suffice. Their order among the
    others is that of any rows: shuffled each epoch.
    """
    wanted = round(share * len(train))
    rng = np.random.default_rng([seed, STREAM])
    picked: list[int] = []
    while len(picked) < wanted:
        picked += rng.permutation(len(general))[: wanted - len(picked)].tolist()
    mixed = train.select(range(len(train)))
    mixed.pairs &= general.pairs or not picked
    for index in picked:
        ids, weights = general[index]
        mixed.add(ids.tolist(), weights.tolist(), general.places[index][1], general.keys[index], ELSEWHERE)
    return mixed, len(picked)
