"""Fingerprints find calibration windows in evaluation text wherever they lie, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from bitwright.calibration.overlap import fingerprints, overlap


def tokens(*shape, seed=0):
    return torch.randint(0, 50_000, shape, generator=torch.Generator().manual_seed(seed))


def polynomial(ids):
    """The hash of one shingle in plain integers."""
    value = 0
    for token in ids:
        value = (value * 0x9E3779B97F4A7C15 + int(token) + 1) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) >> 11


def test_fingerprints_are_eight_evenly_spaced_shingles_hashed_as_documented():
    ids = tokens(3, 100)
    starts = (0, 10, 19, 29, 39, 49, 58, 68)
    assert fingerprints(ids) == [[polynomial(window[start : start + 32]) for start in starts] for window in ids]


def test_fingerprints_never_change():
    # manifests hold them: another hash would find nothing in old folders
    assert fingerprints(torch.arange(40)[None])[0][:2] == [2490209857751997, 8658566870044689]
    assert fingerprints(torch.zeros(1, 64, dtype=torch.int64)) != fingerprints(torch.ones(1, 64, dtype=torch.int64))


def test_json_readers_that_know_only_doubles_keep_them():
    values = [value for window in fingerprints(tokens(20, 512)) for value in window]
    assert all(int(float(value)) == value for value in values)
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize("offset", [0, 1, 31, 700])
def test_windows_are_found_at_any_offset_and_across_rows(offset):
    windows = tokens(4, 128)
    text = tokens(1, 2048, seed=1)
    text[0, offset : offset + 128] = windows[2]
    assert overlap(text, fingerprints(windows)) == 1
    assert overlap(text.reshape(-1, 64), fingerprints(windows)) == 1


def test_a_phrase_in_common_is_no_overlap_but_half_a_window_is():
    windows = tokens(2, 512)
    text = tokens(1, 2048, seed=1)
    text[0, 100:244] = windows[0, :144]
    assert overlap(text, fingerprints(windows)) == 0
    text[0, 100:400] = windows[0, :300]
    assert overlap(text, fingerprints(windows)) == 1


def test_the_same_windows_overlap_all_and_others_not_at_all():
    windows = tokens(30, 64)
    assert overlap(windows, fingerprints(windows)) == 30
    assert overlap(tokens(500, 2048, seed=1), fingerprints(tokens(300, 512))) == 0


def test_shortest_windows_have_one_fingerprint_and_shorter_ones_none():
    assert [len(window) for window in fingerprints(tokens(2, 32))] == [1, 1]
    assert fingerprints(tokens(2, 31)) == [[], []]
    assert overlap(tokens(2, 31), [[], []]) == 0
    assert overlap(tokens(2, 8), fingerprints(tokens(2, 32, seed=1))) == 0
    assert overlap(tokens(2, 64), []) == 0
