"""Processes that share work: alone by default, and one error for all."""

import pytest
import torch
from training_runs import two_ranks

from attnres.errors import AttnResError, DataError
from attnres.processes.ranks import Ranks


def shared_work() -> None:
    """What each of two processes does: rank 1 fails, and both must end with its error."""
    ranks = Ranks.launch(2, torch.device("cpu"))
    assert ranks.size == 2 and ranks.device == torch.device("cpu")
    ranks.agree()
    ranks.agree(DataError("of rank 1") if ranks.rank == 1 else None)


def test_ranks_raise_the_error_of_one_in_all() -> None:
    assert two_ranks(shared_work) == [DataError.code] * 2


def first_fails() -> None:
    """Work of the first alone fails while the other waits for it: both end with its error."""

    def work() -> None:
        raise DataError("of the first")

    Ranks.launch(2, torch.device("cpu")).first(work)


def test_ranks_that_wait_for_the_first_end_with_its_error() -> None:
    assert two_ranks(first_fails) == [DataError.code] * 2


def test_ranks_of_one_process_need_no_group() -> None:
    ranks = Ranks.launch(1, torch.device("cpu"))
    assert (ranks.rank, ranks.size, ranks.device) == (0, 1, torch.device("cpu"))
    ranks.agree()
    with pytest.raises(AttnResError, match="mine"):
        ranks.agree(AttnResError("mine"))
