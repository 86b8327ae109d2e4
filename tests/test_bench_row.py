"""`bench row`: one pass and one after the other make the same velocities, and what cannot be asked is refused."""

from __future__ import annotations

import argparse

import pytest
import torch

from flowcache_core.bench import row


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    row.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_a_row_in_one_pass_is_the_row_chunk_by_chunk(dtype: str, most: float) -> None:
    (one,) = row.run(arguments("--model", "smoke", "--rows", "2", "--threads", "1", "--dtype", dtype))["rows"]
    assert (one["chunks"], one["tokens"], one["timed"], one["layers"], one["picture"]) == (5, 20, 2, 3, "32 x 32")
    assert 0 <= one["distance"] < most
    assert min(one["apart_s"], one["together_s"]) > 0
    assert torch.get_num_threads() == 1


def test_the_bundled_model_and_a_released_size_with_fewer_layers_are_measured() -> None:
    for words in (("--size", "32"), ("--model", "skyreels-1.3b", "--layers", "1", "--size", "16")):
        (one,) = row.run(arguments(*words, "--rows", "1", "--threads", "1", "--dtype", "float32"))["rows"]
        assert one["distance"] < 1e-4


@pytest.mark.parametrize(("words", "said"), [
    (("--rows", "0"), "0 rows on"), (("--threads", "0"), "on 0 threads"), (("--layers", "2"), "has a fixed number of layers"),
    (("--model", "skyreels-1.3b", "--layers", "31"), "31 layers were asked for: skyreels-1.3b has 30"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        row.run(arguments(*words))
