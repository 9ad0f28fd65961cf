"""
A GPU for machines without one: tensors that say they are on cuda:0 and are computed on the CPU.

As on a real GPU, an operation on tensors of both devices is an error, and so is one that waits for a number while a
CUDA graph is captured. A replayed graph repeats the captured operations on the same memory, whatever Python would do by
then. All this as far as the train scripts need it; a real GPU's kernels, memory and speed are not imitated.

    python tests/virtual_gpu.py train_cc.py --device cuda --model FOLDER ...
"""
import collections
import contextlib
import runpy
import sys
from pathlib import Path

import peft
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
META, CUDA = torch.device("meta"), torch.device("cuda:0")
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_"}
counts = collections.Counter()  # operations, waits, replays
capture = None  # the CUDAGraph that is being captured


class GPUTensor(torch.Tensor):
    """Holds .inner, a CPU tensor. To C++ its device is meta, which needs no driver; to Python it is cuda:0."""
    device, is_cuda = property(lambda self: CUDA), True

    @staticmethod
    def __new__(cls, inner):
        with torch.inference_mode(False):  # or views of the base's weights could not be written to while sampling
            self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                       device=META)
        self.inner = inner.detach()
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return operate(operation, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return GPUTensor, (self.inner.clone(),)

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("can't convert a tensor on cuda:0 to numpy")


def wait(what):
    counts["waits"] += 1
    if capture:
        raise RuntimeError(f"{what} is not permitted while a CUDA graph is captured")


def operate(operation, args, kwargs):
    """One ATen operation: on the CPU if no tensor is on the GPU, else on the tensors within."""
    name, tensors = operation._schema.name[6:], [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, GPUTensor)]
    device = kwargs.get("device")
    on_gpu = device == META or bool(ours) and device is None
    if name in ("copy_", "_to_copy"):
        source = args[name == "copy_"]
        on_gpu = isinstance(args[0], GPUTensor) if name == "copy_" else on_gpu
        if isinstance(source, GPUTensor) != on_gpu and (source.dim() or isinstance(source, GPUTensor)):
            wait(name)
    elif ours:
        others = [x for x in tensors if x.dim() and not isinstance(x, GPUTensor)]
        if name in INDEXING and isinstance(args[0], GPUTensor) and any(x is y for x in others for y in args[1]):
            wait("an index on the CPU")  # allowed, but has to be copied
            others = [x for x in others if not any(x is y for y in args[1])]
        if others:
            raise RuntimeError(f"{name}: tensors on cuda:0 and cpu, the latter of shape {tuple(others[0].shape)}")
        if name in WAITS or name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
            wait(name)
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, GPUTensor) else x, (args, kwargs))
    if device == META:
        kwargs = kwargs | {"device": "cpu"}
    if name == "_to_copy":  # from the CPU to the virtual GPU it would be none
        kwargs = {key: kwargs[key] for key in ("dtype", "memory_format") if key in kwargs}
    counts["operations"] += on_gpu
    if capture and on_gpu:
        capture.save(operation, args)
    results = operation(*args, **kwargs)
    if capture and on_gpu:
        capture.operations.append((operation, args, kwargs, results))

    def wrap(x):
        same = [y for y in tensors if (y.inner if isinstance(y, GPUTensor) else y) is x]  # an operation in place
        return same[0] if same else GPUTensor(x) if on_gpu and isinstance(x, torch.Tensor) else x
    return tree_map(wrap, results)


class CUDAGraph:
    def __init__(self):
        self.operations, self.before = [], {}  # before: storage -> (its tensor, a copy)

    def save(self, operation, args):
        """Capturing does not execute: what is changed in place gets its old values back afterwards."""
        for argument, value in zip(operation._schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write:
                storage = value.untyped_storage()
                whole = torch.as_strided(value, (storage.nbytes() // value.element_size(),), (1,), 0)
                self.before.setdefault(storage.data_ptr(), (whole, whole.clone()))

    def replay(self):
        counts["replays"] += 1
        for operation, args, kwargs, results in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def graph(cuda_graph):
    global capture
    capture = cuda_graph
    try:
        yield
    finally:
        capture = None
        for whole, copy in cuda_graph.before.values():
            whole.copy_(copy)


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with self:  # .to(device) and the like, which are made of other operations
            result = operation.decompose(*args, **kwargs or {})
        return operate(operation, args, kwargs or {}) if result is NotImplemented else result


class Devices(TorchFunctionMode):
    """Sends what is asked of cuda to meta."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_gpu = [str(x).startswith("cuda") for x in (kwargs.get("device"), *args) if isinstance(x, (str, torch.device))]
        if function is torch.tensor and any(on_gpu):
            wait("torch.tensor")
            return GPUTensor(function(*args, **kwargs | {"device": "cpu"}))
        if function is torch.Tensor.__getitem__ and isinstance(args[0], GPUTensor) and isinstance(args[1], list):
            wait("an index on the CPU")
            args = args[0], GPUTensor(torch.tensor(args[1]))
        if any(on_gpu):
            args = [META if isinstance(x, (str, torch.device)) else x for x in args]
            kwargs |= {"device": META} if "device" in kwargs else {}
        return function(*args, **kwargs)


def turn_on():
    modes = Devices(), Dispatch()

    def replace(owner, name, function):
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: function(original, *args, **kwargs))

    replace(torch, "load", lambda original, path, map_location, **kwargs: tree_map(
        lambda x: GPUTensor(x) if type(x) is torch.Tensor else x, original(path, **kwargs)))
    replace(peft.peft_model, "get_peft_model_state_dict", lambda original, *args, **kwargs: {
        key: x.inner.clone() for key, x in original(*args, **kwargs).items()})
    for name, value in {"is_available": True, "device_count": 1, "set_device": None, "max_memory_allocated": 2 ** 30}.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph
    for mode in modes:
        mode.__enter__()


if __name__ == "__main__":
    sys.path[:0] = str(ROOT), str(ROOT / "tests")
    sys.argv = sys.argv[1:]
    import virtual_gpu  # not as __main__, or its tensors could not be pickled
    virtual_gpu.turn_on()
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    print(f"on a virtual GPU: {dict(virtual_gpu.counts)}")
