"""Packing: round trips, and the exact layout that checkpoints rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ao.dtypes.bits import CHUNK, pack, packed_dim, unpack

BITS = range(1, 9)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.lists(st.integers(1, 5), max_size=2), st.integers(0, 20), st.integers(0, 2**31))
def test_round_trip(bits, lead, bytes_, seed):
    codes = torch.randint(0, 2**bits, (*lead, 8 * bytes_), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.shape == (*lead, bits * bytes_)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_dim(bits, dim):
    codes = torch.randint(0, 2**bits, (24, 40, 72), dtype=torch.uint8)
    packed = pack(codes, bits, dim)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, dim), codes)
    assert bits == 8 or packed_dim(packed.shape, codes.shape) == dim


@pytest.mark.parametrize("bits", range(1, 8))
def test_chunks_are_independent(bits):
    """The bytes of a chunk depend on its own elements only, so that a row can be cut there."""
    codes = torch.randint(0, 2**bits, (3 * CHUNK + 8,), dtype=torch.uint8)
    whole = pack(codes, bits)
    parts = [pack(codes[i : i + CHUNK], bits) for i in range(0, len(codes), CHUNK)]
    assert torch.equal(whole, torch.cat(parts))


def test_golden_layout():
    """Four bits: byte `lane` holds element `lane` low and element 16 + `lane` high."""
    codes = torch.arange(32) % 16
    assert pack(codes, 4).tolist() == [i % 16 | ((16 + i) % 16) << 4 for i in range(16)]
    two = torch.tensor([i % 4 for i in range(8)] + [3] * 8 + [0] * 8 + [1] * 8)
    assert pack(two, 2).tolist() == [i % 4 | 3 << 2 | 0 << 4 | 1 << 6 for i in range(8)]
    one = torch.zeros(32, dtype=torch.uint8)
    one[[0, 5, 31]] = 1  # byte 0 bit 0, byte 1 bit 1, byte 3 bit 7
    assert pack(one, 1).tolist() == [1, 2, 0, 128]
    three = torch.zeros(32, dtype=torch.uint8)
    three[0], three[9], three[31] = 7, 5, 4  # low two bits in bytes 0..7, the high bit in bytes 8..11
    assert pack(three, 3).tolist() == [3, 1 << 2, 0, 0, 0, 0, 0, 0, 1, 1 << 2, 0, 128]


def test_refusals():
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        pack(torch.zeros(8, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="cannot pack 12 elements of 4 bits"):
        pack(torch.zeros(12, dtype=torch.uint8), 4)
