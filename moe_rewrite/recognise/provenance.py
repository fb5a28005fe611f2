"""Where in the user's model a node of the graph comes from."""

from __future__ import annotations

import re

from torch import fx

LOCATION = "moe_rewrite_location"
"""Where a node's ``meta`` says which line it is for, if something else than its stack trace does."""

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_ATTRIBUTES = re.compile(
    r"\._modules\['(?P<name>[^']*)'\]|\._modules\.(?P<plain>\w+)|\[(?:'|\")?(?P<key>[^\]'\"]+)(?:'|\")?\]"
)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that ``node`` was traced in, relative to the compiled one; ``""`` for that."""
    stack = node.meta.get("nn_module_stack") or {}
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def clean_path(source: str) -> str:
    """``L['self']._modules['model'].layers[0].mlp -> model.layers.0.mlp``."""
    root = re.match(r"^(L\[['\"]\w+['\"]\]|G\[['\"]\w+['\"]\]|L__\w+?__)", source)
    rest = source[root.end() :] if root else source
    dotted = _ATTRIBUTES.sub(lambda m: "." + next(group for group in m.groups() if group is not None), rest)
    return dotted.replace("._orig_mod", "").replace("._export_root", "").strip(".")


def user_location(node: fx.Node) -> str:
    """``file:line`` of the innermost line of the user's code that ``node`` was traced from."""
    if LOCATION in node.meta:
        return str(node.meta[LOCATION])
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else "unknown location"
