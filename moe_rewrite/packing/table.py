"""One buffer for all experts' parameters of one name.

Each row has a storage object of its own (a slice of the table's, which keeps the table's memory alive). So a parameter
looks like any other: what saves, copies or compares storages sees one expert's bytes and not those of all.
"""

from __future__ import annotations

import contextlib
import gc
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily  # seen to work in 2.11, 2.13 and 2.15
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes  # seen to work in 2.11, 2.13 and 2.15

from moe_rewrite.errors import MoeRewriteError
from moe_rewrite.packing.alike import NotAlike, is_unreal


class Table:
    """All experts' parameters (or buffers) of one name.

    Args:
        name: their path from an expert.
        members: one tensor for each expert, alike and contiguous.
        packed: make the members views of the table's rows. Otherwise it has no values, to trace with.
    """

    def __init__(self, name: str, members: Sequence[Tensor], packed: bool) -> None:
        self.name = name
        self.members = tuple(members)
        self.packed = packed
        self.released = False
        first = self.members[0]
        self._looks = first.shape, first.dtype
        self._unreal = is_unreal(first)
        with ordinary_tensors(self._unreal):
            self._tensor = first.detach().new_empty((len(self.members), *first.shape))
            self.nbytes = self._tensor.numel() * self._tensor.element_size()
            if packed:
                self._move()
            self._leaves = {wants_grad: self._tensor.data.requires_grad_(wants_grad) for wants_grad in self._kinds()}
        self._pointers = [member.data_ptr() for member in self.members] if packed else None

    def _kinds(self) -> tuple[bool, ...]:
        differentiable = self._tensor.is_floating_point() or self._tensor.is_complex()
        return (False, True) if differentiable else (False,)

    def _move(self) -> None:
        rows = [_row(self._tensor, index) for index in range(len(self.members))]
        for row, member in zip(rows, self.members, strict=True):
            row.copy_(member)
        if self._tensor.device.type != "cpu":
            # The old memory belongs to the stream it was made on, which may be another than that of the copies.
            torch.accelerator.synchronize(self._tensor.device)
        for row, member in zip(rows, self.members, strict=True):
            _become(member, row)

    def holds(self) -> bool:
        """The members are still the rows of the table."""
        if self.released:
            return False
        return self._pointers is None or list(map(Tensor.data_ptr, self.members)) == self._pointers

    def fits(self) -> bool:
        """The members, which are alike, are still the rows of the table and look like them."""
        return self.holds() and (self.members[0].shape, self.members[0].dtype) == self._looks

    def leaf(self, requires_grad: bool) -> Tensor:
        """``[E, ...]``: the same object each time, with memory behind it unless the table was given up."""
        if not (self.packed or self._unreal or self.released):
            storage = self._tensor.untyped_storage()
            if storage.nbytes() < self.nbytes:
                storage.resize_(self.nbytes)
        return self._leaves[requires_grad]

    def read(self, requires_grad: bool) -> Tensor:
        """What a compiled call gets for the leaf: the values of now, with gradients to the members."""
        if self.released:
            raise MoeRewriteError(f"the table of {self.name} was released: its experts are no longer what was packed")
        if not self.packed:
            return torch.stack(self.members)
        if not (requires_grad and torch.is_grad_enabled()):
            return self._leaves[requires_grad]
        result: Tensor = _Read.apply(self, *self.members)
        return result

    def release(self) -> None:
        """Let go of the memory until the next :meth:`leaf`. A packed table is left as it is: its rows are in use."""
        if not self.packed and not self._unreal and not self.released:
            self._tensor.untyped_storage().resize_(0)

    def give_up(self) -> None:
        """Let go of the memory, for good. The members stay as they are."""
        self.release()
        self.released = True
        self.members = ()
        let_go_of(() if self._unreal else (self._tensor, *self._leaves.values()))


class _Read(torch.autograd.Function):
    """A table as a function of the parameters that are its rows: nothing is copied in either direction."""

    @staticmethod
    def forward(ctx: Any, table: Table, *members: Tensor) -> Tensor:
        ctx.name, ctx.members = table.name, members
        ctx.versions = [member._version for member in members]
        result: Tensor = table.leaf(False).data
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The table has a version counter of its own: autograd does not see that an optimiser wrote into a member.
        for number, (member, version) in enumerate(zip(ctx.members, ctx.versions, strict=True)):
            if member._version != version:
                raise MoeRewriteError(
                    f"experts[{number}].{ctx.name} was modified by an inplace operation between a forward and its "
                    f"backward: it is at version {member._version}, expected version {version}"
                )
        # Rows become `.grad` as they are. Those of an expanded gradient would share their memory.
        return None, *grad.contiguous().unbind(0)


