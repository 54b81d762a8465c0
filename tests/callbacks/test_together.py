"""Ranks that meet before they do something together."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from lightning_gradflow.callbacks.together import ApartError, Together
from tests.distributed.launcher import launch

CPU = torch.device("cpu")


def _of_two_ranks():
    """What comes of each meeting, on this rank."""
    first = int(os.environ["RANK"]) == 0

    def said(meeting):
        together = Together(CPU, ranks=2)
        try:
            return meeting(together)
        except ApartError:
            together.fail()  # is said already: else this rank would wait
            return "apart"

    return {
        "same": said(lambda t: t.agree("a")),
        "other": said(lambda t: t.agree("a" if first else "b")),
        "worst": said(lambda t: t.worst(0 if first else 2)),
        "failed": said(lambda t: t.agree("a") if first else t.fail()),
        "failed at worst": said(lambda t: t.worst(0) if first else t.fail()),
        "another meeting": said(lambda t: t.worst(0) if first else t.agree("a")),
        "the same meeting": said(lambda t: t.worst(255)),
    }


def test_two_ranks_go_on_together_or_not_at_all():
    first, second = launch("tests.callbacks.test_together", timeout=60)
    both = {"same": None, "other": "apart", "worst": 2, "another meeting": "apart", "the same meeting": 255}
    assert first == both | {"failed": "apart", "failed at worst": "apart"}
    assert second == both | {"failed": None, "failed at worst": None}


def test_a_single_rank_needs_no_other():
    together = Together(CPU, ranks=1)
    together.agree("anything")
    assert together.worst(7) == 7
    together.fail()


@pytest.mark.parametrize("value", [0, 255])
def test_no_number_is_taken_for_words(value):
    assert Together(CPU, ranks=1).worst(value) == value


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(json.dumps(_of_two_ranks()), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while the other one's are still at work
