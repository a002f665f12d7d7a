"""What is hopeless, and what only looks like it."""

import math

import pytest

from anon_dist.sweep.early import Peer, hopeless

GOOD = {10: 5.0, 20: 4.0, 30: 3.5, 40: 3.0}
PEERS = [Peer(GOOD, ended_badly=False)] * 4


@pytest.mark.parametrize(
    ("curve", "peers", "reason"),
    [
        ({10: 5.0, 20: math.nan}, [], "is nan"),
        ({10: 5.0, 20: math.inf}, [], "is inf"),
        ({10: 5.0, 20: 4.0, 30: 4.9}, [], "rose from 4 to 4.9"),
        ({10: 5.0, 20: 4.5, 30: 4.4}, PEERS, "1.1 times the median"),
        ({10: 5.0, 20: 4.5, 30: 4.4}, PEERS[:3], None),  # too few to compare with
        ({10: 5.0, 20: 4.39, 30: 3.9}, PEERS, None),  # worse only once
        ({10: 9.0, 20: 8.0}, PEERS, None),  # only once after a quarter of the steps
        ({10: 5.0, 20: 4.3, 30: 3.8, 40: 3.2}, PEERS, None),  # worse, but not by much
        ({10: 5.0, 20: 4.0, 30: 4.7}, [], None),  # a bump
        ({}, PEERS, None),
        ({20: 4.5, 30: 4.4, 61: 4.3}, [Peer({20: 3.0, 30: 3.0, 61: 3.0}, False)] * 4, None),  # nearly through
        ({50: 4.0, 60: 4.0}, PEERS, None),  # nobody else has come so far
    ],
)
def test_rule(curve, peers, reason):
    found = hopeless(curve, peers, steps=80)
    assert (found is None) if reason is None else (reason in found)


def test_the_rule_does_not_grow_stricter_as_others_end():
    """Three of five ended badly at step 10: the median at later steps is theirs, infinite."""
    peers = [*PEERS[:2], *[Peer({10: 9.0}, ended_badly=True)] * 3]
    assert hopeless({10: 5.0, 20: 5.0, 30: 5.0}, peers, steps=40) is None
