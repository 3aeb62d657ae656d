"""The compiler, shared by the tests of this folder."""

from __future__ import annotations

import os
import shutil

import pytest
from toolchain import Toolchain, kernel_sources


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """The compiler that CXX names, or the system's; skips without one, and fails where CI is set."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        message = "no C++ compiler: install one, or name it in CXX"
        # Continuous integration must not pass for want of a compiler.
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    sources, flags = kernel_sources()
    return Toolchain(compiler, sources, flags)
