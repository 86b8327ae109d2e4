"""Every node has a help page, with a picture that is there and small, and says when not to use the node."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from tests.host import NEEDS_HOST, OPENER, PACK, Host
from tests.node_texts import read

FOLDER = PACK / "web" / "docs"
NODES = sorted(read("en", "nodeDefs.json"))
LARGEST = 60_000
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")


def test_there_is_a_page_for_every_node_and_no_other() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == NODES


@pytest.mark.parametrize("node", NODES)
def test_a_page_begins_with_the_node_s_name_and_a_picture(node: str) -> None:
    lines = (FOLDER / f"{node}.md").read_text(encoding="utf-8").split("\n")
    assert lines[0] == f"# {read('en', 'nodeDefs.json')[node]['display_name']}"
    assert PICTURE.fullmatch(lines[2]), lines[2]


@pytest.mark.parametrize("node", NODES)
def test_pictures_are_there_and_small(node: str) -> None:
    """The page looks for a relative path beside the help, whatever folder the pack is in."""
    for _, name in PICTURE.findall((FOLDER / f"{node}.md").read_text(encoding="utf-8")):
        path = FOLDER / name
        assert "/" not in name
        assert path.suffix in (".webp", ".jpg")
        assert path.stat().st_size <= LARGEST
        with Image.open(path) as picture:
            assert 100 < picture.width <= 1600


def test_every_picture_is_shown() -> None:
    shown = {name for path in FOLDER.glob("*.md") for _, name in PICTURE.findall(path.read_text(encoding="utf-8"))}
    assert {path.name for path in FOLDER.iterdir() if path.suffix != ".md"} == shown


@pytest.mark.parametrize("node", NODES)
def test_a_page_says_when_not_to_use_the_node(node: str) -> None:
    assert re.search(r"^(## |\*\*)When not to use it", (FOLDER / f"{node}.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("node", NODES)
def test_a_page_names_every_setting_of_its_node(node: str) -> None:
    """Inputs that other nodes give, and those that need no words, are left to their tooltips."""
    page = (FOLDER / f"{node}.md").read_text(encoding="utf-8")
    plain = {"model", "width", "height", "batch_size", "vae", "model_name", "latent", "samples", "images"}
    assert [name for name in read("en", "nodeDefs.json")[node]["inputs"] if name not in plain and name not in page] == []


@pytest.mark.host
@pytest.mark.skipif(NEEDS_HOST[1].args[0], reason=NEEDS_HOST[1].kwargs["reason"])
def test_the_host_serves_every_page_and_picture(host: Host) -> None:
    for path in FOLDER.iterdir():
        with OPENER.open(f"{host.url}/extensions/flowcache/docs/{path.name}") as answer:
            assert answer.read() == path.read_bytes()
