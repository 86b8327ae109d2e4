"""All languages have all texts of nodes and page, and no others; the English ones are those of the code."""

from __future__ import annotations

import re

import pytest

from flowcache_core.models import FAMILIES
from tests.host import NEEDS_HOST, PACK, Host
from tests.node_texts import FILES, LANGUAGES, LOCALES, Texts, apart, english, keys, read

NUMBER = re.compile(r"\d+(?:\.\d+)?")
KEPT_TERMS = ("SkyReels-V2", "MAGI-1", "KV cache", "H.264", "PSNR", "SSIM", "LPIPS", "GiB", "CLIP", "VAE")
IN_WORDS = {"KV cache": {"zh": "KV 缓存", "ja": "KV キャッシュ", "ko": "KV 캐시"}}
"""Terms of which a part is translated."""
FORMATTING = re.compile(r"[{}@|]")
"""What the page's message format would read as its own."""


@pytest.fixture(scope="module")
def found() -> dict[str, Texts]:
    return english()


@pytest.mark.parametrize("file", FILES)
def test_english_is_what_the_code_says(found: dict[str, Texts], file: str) -> None:
    assert read("en", file) == found[file], "run python -m tests.node_texts, then translate what it names"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_language_has_every_text_and_no_other(language: str, file: str) -> None:
    assert apart(language, file) == ""


def test_the_shift_of_every_family_is_told() -> None:
    """Of few-step causal models that are not named it is that of Self-Forcing."""
    told = keys(read("en", "nodeDefs.json"))["FlowCacheScheduler/inputs/shift/tooltip"]
    shifts = {name: float(shift) for shift, name in re.findall(r"([\d.]+) for ([\w-]+)", told)}
    shifts |= {name: float(shift) for name, shift in re.findall(r"\((\w+): ([\d.]+)\)", told)}
    for family in FAMILIES:
        named = next((name for name in shifts if family.title.startswith(name)), "Self-Forcing")
        assert shifts[named] == family.noise.shift, family.title


def test_every_language_is_tested() -> None:
    assert {folder.name for folder in LOCALES.iterdir()} == set(LANGUAGES)
    assert all({path.name for path in folder.iterdir()} == set(FILES) for folder in LOCALES.iterdir())


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_numbers_and_terms_are_the_same_in_every_language(language: str) -> None:
    wanted, there = keys(read("en", "nodeDefs.json")), keys(read(language, "nodeDefs.json"))
    for key in wanted.keys() & there.keys():
        assert sorted(NUMBER.findall(wanted[key])) == sorted(NUMBER.findall(there[key])), key
        for term in KEPT_TERMS:
            assert term not in wanted[key] or IN_WORDS.get(term, {}).get(language, term) in there[key], (key, term)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_empty_or_left_in_english_or_read_as_a_format(language: str) -> None:
    for file in FILES:
        texts = keys(read(language, file))
        assert all(text.strip() and not FORMATTING.search(text) for text in texts.values())
    foreign = {key for key, text in keys(read(language, "nodeDefs.json")).items() if key.endswith(("tooltip", "description")) and text.isascii()}
    assert (language == "en") == bool(foreign), foreign


def test_what_the_page_says_has_a_name_in_one_place() -> None:
    """A text that a module writes out by itself could not be translated."""
    written = {
        path.name: re.findall(r'(?:textContent|title|label|placeholder) = "([^"]+)"', path.read_text(encoding="utf-8"))
        for path in (PACK / "web").glob("*.js")
    }
    assert {name: texts for name, texts in written.items() if texts} == {}
    used = {name for path in (PACK / "web").glob("*.js") for name in re.findall(r"STRINGS\.(\w+)", path.read_text(encoding="utf-8"))}
    assert used <= keys(read("en", "main.json")["flowcache"]).keys()


@pytest.mark.host
@pytest.mark.skipif(NEEDS_HOST[1].args[0], reason=NEEDS_HOST[1].kwargs["reason"])
def test_the_host_knows_the_same_nodes_and_gives_the_page_all_languages(host: Host) -> None:
    ours = {key: node for key, node in host.ask("/object_info").items() if key.startswith("FlowCache")}
    for key, texts in read("en", "nodeDefs.json").items():
        node = ours.pop(key)
        inputs = {name: spec[1].get("tooltip") for kind in ("required", "optional") for name, spec in node["input"].get(kind, {}).items()}
        assert inputs == {name: one["tooltip"] for name, one in texts["inputs"].items()}, key
        assert node["output_tooltips"] == [one["tooltip"] for one in texts["outputs"].values()], key
        assert (node["display_name"], node["description"]) == (texts["display_name"], texts["description"])
    assert not ours
    given = host.ask("/i18n")
    for language in LANGUAGES:
        assert {key: given[language]["nodeDefs"][key] for key in read(language, "nodeDefs.json")} == read(language, "nodeDefs.json")
        assert given[language]["flowcache"] == read(language, "main.json")["flowcache"]
