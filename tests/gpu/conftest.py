"""These tests are collected only where torch sees a CUDA GPU; elsewhere the summary has a line about them."""

from tests.conftest import has_cuda

collect_ignore_glob = [] if has_cuda() else ["test_*.py"]
