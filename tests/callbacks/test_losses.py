"""Finding the loss among what users return and log."""

import pytest
import torch

from lightning_gradflow.callbacks.losses import find_loss, returned_loss


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["loss"], "loss", None),
        (["train_loss", "val_loss"], "train_loss", "val_loss"),
        (["train/loss", "valid/loss", "train/acc", "valid/acc"], "train/loss", "valid/loss"),
        (["Loss/train", "Loss/validation"], "Loss/train", "Loss/validation"),
        (["evaluation", "eval-nll", "nll"], "nll", "eval-nll"),
        (["train_loss_step", "train_loss_epoch", "train_loss"], "train_loss", None),
        (["train_aux_loss", "train_loss"], "train_loss", None),
        (["acc", "f1"], None, None),
        (["train_acc", "val_acc"], None, None),
        (["val/top5"], None, None),
        (["val_acc", "val_x"], None, "val_x"),
        (["anything"], "anything", None),
        (["val_anything"], None, "val_anything"),
        (["interval"], "interval", None),  # the letters of val inside a word say nothing
        ([], None, None),
    ],
)
def test_a_loss_is_found_by_its_name(names, train, validation):
    assert find_loss(names, validation=False) == train
    assert find_loss(names, validation=True) == validation


def test_the_order_of_the_names_does_not_matter():
    names = ["train_loss", "loss_b", "loss_a", "val_loss"]
    assert find_loss(names, validation=False) == find_loss(reversed(names), validation=False)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (torch.tensor(2.0), 2.0),
        ({"loss": torch.tensor(2.0), "other": 3}, 2.0),
        (torch.tensor([2.0]), 2.0),
        (None, None),
        ({"other": torch.tensor(2.0)}, None),
        (torch.ones(3), None),
        ({"loss": 2.0}, None),
    ],
)
def test_the_returned_loss_is_a_single_number(outputs, expected):
    loss = returned_loss(outputs)
    assert (loss if loss is None else loss.item()) == expected


def test_the_returned_loss_holds_no_graph():
    assert not returned_loss(torch.ones((), requires_grad=True) * 2).requires_grad
