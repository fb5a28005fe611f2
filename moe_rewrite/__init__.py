"""moe_rewrite: Mixture-of-Experts loops, rewritten by ``torch.compile(model, backend="moe_rewrite")``.

The backend is found by its name; nothing has to be imported to use it. What can be imported:

* :func:`explain`: what is found in a model, and what becomes of it;
* :func:`export`: ``torch.export.export`` with the loops rewritten;
* :func:`set_experts_backend`, :func:`get_experts_backend`, :func:`experts_backend`: the experts mapping of a compiled
  model, at run time;
* :func:`register_experts_backend`, :func:`list_experts_backends`: experts backends of your own;
* :func:`rewrite`: the pass by itself.
"""

from moe_rewrite.errors import MarkerExecutedError, MoeRewriteError, OptionsError
from moe_rewrite.explain import Explanation, explain
from moe_rewrite.export import export
from moe_rewrite.lower import list_experts_backends, register_experts_backend
from moe_rewrite.rewrite import LoopRefused, rewrite
from moe_rewrite.runtime import experts_backend, get_experts_backend, set_experts_backend

__all__ = [
    "Explanation",
    "LoopRefused",
    "MarkerExecutedError",
    "MoeRewriteError",
    "OptionsError",
    "experts_backend",
    "explain",
    "export",
    "get_experts_backend",
    "list_experts_backends",
    "register_experts_backend",
    "rewrite",
    "set_experts_backend",
]
