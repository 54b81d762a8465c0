"""What the Trainer tells: how many samples a batch has, where they come in random order, and what its optimizers do."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_gradflow.callbacks.trainer_facts import batch_size, falling_updates

DATA = TensorDataset(torch.arange(40))
SHUFFLED = DataLoader(DATA, 8, shuffle=True)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


def told(loaders, is_last_batch=False):
    return batch_size(SimpleNamespace(train_dataloader=loaders, is_last_batch=is_last_batch))


def distributed(shuffle):
    return DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=shuffle)


@pytest.mark.parametrize(
    "loader",
    [
        SHUFFLED,
        DataLoader(DATA, 8, sampler=RandomSampler(DATA, replacement=True)),
        DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(20))),
        DataLoader(DATA, 8, sampler=WeightedRandomSampler(torch.ones(40), 40)),
        DataLoader(DATA, 8, sampler=distributed(True)),
    ],
)
def test_samples_in_random_order_are_counted(loader):
    assert told(loader) == 8


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 8),
        DataLoader(DATA, 8, sampler=SequentialSampler(DATA)),
        DataLoader(DATA, 8, sampler=distributed(False)),
        DataLoader(DATA, 8, sampler=list(range(40))),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=False)),
        DataLoader(DATA, batch_size=None, shuffle=True),
        DataLoader(DATA, 1, shuffle=True),
        DataLoader(Stream(), 8),
        [torch.ones(8, 2)],
        None,
        [],
        {},
    ],
)
def test_nothing_is_said_of_others(loader):
    assert told(loader) is None


def test_several_loaders_have_to_agree():
    assert told({"a": SHUFFLED, "b": [DataLoader(DATA, 8, shuffle=True)]}) == 8
    assert told([SHUFFLED, DataLoader(DATA, 4, shuffle=True)]) is None
    assert told([SHUFFLED, DataLoader(DATA, 8)]) is None
    assert told([SHUFFLED, None]) is None


@pytest.mark.parametrize(("size", "drop_last", "told_last"), [(8, False, 8), (7, False, None), (7, True, 7)])
def test_of_the_last_batch_it_is_known_where_it_is_a_whole_one(size, drop_last, told_last):
    loader = DataLoader(DATA, size, shuffle=True, drop_last=drop_last)
    assert told(loader) == size
    assert told(loader, is_last_batch=True) == told_last


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([torch.optim.Adagrad], 1.0),
        ([torch.optim.Adagrad, torch.optim.SGD], 0.0),
        ([torch.optim.Adam], 0.0),
        ([torch.optim.RMSprop], 0.0),
        ([torch.optim.Adadelta], 0.0),
        ([torch.optim.SGD], 0.0),
        ([], 0.0),
    ],
)
def test_the_steps_of_adagrad_fall_by_themselves(kinds, expected):
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert falling_updates(SimpleNamespace(optimizers=[kind(weights, lr=0.1) for kind in kinds])) == expected