def check_memory(tensors: dict[str, Tensor]) -> None:
    """Refuse to move tensors whose memory somebody else sees.

    Args:
        tensors: what shall be moved, by the place to name in a message.

    Raises:
        NotAlike: a tensor shares its memory with another one, or with another process.
    """
    places: dict[int, str] = {}
    suspects: dict[int, str] = {}
    for place, tensor in tensors.items():
        if not tensor.numel():
            continue
        if tensor.device.type == "cpu" and tensor.is_shared():
            raise NotAlike(f"{place} is in memory that is shared between processes")
        if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotAlike("experts cannot be packed while a CUDA graph is captured")
        storage = _storage(tensor)
        if places.setdefault(storage, place) != place:
            raise NotAlike(f"{place} shares its memory with {places[storage]}")
        # One use is the tensor's, one that of the Python object just made. Seen to work in 2.11, 2.13 and 2.15.
        if torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2:
            suspects[storage] = place
    if suspects and _shared_with_others(suspects, tensors.values()):
        gc.collect()  # that may have been garbage
        culprit = _shared_with_others(suspects, tensors.values())
        if culprit is not None:
            raise NotAlike(f"{culprit} shares its memory with another tensor (one of a state_dict() that is kept, say)")


def _shared_with_others(suspects: dict[int, str], tensors: Iterable[Tensor]) -> str | None:
    """The place of a suspect whose storage is that of some other tensor that Python knows.

    What only a graph of autograd holds on to does no harm: those are the values of its forward. Nor does what a buffer
    is a view of, where nothing else has it.
    """
    ours, bases = {id(tensor) for tensor in tensors}, {id(tensor._base) for tensor in tensors}
    others = [obj for obj in gc.get_objects() if issubclass(type(obj), Tensor) and id(obj) not in ours]
    for other in others:
        place = suspects.get(_storage(other))
        if place is not None and (_is_held(other, others) or not (other.grad_fn or id(other) in bases)):
            return place
    return None


def _is_held(tensor: Tensor, besides: list[Tensor]) -> bool:
    return any(held is not besides and not isinstance(held, types.FrameType) for held in gc.get_referrers(tensor))


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage; 0 where it has none."""
    try:
        with torch._C.DisableTorchFunctionSubclass():  # seen to work in 2.11, 2.13 and 2.15
            return int(tensor.untyped_storage()._cdata)
    except Exception:  # of all tensors that there are: sparse ones, lazy ones, subclasses with opinions
        return 0


def _row(table: Tensor, index: int) -> Tensor:
    """Row ``index``, with a storage object of its own."""
    nbytes = table.stride(0) * table.element_size() if table.numel() else 0
    storage = table.untyped_storage()[index * nbytes : (index + 1) * nbytes]
    row = torch.empty(0, dtype=table.dtype, device=table.device)
    return row.set_(storage, 0, table.shape[1:], table.stride()[1:])


def _become(member: Tensor, row: Tensor) -> None:
    """Make a tensor, the same object, a view of a row."""
    if member._base is not None:  # from_pretrained makes such buffers. What it is a view of would be kept.
        vars(row).update(vars(member))
        with contextlib.suppress(RuntimeError):  # weak references to it
            torch.utils.swap_tensors(member, row)
            return
    member.data = row


def let_go_of(tensors: Iterable[Tensor]) -> None:
    """Let go of the memory of tensors that are no longer used.

    An expert may be collected at any time, also while this thread traces something: no mode may see what is done here.
    """
    with _disable_current_modes(), ordinary_tensors():
        for tensor in tensors:
            tensor.data = tensor.detach().new_empty(0)


@contextlib.contextmanager
def ordinary_tensors(unreal: bool = False) -> Iterator[None]:
    """Make tensors that live on, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        if not unreal:
            stack.enter_context(unset_fake_temporarily())
        yield
