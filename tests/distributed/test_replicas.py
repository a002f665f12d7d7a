"""Fingerprints, against their definition in whole numbers; what several ranks make of them is in cases.py."""

import itertools
import struct

import pytest
import torch
from torch import nn

from anon_dist.engines import replicas
from anon_dist.engines.comparison import named
from anon_dist.engines.replicas import fingerprint

MASK = (1 << 64) - 1


def signed(number: int) -> int:
    number &= MASK
    return number - (1 << 64) if number >> 63 else number


def odd(position: int) -> int:
    mixed = signed(position * 0x9E3779B97F4A7C15)
    mixed = signed((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9)
    return signed((mixed ^ (mixed >> 32)) | 1)


def by_definition(tensor: torch.Tensor) -> int:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    words = struct.iter_unpack("<q", content + bytes(-len(content) % 8))
    row = replicas.ROW
    return signed(
        sum(
            (w + (w >> 32) * replicas.HALF) * odd((1 << 40) + i % row) * odd(i // row + 1)
            for i, (w,) in enumerate(words)
        )
    )


TENSORS = {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0),
    "odd": torch.randn(7),
    "transposed": torch.randn(3, 5).t(),
    "rows": torch.randn(2 * replicas.ROW * 2 + 3),
    "bfloat16": torch.randn(1001).bfloat16(),
    "bytes": torch.randint(-9, 9, (13,), dtype=torch.int8),
    "bool": torch.randn(9) > 0,
    "float64": torch.randn(5, dtype=torch.float64),
    "unaligned": torch.randn(65)[1:],
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_it_is_what_it_is_defined_to_be(name, monkeypatch):
    for row, rows in ((replicas.ROW, 1), (8, 1), (8, 4)):
        monkeypatch.setattr(replicas, "ROW", row)
        monkeypatch.setattr(replicas, "CPU_ROWS", rows)
        assert int(fingerprint(TENSORS[name])) == by_definition(TENSORS[name])


def test_one_flipped_bit_anywhere_is_noticed_and_two_of_the_highest():
    tensor = torch.randn(4 * 8)
    words = tensor.view(torch.int64)
    seen = {int(fingerprint(tensor))}
    for word, bit in itertools.product(range(len(words)), range(64)):
        words[word] ^= torch.tensor(signed(1 << bit))
        seen.add(int(fingerprint(tensor)))
        words[word] ^= torch.tensor(signed(1 << bit))
    assert len(seen) == 1 + 64 * len(words)
    for pair in itertools.combinations(range(len(tensor)), 2):
        tensor[list(pair)] *= -1
        seen.add(int(fingerprint(tensor)))
        tensor[list(pair)] *= -1
    assert len(seen) == 1 + 64 * len(words) + 32 * 31 // 2


def test_other_places_and_zeros_signs_are_noticed():
    a, b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])
    assert len({int(fingerprint(x)) for x in (a, b, torch.tensor([1.0, 2.0, -0.0]))}) == 3


def test_the_rarer_bits_are_named():
    by_rank = [[[0, 5], [0, 1]], [[0, 5], [0, 2]], [[0, 5], [0, 1]], [[0, 5], [0, 1]]]
    ((name, sets),) = replicas._differing(["a", "b"], by_rank)
    assert name == "b"
    hosts = {0: "x", 1: "x", 2: "y", 3: "y"}
    assert replicas._apart(sets, hosts) == "on rank 1 (x) differs from that on ranks 0, 2 and 3"
    # Two shards of two copies each: only copies of the same shard are compared.
    by_rank = [[[7, 1]], [[8, 2]], [[7, 1]], [[8, 3]]]
    ((_, sets),) = replicas._differing(["a"], by_rank)
    assert replicas._apart(sets, dict.fromkeys(range(4), "x")) == "differs between rank 1 and rank 3"
    assert named([0, 1, 2, 3, 7], {}) == "ranks 0 to 3 and 7"


def test_one_process_compares_nothing():
    replicas.check_replicas(replicas.copies_of(nn.Linear(2, 2)), torch.device("cpu"))
