"""Several data sets as one, by weights."""

import math
from collections.abc import Mapping

import numpy as np

from .records import located
from .registry import Dataset
from .samples import Sample


class Mixture:
    """A map-style sequence of samples drawn from several data sets.

    What stands at an index follows from (seed, index) alone: training resumes anywhere by going on counting, and a
    longer mixture begins like a shorter one. Every data set goes through all its samples, in a new order each time,
    before one comes again; readers with random choices (templates, expressions) choose anew each time. Nothing is read
    before it is asked for.

    Args:
        datasets: by name; none of them empty.
        weights: how often each comes, by name, >= 0 and not all zero; None weighs each by its number of samples.
        length: number of samples, such as steps x batch size.
        seed: names the order.

    Raises:
        ValueError: no data set or an empty one, weights of other names or values, or a length below 1.
    """

    def __init__(self, datasets: Mapping[str, Dataset], weights: Mapping[str, float] | None, length: int, seed: int):
        weights = {name: len(dataset) for name, dataset in datasets.items()} if weights is None else dict(weights)
        _check(datasets, weights, length)
        self.datasets, self.names, self.seed = dict(datasets), tuple(datasets), seed
        shares = np.array([weights[name] for name in self.names], dtype=float)
        self.sources = np.random.default_rng(seed).choice(len(shares), length, p=shares / shares.sum())
        self.places = np.empty(length, dtype=np.int64)
        self.visits = np.empty(length, dtype=np.int64)
        for source, dataset in enumerate(datasets.values()):
            mine = np.flatnonzero(self.sources == source)
            rng = np.random.default_rng([seed, source])
            rounds = [rng.permutation(len(dataset)) for _ in range(-(-len(mine) // len(dataset)))]
            self.places[mine] = np.concatenate(rounds)[: len(mine)] if rounds else mine
            self.visits[mine] = np.arange(len(mine)) // len(dataset)

    def __len__(self) -> int:
        return len(self.sources)

    def source(self, index: int) -> tuple[str, int]:
        """Name of the data set that `index` draws from, and the number of the sample in it; IndexError beyond."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}.")
        return self.names[self.sources[index]], int(self.places[index])

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            IndexError: an index beyond the length.
            ValueError: the sample is broken; says which one of which data set, and where in its file.
        """
        name, place = self.source(index)
        dataset = self.datasets[name]
        with located(f"sample {place} of data set {name!r} (index {index} of the mixture)"):
            return dataset.at(place, int(self.visits[index])) if hasattr(dataset, "at") else dataset[place]


def _check(datasets: Mapping[str, Dataset], weights: Mapping[str, float], length: int) -> None:
    if empty := [name for name, dataset in datasets.items() if not len(dataset)]:
        raise ValueError(f"Data sets without samples can't be mixed: {', '.join(empty)}.")
    if set(weights) != set(datasets):
        raise ValueError(f"There must be one weight for each of {sorted(datasets)}, got weights of {sorted(weights)}.")
    total = sum(weights.values())
    if not weights or min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ValueError(f"Weights must be >= 0, finite and not all zero, got {weights}.")
    if length < 1:
        raise ValueError(f"length is the number of samples and must be >= 1, got {length}.")
