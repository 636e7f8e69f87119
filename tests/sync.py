"""Who reads values from the device? On a GPU each read waits until all work in flight is done.

Two ways to find out on a CPU. `reads` marks the batch, the networks and all that is computed from them, and lists the places where
a marked value is read. `check_meta` runs the call on the meta device, where nothing has a value, so that any read fails by itself,
also of tensors that were made on the device without looking at the batch."""
import copy, traceback
from unittest.mock import patch
import torch
from torch import nn, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from advmix.core import trusted

aten  = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.allclose, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.bincount}
MASKS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}   # with a boolean index they look for its nonzeros
COPIES = {Tensor.tolist: 'tolist', Tensor.cpu: 'cpu', Tensor.numpy: 'numpy', Tensor.__array__: 'numpy'}   # which run no kernel on a CPU

def caller():
    "The nearest line of advmix, else the nearest outside torch and this file"
    stack = [f for f in traceback.extract_stack() if f.filename!=__file__ and '/torch/' not in f.filename]
    ours  = [f for f in stack if '/advmix/' in f.filename] or stack
    f = ours[-1]
    return f'{f.filename.rpartition("/")[2]}:{f.lineno} in {f.name}: {f.line}'

def tensors(*things):
    for t in tree_leaves(things):
        if isinstance(t, Tensor): yield t
        elif isinstance(t, nn.Module): yield from (*t.parameters(), *t.buffers())

class Watch(TorchDispatchMode):
    "Marks `things` (tensors, modules, or lists of them) and all that is computed from them; `seen` lists who read a marked value"
    def __init__(self, *things):
        super().__init__()
        self.seen,self.kept,self.marked = [],[],set()
        self.mark(*things)
    def mark(self, *things):
        for t in tensors(*things):
            self.kept.append(t)   # alive, so that no other tensor takes its memory
            self.marked.add(t.untyped_storage()._cdata)
    def is_marked(self, *things): return any(t.untyped_storage()._cdata in self.marked for t in tensors(*things))
    def note(self, what): self.seen.append(f'{what} at {caller()}')
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs,op = kwargs or {},func.overloadpacket
        if not self.is_marked(args, kwargs): return func(*args, **kwargs)
        if op in READS or func is aten.repeat_interleave.Tensor: self.note(op.__name__)
        if op in MASKS and self.is_marked([i for i in tensors(args[1]) if i.dtype in (torch.bool,torch.uint8)]): self.note('boolean index')
        out = func(*args, **kwargs)
        self.mark(out)
        if func._schema.is_mutable:
            for a,v in zip(func._schema.arguments, args):
                if a.alias_info is not None and a.alias_info.is_write: self.mark(v)
        return out

class _Methods(TorchFunctionMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch
    def __torch_function__(self, func, types, args=(), kwargs=None):
        to_cpu = func is Tensor.to and 'cpu' in [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, str)]
        if (func in COPIES or to_cpu) and self.watch.is_marked(args[0]): self.watch.note(COPIES.get(func, "to('cpu')"))
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], (list,tuple)) and self.watch.is_marked(args[0]):
            self.watch.note('torch.tensor')
        return func(*args, **(kwargs or {}))

def reads(call, *args, also=()):
    "Where `call(*args)` reads the value of an argument, a parameter (also of the modules `also`), or what is computed from them"
    watch = Watch(*args, also)
    with _Methods(watch), watch: call(*args)
    return watch.seen

def check_no_reads(call, *args, also=()):
    "The first call may check its batch, as a training loop lets it; the second, trusted, must not read anything"
    call(*args)
    with trusted(): seen = reads(call, *args, also=also)
    assert not seen, 'reads from the device:\n'+'\n'.join(seen)

def check_meta(call, *args):
    "`call` on the meta device, trusted and not for the first time; whatever reads a value raises there, and the error names the line"
    args = [copy.deepcopy(a) if isinstance(a, nn.Module) else a for a in args]
    call(*args)
    args = [a.to('meta') if isinstance(a, (Tensor, nn.Module)) else a for a in args]   # a module stays the same object
    with trusted(), patch('torch.is_autocast_enabled', lambda *a: False): return call(*args)   # which does not know this device
