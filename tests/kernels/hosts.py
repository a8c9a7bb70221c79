"""Other CPUs than the one that the tests run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_bf16() -> Iterator[None]:
    """Code is compiled as on a CPU with AVX-512 and VNNI, but without AVX-512 BF16: every CPU with
    the latter runs it."""
    from llvmlite import binding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binding, "get_host_cpu_name", lambda: "cascadelake")
        patch.setattr(binding, "get_host_cpu_features", binding.FeatureMap)
        yield
