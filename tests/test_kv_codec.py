"""Storage of keys and values: what comes back, what it costs, and that slots carry all that restores them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowcache_core.kernels import slots
from flowcache_core.kv import codec as module
from flowcache_core.kv.codec import CHANNEL, CODECS, EVEN, TINY, Codec, Float8, Int4, Int8, State, channel_scales, codec_of

B, H, N, D = 2, 3, 20, 16
LOSSY = [codec for codec in CODECS if not codec.lossless]
named = pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
lossy = pytest.mark.parametrize("codec", LOSSY, ids=lambda c: c.name)
both = pytest.mark.parametrize("which", ["k", "v"])


def state_of(codec: Codec, capacity: int = N, dtype: torch.dtype = torch.float32, dim: int = D) -> State:
    return codec.new(B, H, capacity, dim, "cpu", dtype)


def uneven(slots: int = N, dim: int = D) -> Tensor:
    """Slots of very different size, with one channel that is 30 times the others."""
    x = torch.randn(B, H, slots, dim) * torch.logspace(-2, 2, slots).view(-1, 1)
    x[..., 3] *= 30
    return x


def through(codec: Codec, x: Tensor, which: Any = "v") -> tuple[Tensor, State]:
    state = state_of(codec, x.shape[2], x.dtype, x.shape[3])
    codec.write(state, which, slice(0, x.shape[2]), x)
    return codec.read(state, which, x.shape[2], torch.empty_like(x)), state


def half_step(codec: Codec, state: State, which: str, x: Tensor) -> Tensor:
    """The most that any number may be off, from what is stored."""
    channel = state[CHANNEL] if which == "k" and codec.evens_keys else torch.ones(())
    if isinstance(codec, Float8):
        scale = state[f"{which}.scale"].float()
        return torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    if isinstance(codec, Int8):
        return state[f"{which}.scale"].float() / 2 * channel
    step = state[f"{which}.step"].float()
    return step.repeat_interleave(x.shape[3] // step.shape[3], -1) / 2 * channel


@lossy
@both
@pytest.mark.parametrize("dim", [16, 128, 80])
@pytest.mark.parametrize("offset", [0, 100, -100])
def test_nothing_is_off_by_more_than_half_a_step(codec: Codec, which: str, dim: int, offset: float) -> None:
    x = uneven(dim=dim) + offset
    y, state = through(codec, x, which)
    assert ((y - x).abs() <= half_step(codec, state, which, x) * (1 + 1e-5) + 1e-6 * x.abs()).all()
    assert not torch.equal(y, x)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@lossy
def test_in_16_bits_reading_adds_two_roundings_at_most(codec: Codec, dtype: torch.dtype, which: str) -> None:
    x = uneven().to(dtype)
    y, state = through(codec, x, which)
    assert y.dtype == dtype
    whole = codec.read(state, which, N, torch.empty(B, H, N, D))
    assert ((y.float() - whole).abs() <= torch.finfo(dtype).eps * whole.abs() + 1e-6).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_computed_is_bit_exact(dtype: torch.dtype, which: str) -> None:
    x = uneven().to(dtype)
    x[0, 0, 0, :4] = torch.tensor([math.inf, -0.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max])
    y, _ = through(codec_of("as computed"), x, which)
    assert y.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(bits), x.view(bits))


def test_fewer_bits_are_less_exact() -> None:
    x = torch.randn(B, H, N, 128)
    errors = [(through(codec_of(name), x)[0] - x).norm() / x.norm() for name in ("as computed", "int8", "fp8", "int4")]
    assert errors == sorted(errors)
    assert errors[0] == 0
    assert errors[-1] < 0.11


@named
@both
def test_slots_of_zeros_stay_zeros(codec: Codec, which: str) -> None:
    x = uneven()
    x[:, :, 4:9] = 0
    x[0] = 0
    y, _ = through(codec, x, which)
    assert torch.equal(y[:, :, 4:9], x[:, :, 4:9])
    assert torch.equal(y[0], x[0])


@named
@both
@pytest.mark.parametrize("value", [1.0, -1.0, 3.14159, -1e-4, 7e4, 1e-30])
def test_constant_slots_come_back_to_8_bits(codec: Codec, which: str, value: float) -> None:
    x = torch.full((B, H, 4, D), value)
    y, _ = through(codec, x, which)
    torch.testing.assert_close(y, x, rtol=2**-8, atol=0)


@named
@both
def test_no_slots_are_no_work(codec: Codec, which: Any) -> None:
    state = state_of(codec)
    codec.write(state, which, slice(0, 0), torch.empty(B, H, 0, D))
    assert codec.read(state, which, 0, torch.empty(B, H, 0, D)).numel() == 0
    if codec.evens_keys:
        assert not state[CHANNEL].any()


@lossy
def test_values_of_one_slot_do_not_depend_on_other_slots(codec: Codec) -> None:
    x = uneven()
    y, _ = through(codec, x)
    alone, _ = through(codec, x[:, :, 7:8].clone())
    assert torch.equal(y[:, :, 7:8], alone)


@named
def test_values_written_in_pieces_equal_values_written_at_once(codec: Codec) -> None:
    x, state = uneven(), state_of(codec)
    for start, end in ((0, 1), (1, 8), (8, N)):
        codec.write(state, "v", slice(start, end), x[:, :, start:end])
    assert torch.equal(codec.read(state, "v", N, torch.empty_like(x)), through(codec, x)[0])


@named
def test_keys_written_in_pieces_equal_keys_written_at_once_under_one_channel_scale(codec: Codec) -> None:
    x, pieces, whole = uneven(), state_of(codec), state_of(codec)
    for start, end in ((0, 5), (5, 6), (6, N)):
        codec.write(pieces, "k", slice(start, end), x[:, :, start:end])
    if codec.evens_keys:
        whole[CHANNEL].copy_(channel_scales(x[:, :, :5]))
    codec.write(whole, "k", slice(0, N), x)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole if name.startswith("k."))


def test_the_channel_scale_is_fixed_by_the_first_keys_of_each_film() -> None:
    codec, x = Int8(), uneven()
    state = state_of(codec)
    first = {name: tensor[:1] for name, tensor in state.items()}
    codec.write(first, "k", slice(0, 5), x[:1, :, :5])
    assert torch.equal(state[CHANNEL][:1], channel_scales(x[:1, :, :5]))
    assert not state[CHANNEL][1:].any()
    codec.write(state, "k", slice(5, N), x[:, :, 5:])
    assert torch.equal(state[CHANNEL], torch.cat([channel_scales(x[:1, :, :5]), channel_scales(x[1:, :, 5:])]))


@pytest.mark.parametrize("codec", [c for c in CODECS if c.evens_keys], ids=lambda c: c.name)
def test_an_outlier_channel_costs_the_other_channels_less_in_keys_than_in_values(codec: Codec) -> None:
    x = torch.randn(B, H, 64, 128)
    x[..., 5] *= 50
    others = [c for c in range(128) if c != 5]
    keys, values = ((through(codec, x, which)[0] - x)[..., others].norm() for which in ("k", "v"))
    assert keys < values / 3


@pytest.mark.parametrize("codec", [c for c in CODECS if c.evens_keys], ids=lambda c: c.name)
def test_a_channel_that_speaks_late_does_not_drown_the_others(codec: Codec) -> None:
    x = torch.randn(B, H, N, D)
    x[:, :, :10, 3] = 0
    state = state_of(codec)
    codec.write(state, "k", slice(0, 10), x[:, :, :10])
    codec.write(state, "k", slice(10, N), x[:, :, 10:])
    late = (codec.read(state, "k", N, torch.empty_like(x)) - x)[:, :, 10:].norm()
    plain = (through(codec, x[:, :, 10:])[0] - x[:, :, 10:]).norm()
    assert late < plain * EVEN**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@lossy
def test_keys_that_begin_with_zeros_or_with_dust_are_read_like_any_other(codec: Codec, dtype: torch.dtype) -> None:
    x, state = torch.randn(B, H, N, D).to(dtype) * 100, state_of(codec, dtype=dtype)
    x[0, :, :10], x[1, :, :10] = 0, 1e-7
    codec.write(state, "k", slice(0, 10), x[:, :, :10])
    codec.write(state, "k", slice(10, N), x[:, :, 10:])
    late = codec.read(state, "k", N, torch.empty_like(x))[:, :, 10:]
    assert (late - x[:, :, 10:]).float().norm() < 0.15 * x[:, :, 10:].float().norm()


@named
def test_reading_a_range_equals_that_range_of_all(codec: Codec) -> None:
    x = uneven()
    whole, state = through(codec, x, "k")
    out = torch.full((B, H, N, D), 7.0)
    assert codec.read(state, "k", 9, out[:, :, 2:8], start=3).data_ptr() == out[:, :, 2:8].data_ptr()
    assert torch.equal(out[:, :, 2:8], whole[:, :, 3:9])
    assert (out[:, :, :2] == 7).all()
    assert (out[:, :, 8:] == 7).all()


@named
@pytest.mark.parametrize("block", [1, B * H * D * 3])
def test_how_much_is_converted_at_a_time_changes_nothing(codec: Codec, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    x = uneven()
    whole, state = through(codec, x, "k")
    index = torch.tensor([[0, 2, 3, 11, 19], [1, 5, 6, 7, 8]])
    codec.keep(state, index, N)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(slots, "BLOCK", block)
    again, other = through(codec, x, "k")
    codec.keep(other, index, N)
    assert torch.equal(again, whole)
    assert all(torch.equal(bits(other[name]), bits(state[name])) for name in state if name.startswith("k."))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@named
@pytest.mark.parametrize("kept", [1, 7, 19])
def test_keeping_moves_exactly_the_chosen_slots_and_no_bit_of_them(codec: Codec, kept: int) -> None:
    x, state = uneven(), state_of(codec, N + 4)
    for which in ("k", "v"):
        codec.write(state, which, slice(0, N), x)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in state.items()}
    index = torch.stack([torch.randperm(N)[:kept].sort().values for _ in range(B)])
    codec.keep(state, index, N)
    for name, tensor in state.items():
        for film in range(B) if name != CHANNEL else ():
            assert torch.equal(bits(tensor[film, :, :kept]), bits(before[name][film, :, index[film]]))
        assert name != CHANNEL or torch.equal(tensor, before[name])


@named
def test_slots_survive_many_evictions_without_loss(codec: Codec) -> None:
    x = uneven()
    written, state = through(codec, x, "k")
    left = torch.arange(N)
    for count in (17, 12, 11, 4):
        chosen = torch.randperm(len(left))[:count].sort().values
        codec.keep(state, chosen.expand(B, -1), len(left))
        left = left[chosen]
    assert torch.equal(codec.read(state, "k", 4, torch.empty(B, H, 4, D)), written[:, :, left])


@named
def test_keeping_all_slots_changes_nothing_and_keeping_more_is_refused(codec: Codec) -> None:
    _, state = through(codec, uneven())
    before = {name: tensor.clone() for name, tensor in state.items()}
    codec.keep(state, torch.arange(N).expand(B, -1), N)
    assert all(torch.equal(bits(state[name]), bits(before[name])) for name in state)
    with pytest.raises(ValueError, match=rf"{N} slots .* out of {N - 1}"):
        codec.keep(state, torch.arange(N).expand(B, -1), N - 1)


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_bytes_are_as_promised(codec: Codec, dtype: torch.dtype, dim: int) -> None:
    state = state_of(codec, dtype=dtype, dim=dim)
    slots = B * N * codec.bytes_per_token(H, dim, dtype.itemsize)
    assert codec.bytes(state) == slots + B * codec.bytes_per_layer(H, dim)
    assert all(tensor.shape[:3] == (B, H, 1 if name == CHANNEL else N) for name, tensor in state.items())


@pytest.mark.parametrize(("name", "saving"), [("as computed", 1), ("fp8", 1.96), ("int8", 1.96), ("int4", 3.5)])
def test_a_codec_saves_what_its_bits_say(name: str, saving: float) -> None:
    assert 2 * 40 * 128 * 2 / codec_of(name).bytes_per_token(40, 128, 2) >= saving


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation made in storage of its own."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


@named
@both
@pytest.mark.parametrize("work", ["read", "keep"])
def test_reading_and_keeping_allocate_no_more_than_a_block(codec: Codec, which: Any, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", B * H * D * 2)
    monkeypatch.setattr(slots, "BLOCK", B * H * D * 2)
    out, state = through(codec, uneven(200), which)
    index = torch.arange(50, 200)
    with Allocations([out, index, *state.values()]) as seen:
        if work == "read":
            codec.read(state, which, 200, out)
        else:
            codec.keep(state, index.expand(B, -1), 200)
    assert (seen.largest > 0) != (codec.lossless and work == "read")
    assert seen.largest <= B * H * D * 2 < out.numel() / 50


@named
def test_what_this_machine_can_hold_is_not_refused(codec: Codec) -> None:
    codec.require("cpu")


def test_what_a_device_cannot_convert_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"cannot be kept as fp8 on cpu .*: choose int8 or as computed"):
        NoCast().require("cpu")


class NoCast(Float8):
    """What a device without this dtype does: the first conversion raises."""

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"codes": x.to(torch.float4_e2m1fn_x2), "scale": x[..., :1]}


def test_heads_of_an_odd_size_are_refused_by_int4() -> None:
    with pytest.raises(ValueError, match="heads of 15 channels"):
        Int4().new(1, 1, 1, 15, "cpu", torch.float32)


def test_codecs_are_found_by_name_and_unknown_names_are_refused() -> None:
    assert [codec_of(codec.name) for codec in CODECS] == list(CODECS)
    assert len({codec.name for codec in CODECS}) == len(CODECS)
    with pytest.raises(ValueError, match="as computed, fp8, int8, int4"):
        codec_of("int2")


@pytest.mark.parametrize("largest", [TINY, 1e-20, 1e20])
@lossy
def test_no_magnitude_is_out_of_range(codec: Codec, largest: float) -> None:
    x = torch.randn(B, H, N, 128)
    x *= largest / x.abs().amax()
    y, _ = through(codec, x, "k")
    assert y.isfinite().all()
    if largest > TINY:
        assert (y / largest - x / largest).norm() < 0.15 * (x / largest).norm()


def error_of_attention(codec: Codec, scaled: Callable[[Tensor], Tensor]) -> float:
    """Relative error of attention over stored keys whose outlier channels the queries share."""
    size = torch.ones(64).index_fill_(0, torch.tensor([3, 40]), 6.0)
    q, k, v = torch.randn(1, 2, 50, 64) * size.sqrt(), torch.randn(1, 2, 200, 64) * size, torch.randn(1, 2, 200, 64)
    state = codec.new(1, 2, 200, 64, "cpu", torch.float32)
    if CHANNEL in state:
        state[CHANNEL].copy_(scaled(k))
    codec.write(state, "k", slice(0, 200), k)
    restored = codec.read(state, "k", 200, torch.empty_like(k))
    attend = torch.nn.functional.scaled_dot_product_attention
    return float((attend(q, restored, v) - attend(q, k, v)).norm() / attend(q, k, v).norm())


@pytest.mark.parametrize("codec", [c for c in CODECS if c.evens_keys], ids=lambda c: c.name)
def test_the_channel_scale_lessens_the_error_of_attention(codec: Codec) -> None:
    torch.manual_seed(1)
    scaled = error_of_attention(codec, channel_scales)
    torch.manual_seed(1)
    assert scaled < error_of_attention(codec, lambda k: torch.ones_like(k[:, :, :1]))
