"""These tests are for transformers 4: with another version of it nothing here is collected."""

from __future__ import annotations

import importlib.metadata

if not importlib.metadata.version("transformers").startswith("4."):
    collect_ignore_glob = ["test_*.py"]
