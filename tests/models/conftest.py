"""Imports transformers once for the tests of this folder, with its imports' own warnings silenced."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # packages that transformers imports where they are installed may warn of their own deprecations
    warnings.simplefilter("ignore")
    import bitwright.models.discover  # noqa: F401
