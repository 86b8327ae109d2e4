"""A film finds the report of its run, however many runs its sampler has had since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hostless import core


@pytest.fixture
def mailbox(nodes: Callable[[str], Any]) -> Any:
    return nodes("mailbox")


def run(box: Any, number: int) -> torch.Tensor:
    """The film of a run that has ended."""
    film = torch.full((1, 16, 3, 2, 2), float(number))
    box.put(core("run.report").RunReport(1, 4), {"number": number})
    box.sent(film)
    return film


def test_every_film_has_the_report_of_its_own_run(mailbox: Any) -> None:
    box = mailbox.Mailbox()
    films = [run(box, number) for number in range(1, 4)]
    assert [box.of(film).number for film in films] == [1, 2, 3]
    assert [box.of(film).panel["number"] for film in films] == [1, 2, 3]
    assert box.of(films[1] + mailbox.NEAR / 2).number == 2, "what the host predicts beside a film is near it"
    assert box.report is box.of(films[2]).report


def test_what_is_too_old_is_said_to_be(mailbox: Any) -> None:
    box = mailbox.Mailbox()
    films = [run(box, number) for number in range(1, mailbox.KEPT + 2)]
    assert box.of(films[1]).number == 2
    with pytest.raises(ValueError, match=rf"none of the latest {mailbox.KEPT} runs of its sampler \({mailbox.KEPT + 1} in all\)"):
        box.of(films[0])


@pytest.mark.parametrize("made", [torch.full((1, 16, 3, 2, 2), 7.0), torch.ones(1, 16, 3, 2, 3), torch.full((1, 16, 3, 2, 2), torch.nan)])
def test_a_latent_of_no_run_is_named_as_such(mailbox: Any, made: torch.Tensor) -> None:
    box = mailbox.Mailbox()
    run(box, 1)
    with pytest.raises(ValueError, match="no run of this sampler made this latent"):
        box.of(made)
    with pytest.raises(ValueError, match="no run of this sampler made this latent"):
        mailbox.Mailbox().of(made)


def test_a_film_that_the_sampler_was_not_asked_for_is_refused(mailbox: Any) -> None:
    box = mailbox.Mailbox()
    film = run(box, 1)
    with pytest.raises(RuntimeError, match="bypass that node"):
        box.sent(film)
