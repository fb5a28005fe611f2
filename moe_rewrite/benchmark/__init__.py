"""The project's benchmark: ``python -m moe_rewrite.benchmark experts|model|compile|summary|plot``.

Not imported by the package itself. It needs transformers, and for plots matplotlib:
``pip install moe_rewrite[benchmark]``. docs/benchmark.md says what is measured and how.
"""
