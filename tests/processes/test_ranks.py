"""Processes that share work: alone by default, and one error for all."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from training_runs import two_ranks

from attnres.errors import AttnResError, ConfigError, DataError
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


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MisconfigurationException("You requested gpu: [0, 1], but your machine only has: [0]"), ConfigError),
        (RuntimeError("no such device"), ConfigError),
        (torch.distributed.DistNetworkError("the address is in use"), torch.distributed.DistNetworkError),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), torch.AcceleratorError),
    ],
)
def test_ranks_say_of_the_configuration_what_is_wrong_with_it_alone(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr("attnres.processes.ranks.Fabric", fails)
    with pytest.raises(raised):
        Ranks.launch(2, torch.device("cpu"))


def test_ranks_of_one_process_need_no_group() -> None:
    ranks = Ranks.launch(1, torch.device("cpu"))
    assert (ranks.rank, ranks.size, ranks.device) == (0, 1, torch.device("cpu"))
    ranks.agree()
    with pytest.raises(AttnResError, match="mine"):
        ranks.agree(AttnResError("mine"))
