"""What the page knows of runs, whatever comes late, twice or of another workflow, in the code of the page: it needs node alone, no browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.host import PACK
from tests.test_saved_workflows import page_without_browser

pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="the code of the page is run by node")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = page_without_browser(tmp_path_factory.mktemp("page"))
    done = subprocess.run(["node", str(PACK / "tests" / "web" / "runs.mjs"), str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_page_that_was_loaded_in_mid_run_has_what_came_before(found: dict[str, Any]) -> None:
    """Though what the server answers is no newer than what the page was told of already."""
    shown = found["filled"]
    assert shown["answered"] == [["2112", "0210"], ["1001", "0100"]]
    assert shown["later"] == [["2112", "0211"], 8]
    assert shown["again"]


def test_a_run_stays_with_its_workflow_when_another_is_open_at_its_end(found: dict[str, Any]) -> None:
    """A sampler of the same id in the other one shows nothing; a copy whose run the host kept shows that run."""
    assert found["tabs"] == [["a", False], [None, False], ["b", False]]


def test_what_the_server_answers_goes_to_the_workflow_it_was_asked_for(found: dict[str, Any]) -> None:
    """Another one is open when the answer comes."""
    assert found["late"] == {"texts": [], "films": [8, None]}


def test_a_sampler_that_has_not_run_says_so_in_the_language_of_the_page(found: dict[str, Any]) -> None:
    """The sidebar makes its own before translations are there."""
    assert found["language"] == "noch nichts"


def test_a_page_whose_connection_comes_again_catches_up(found: dict[str, Any]) -> None:
    """The run was stopped meanwhile, ended with the server, or ended well; where nothing answers, nothing is concluded."""
    assert found["lost"] == {
        "unanswered": ["running", "0000", 4],
        "stopped": ["stopped", "0000", 4],
        "restarted": ["stopped", "0000", 4],
        "ended": ["finished", "2112", 8],
    }


def test_a_report_of_an_earlier_run_replaces_no_later_one(found: dict[str, Any]) -> None:
    assert found["undone"] == ["2nd", "running", 4]


def test_no_undo_waits_for_the_server_and_other_workflows_ask_nothing(found: dict[str, Any]) -> None:
    assert found["waits"] == [["configured", ["/history?max_items=20"]], ["configured", []]]


def test_a_film_that_the_page_let_go_of_is_asked_for_again(found: dict[str, Any]) -> None:
    assert found["again"] == 4


def test_a_film_that_stands_is_drawn_when_its_picture_is_there(found: dict[str, Any]) -> None:
    """As it does where the system asks for less motion: nothing else draws it after a reload."""
    assert found["held"] == [0, 1]


def test_both_keys_of_a_button_hold_a_film_or_let_it_play(found: dict[str, Any]) -> None:
    assert found["keys"] == [[True, True], [True, True], [False, False]]


def test_an_output_goes_to_the_kind_of_node_that_sent_it(found: dict[str, Any]) -> None:
    """Where another workflow is open meanwhile its number may be that of another node."""
    assert found["kinds"] == [24]
