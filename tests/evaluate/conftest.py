"""Shared text and windows of the evaluation tests."""

from __future__ import annotations

import random

import pytest
from stubs import Letters

from bitwright.calibration.text import Text
from bitwright.evaluate import token_windows


@pytest.fixture
def text():
    return Text("letters", "".join(random.Random(0).choices("abcdefghij", k=330)))


@pytest.fixture
def windows(text):
    return token_windows(Letters(), text, length=32)
