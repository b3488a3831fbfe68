"""Triton kernels against float64: interpreted on CPU tensors, compiled where there is a GPU, and what the compiler makes of them"""
import re, subprocess, sys, tempfile
from pathlib import Path
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
import dsb
from dsb.bench.gpu import number_mode
from dsb.kernels.reference import ConvArgs

triton = pytest.importorskip('triton')
from dsb.kernels import triton as kernels
from test_cpu_kernels import structure

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
needs_gpu = pytest.mark.skipif(not GPU, reason='no GPU')
needs_none = pytest.mark.skipif(GPU, reason='compiles for GPUs that are not here: the time of this one is too dear')
LIMIT = {torch.float32:1e-6, torch.float16:1e-3, torch.bfloat16:8e-3}    # roundings of the type; sums are float32

def error(got, want): return ((got.double()-want).norm()/want.norm().clamp(min=1e-6)).item() if want.numel() else 0.

@st.composite
def layers(draw):
    "A convolution that torch accepts, small enough for the interpreter"
    B,groups = draw(st.sampled_from([8,16,16,32,64] if GPU else [8,16,32])),draw(st.sampled_from([1,1,2]))
    k = draw(st.sampled_from([(1,1),(3,3),(3,3),(2,3),(1,3)]))
    stride,dil = draw(st.tuples(st.integers(1,2),st.integers(1,3))),draw(st.tuples(st.integers(1,2),st.integers(1,2)))
    pad = draw(st.sampled_from([(0,0),(1,1),(2,0)]))
    Cg = draw(st.sampled_from([1,3,16,64] if GPU else [1,3,8]))
    while Cg*k[0]*k[1]<B: Cg *= 2
    Og = draw(st.sampled_from([B,B+3,2*B]))
    H,W = (max(draw(st.integers(1, 12 if GPU else 5)), (n-1)*d+1-2*p) for n,d,p in zip(k, dil, pad))
    N = draw(st.sampled_from([1,2,5,8,16,48,128] if GPU else [1,2,8,16]))
    return N,Cg*groups,Og*groups,H,W,B,ConvArgs(k, stride, pad, dil, groups)

def fixed(way):
    "Instead of `choose`: tile number `way` of every product, in what torch's switches ask for; -1 is the dense way"
    def choose(product, x, s, f, fmt, run):
        if way<0: return kernels.DENSE
        ways = kernels.candidates(product, x.dtype, True, s.block_size)[:-1] if x.is_cuda else kernels.tiles(product, 'ieee', s.block_size)
        return ways[way%len(ways)]
    return choose

@pytest.fixture(autouse=True)
def no_tuning(monkeypatch):
    "Nothing is timed here, and no choice is read from or left in anybody's cache: timing every new shape took far over ten minutes"
    monkeypatch.setenv('DSB_AUTOTUNE', '0')
    monkeypatch.setattr(triton.testing, 'do_bench', lambda *args, **how: pytest.fail('a kernel is timed'))

def products(N, C, O, H, W, B, a, dtype, cl, seed=0):
    "Results of the three products and what they should be"
    g = torch.Generator().manual_seed(seed)
    s = structure(O, C//a.groups*a.kernel_size[0]*a.kernel_size[1], B, a.groups, .4, g)
    x,v,b = torch.randn(N,C,H,W, generator=g),torch.randn(len(s.cols),B, generator=g),torch.randn(O, generator=g)
    absent = (s.rows.view(-1,B)<0)[s.col_group]
    v[absent] = 0
    x,v,b = (o.to(DEVICE, dtype) for o in (x,v,b))
    s,absent = s.to(DEVICE),absent.to(DEVICE)
    if cl: x = x.contiguous(memory_format=torch.channels_last)
    w = s.scatter(v).view(O,-1,*a.kernel_size)
    y = F.conv2d(x.double(), w.double(), b.double(), *a[1:])
    dy = torch.randn(y.shape, generator=g).to(DEVICE, dtype)
    dx,dw,_ = torch.ops.aten.convolution_backward(dy.double(), x.double(), w.double(), None, *a[1:4], False, [0,0], a.groups, [True,True,False])
    got = kernels.conv2d(x, v, b, s, a),*kernels.conv2d_backward(dy, x, v, s, a, True, True)
    assert got[0].dtype==got[1].dtype==got[2].dtype==dtype and not got[2][absent].any()
    assert got[1].is_contiguous(memory_format=torch.channels_last if cl else torch.contiguous_format)
    return got,(y,dx,s.gather(dw.reshape(s.shape))),(x,w,b,dy)

@settings(max_examples=60 if GPU else 15)
@given(layers(), st.sampled_from(list(LIMIT)), st.booleans(), st.integers(0,2**16), st.sampled_from([0,0,0,1,2,3,-1]))
def test_fuzz(layer, dtype, cl, seed, way):
    "Every tile is checked, not the one that is fastest; nothing is timed, so that this takes two minutes on a GPU and not twenty"
    a = layer[-1]
    assume(min(a.out_size(*layer[3:5]))>0)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, 'choose', fixed(way))
        got,want,_ = products(*layer, dtype, cl, seed)
    tf32 = GPU and dtype==torch.float32 and kernels.precisions(dtype, True)==('tf32',)
    for g,w in zip(got, want): assert error(g, w)<(1e-3 if tf32 else LIMIT[dtype])

SHARED = {80:163*1024, 90:227*1024}                # bytes that a program may have

@needs_none
@pytest.mark.parametrize('capability', [80,90])
@pytest.mark.parametrize('case,kind', list(enumerate([('fp32',16,'tf32'), ('fp32',64,'tf32x3'), ('bf16',16,'ieee'), ('fp16',8,'ieee'), ('bf16',64,'ieee')])))
def test_compiles(capability, case, kind):
    "For GPUs that are not here, tiles in turn: 16 bytes at a time, and registers and shared memory suffice"
    dtype,B,precision = kind
    for product in kernels.TILES:
        ways = kernels.tiles(product, precision, B)
        k = kernels.compiled_tile(product, ways[case%len(ways)], dtype, capability, B)
        ptx = k.asm['ptx']
        assert 'mma' in ptx and f'.target sm_{capability}' in ptx
        assert 'ld.global.v4' in ptx or 'cp.async.cg.shared.global' in ptx, product
        if product=='input_gradient': assert 'ld.global.v4' in ptx and 'st.global.v4' in ptx      # of y', of panels
        assert k.metadata.shared<=SHARED[capability]
        assert not spills(k), (product,ways[case%len(ways)])

def machine_code(kernel):
    "(address, instruction, operands) of each"
    tool = Path(triton.__file__).parent/'backends/nvidia/bin/cuobjdump'
    with tempfile.TemporaryDirectory() as d:
        (f:=Path(d)/'k.cubin').write_bytes(kernel.asm['cubin'])
        text = subprocess.run([tool,'-sass',f], capture_output=True, text=True, check=True).stdout
    return [(int(a,16),op,rest) for a,op,rest in re.findall(r'/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][\w.]+)([^;]*);', text)]

def shortest_loop(kernel):
    "The innermost loop that multiplies: its instructions, and how many for each product of 16×8×16 numbers"
    found,code = [],machine_code(kernel)
    for at,op,rest in code:
        back = op=='BRA' and re.search(r'0x([0-9a-f]+)', rest)
        if not back or int(back[1],16)>=at: continue
        loop = [o for a,o,_ in code if int(back[1],16)<=a<=at]
        work = sum(o.startswith('HMMA') or int((re.search(r'HGMMA\.64x(\d+)', o) or [0,0])[1])/8 for o in loop)
        if work: found.append((loop,len(loop)/work))
    return min(found, key=lambda o: len(o[0]))

def spills(kernel):
    "Numbers that are moved to memory and back"
    return sum(op.startswith(('STL','LDL')) for _,op,_ in machine_code(kernel))

@needs_none
@pytest.mark.parametrize('capability,dtype,precision,product,B,tile,most', [
    (90,'fp32','tf32x3','forward',16,0,4), (80,'bf16','ieee','weight_gradient',32,2,3),
    *((80,'fp32','tf32','weight_gradient',64,i,n) for i,n in ((0,6),(1,2),(3,3)))])
def test_spills_stay_outside(capability, dtype, precision, product, B, tile, most):
    "The five of the 256 kernels that put numbers aside: so many stores and loads in all, none of them in the loop"
    k = kernels.compiled_tile(product, kernels.tiles(product, precision, B)[tile], dtype, capability, B)
    assert spills(k)<=most and not any(o.startswith(('STL','LDL')) for o in shortest_loop(k)[0])

@needs_none
@pytest.mark.parametrize('product,capability,tile,most', [
    ('forward',90,1,18.8/3), ('forward',80,0,18/3), ('input_gradient',90,0,24.2/2), ('input_gradient',80,0,23.9/2)])
def test_loop_is_short(product, capability, tile, most):
    "Tables instead of address arithmetic, and no additions in the loop: 18.8 and 18.0, 24.2 and 23.9 instructions before, in bfloat16 for B=32"
    k = kernels.compiled_tile(product, kernels.tiles(product, 'ieee', 32)[tile], 'bf16', capability, 32)
    loop,per = shortest_loop(k)
    assert per<most
    if product=='forward': assert not any(o.startswith('LDG.') for o in loop), 'a factor passes through the registers'

@needs_none
@pytest.mark.parametrize('capability', [80,90])
def test_tf32_is_rounded(capability):
    "Not cut off by the matrix unit: what turns the layout rounds, for all factors"
    const = dict(LAST=False, BI=64, BJ=64)
    ptx = [kernels.compiled_for(kernels._pack, 'fp32', capability, ROUND=o, **const).asm['ptx'] for o in ('cvt','')]
    assert ['cvt.rna.tf32' in o for o in ptx]==[True,False]

def counted(f):
    "Operations of torch that a call makes, without those that only give memory or views"
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name not in ('new_empty','empty','view','_unsafe_view','t','transpose','permute','movedim','select','detach','alias','unsqueeze','slice','split','set_'): seen.append(name)
            return func(*args, **(kwargs or {}))
    with Count(): f()
    return seen

def test_second_launch_makes_no_tables():
    "Sorting, searching and dividing are for the first launch; what is in a CUDA graph is what a later launch does"
    from dsb.bench.layers import random_structure
    s = random_structure(32, 144, 16, .4, torch.Generator().manual_seed(0)).to(DEVICE)
    x,dy,v = torch.randn(16,16,5,5, device=DEVICE),torch.randn(16,32,5,5, device=DEVICE),torch.randn(len(s.cols),16, device=DEVICE)
    a = ConvArgs((3,3),(1,1),(1,1))
    def step():
        kernels.conv2d(x, v, None, s, a)
        kernels.conv2d_backward(dy, x, v, s, a, True, True)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, 'choose', fixed(0))
        first,second = counted(step),counted(step)
    assert 'sort' in first and 'searchsorted' in first
    assert set(second)<={'zeros','zero_','sum','copy_','_to_copy'}, second

def test_tables_follow_in_place():
    "A layer whose places are replaced or loaded has its tables where they were, before anybody asks for them"
    from dsb.structure.extract import extract_blocks
    def some(seed): return extract_blocks(torch.rand(32,144, generator=torch.Generator().manual_seed(seed)), 6, 16)
    torch.manual_seed(0)
    l,x = dsb.SparseConv2d.from_dense(nn.Conv2d(16,32,3, padding=1), some(0)).to(DEVICE),torch.randn(4,16,5,5, device=DEVICE, requires_grad=True)
    def tables(): return [t for o in l.structure.cache.values() if isinstance(o, kernels.Kept) for t in o.tensors]
    def check():
        held = tables()
        where = [t.data_ptr() for t in before]
        assert len(held)>5 and [t.data_ptr() for t in held]==where
        fresh = {k:o.make(l.structure) for k,o in l.structure.cache.items() if isinstance(o, kernels.Kept)}
        assert all(torch.equal(p, q) for p,q in zip(held, (t for o in fresh.values() for t in o)))
        with dsb.backend('triton'): got = l(x)
        with dsb.backend('reference'): assert error(got, l(x).double())<1e-3
    with pytest.MonkeyPatch.context() as m, dsb.backend('triton'):
        m.setattr(kernels, 'choose', fixed(0))
        l(x).sum().backward()
    before = tables()
    copies,state = [t.clone() for t in before],{k:v.clone() for k,v in l.state_dict().items()}
    l.set_structure(some(1).to(DEVICE), torch.randn(96,16, device=DEVICE))
    changed = [not torch.equal(p, q) for p,q in zip(before, copies)]
    assert any(changed), 'the tables were not rewritten at once'
    check()
    l.load_state_dict(state)
    assert all(torch.equal(p, q) for p,q in zip(before, copies))
    check()

class Search:
    "In place of Triton's launch, which looks for a kernel: counts; what it finds takes only what Triton would launch it with, and interprets it"
    count = 0
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature
        f = JITFunction(self.kernel.fn)
        bind = create_function_from_signature(f.signature, f.params, make_backend(GPUTarget('cuda', 90, 32)))
        def run(grid, args):
            known = sum(p.is_constexpr for p in f.params)
            self.kernel.interpreted[grid[:1]](*args[:-known], **dict(zip(f.arg_names[-known:], args[-known:])))
        def search(*args, num_warps, num_stages, **const):
            Search.count += 1
            kind,first = bind(*args, **const)[1],(*args,*(const[o] for o in f.arg_names[len(args):]))
            class Found:
                def __getitem__(self, grid):
                    def launch(*args):
                        assert len(grid)==3 and bind(*args)[1]==kind, 'a kernel that was compiled for other arguments'
                        run(grid, args)
                    return launch
            run(grid, first)
            return Found()
        return search

@pytest.fixture
def searched(monkeypatch):
    "Launches as on a GPU, with a stand-in for Triton"
    def as_on_a_gpu(self, grid, *args, num_warps=4, num_stages=3, **const): self.launch(0, grid, args, const, num_warps, num_stages)
    monkeypatch.setattr(kernels.Kernel, '__call__', as_on_a_gpu)
    monkeypatch.setattr(kernels.Kernel, 'compiled', property(Search))
    for o in vars(kernels).values():
        if isinstance(o, kernels.Kernel): monkeypatch.setattr(o, 'ready', {})
    monkeypatch.setattr(Search, 'count', 0)

@needs_none
def test_second_step_searches_no_kernel(searched, monkeypatch):
    "Every kernel of a step is launched without Triton's search from the second time on"
    monkeypatch.setattr(kernels, 'choose', fixed(0))
    layer,counts = (16,8,16,5,5,16,ConvArgs((3,3),(1,1),(1,1))),[]
    for seed in range(3):
        got,want,_ = products(*layer, torch.float32, False, seed)
        assert max(error(*o) for o in zip(got, want))<1e-6
        counts.append(Search.count)
    assert counts[0]>=6 and counts[2]==counts[0], counts

@needs_none
def test_another_kind_gets_its_own_kernel(searched, monkeypatch):
    "Batches of all kinds of sizes one after the other, and tensors that are not aligned: never a kernel compiled for something else"
    monkeypatch.setattr(kernels, 'choose', fixed(0))
    a,counts = ConvArgs((1,1)),[]
    for N in (1,16,17,2,32,1,16,17):
        got,want,_ = products(N, 16, 16, 1, 1, 16, a, torch.float32, False)
        assert max(error(*o) for o in zip(got, want))<1e-6, N
        counts.append(Search.count)
    assert counts[0]<counts[1]<counts[2] and counts[-1]==counts[4], counts
    s,x = dsb.extract_blocks(torch.eye(16), 1, 16),torch.arange(16*17.)
    for at in (0,1,4,7):
        assert torch.equal(kernels.linear(x[at:at+256].view(16,16), s.gather(torch.eye(16)), None, s), x[at:at+256].view(16,16))
    assert Search.count>counts[-1]

def rounding(product, x, s, f, fmt, run):
    "Instead of `choose`: the first tile, in TF32"
    return dict(kernels.TILES[product][0], precision='tf32')

def coarse(t): return kernels.batch_last(t.reshape(len(t),-1), tf32=True).T.reshape(t.shape)

@pytest.fixture
def tf32_layer(monkeypatch):
    "A layer that multiplies in TF32, an input, and a list of the roundings of its values"
    torch.manual_seed(0)
    l = dsb.SparseConv2d.from_dense(nn.Conv2d(8,16,3, padding=1, bias=False), structure(16, 72, 16, 1, .5, torch.Generator().manual_seed(0))).to(DEVICE)
    seen,batch_last = [],kernels.batch_last
    def counting(t, pad=(0,0), tf32=False):
        if tf32 and t.shape==l.values.T.shape: seen.append(t)
        return batch_last(t, pad, tf32)
    monkeypatch.setattr(kernels, 'choose', rounding)
    monkeypatch.setattr(kernels, 'batch_last', counting)
    with dsb.backend('triton'): yield l,torch.randn(4,8,5,5, device=DEVICE, requires_grad=True),seen

def exactly_rounded(l, x, seen, n, forward=None, change=None):
    "A step in which the values are rounded `n` times; all three products are those of rounded factors, the values those of the forward pass"
    seen.clear()
    w,dy = coarse(l.structure.scatter(l.values.detach()).clone()).view(16,8,3,3).double(),torch.randn(4,16,5,5, device=DEVICE)
    y = (l if forward is None else forward)(x)
    if change: change()
    dx,dv = torch.autograd.grad(y, (x,l.values), dy)
    assert len(seen)==n
    xc,dyc = coarse(x.detach()).double(),coarse(dy).double()
    want = F.conv2d(xc, w, None, 1, 1),*torch.ops.aten.convolution_backward(dyc, xc, w, None, (1,1), (1,1), (1,1), False, [0,0], 1, [True,True,False])[:2]
    for got,t in zip((y,dx,dv), (*want[:2], l.structure.gather(want[2].flatten(1)))): assert error(got.detach(), t)<1e-6

@needs_none                                        # the interpreter multiplies exactly: what is not rounded shows
def test_values_are_rounded_once_a_step(tf32_layer):
    "And never come from an earlier step, however they were changed since, counted by torch or not"
    from dsb.structure.extract import extract_blocks
    l,x,seen = tf32_layer
    opt,state = torch.optim.SGD(l.parameters(), lr=.1),{k:v.clone() for k,v in l.state_dict().items()}
    def optimizer():
        l.values.grad = torch.randn_like(l.values)
        opt.step()
    def other(): l.set_structure(extract_blocks(torch.rand(16,72), 2, 16), torch.randn(32,16, device=DEVICE))   # of fewer blocks
    def in_numpy(): l.values.detach().cpu().numpy()[:] *= 2
    def elsewhere(): l.values.data = torch.randn_like(l.values)
    def loaded(): l.set_structure(dsb.structure.blocks.ShuffledBlocks(state['rows'], state['group_ptr'], state['cols'], 16, (16,72)), state['values']); l.load_state_dict(state)
    for change in (lambda: None, optimizer, lambda: l.values.data.mul_(1.5), in_numpy, elsewhere, other, loaded):
        change()
        exactly_rounded(l, x, seen, 1)

@needs_none
def test_rounded_values_are_those_of_the_forward_pass(tf32_layer):
    "Called twice, again from a kept graph, recomputed, compiled, differentiated twice; changed before the backward pass"
    from torch.utils.checkpoint import checkpoint
    l,x,seen = tf32_layer
    exactly_rounded(l, x, seen, 1, change=lambda: l.values.data.mul_(3))              # as torch does not see it
    exactly_rounded(l, x, seen, 2, change=lambda: l(x))
    exactly_rounded(l, x, seen, 3, lambda x: checkpoint(l, x, use_reentrant=False))   # twice forward; its backward pass gets other tensors
    exactly_rounded(l, x, seen, 2, torch.compile(l, fullgraph=True, backend='aot_eager'))   # each pass on its own
    y = l(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])
    y = l(x)
    with torch.no_grad(): l.values.mul_(2)                                            # as torch does see it
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.sum().backward()
    seen.clear()
    with torch.no_grad(): l(x)
    assert len(seen)==1
    v = l.values.detach().clone().requires_grad_()
    def slope(f): return torch.autograd.grad(torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0].square().sum(), v)[0]
    w = l.structure
    got,want = slope(lambda x: torch.func.functional_call(l, {'values':v}, x)),slope(lambda x: F.conv2d(x, w.scatter(v).view(16,8,3,3), None, 1, 1))
    assert error(got, want.double())<2e-3

def test_rounded_values_are_not_kept(tf32_layer):
    "After the backward pass their memory is free, even while the loss is still there"
    import gc, weakref
    l,x,seen = tf32_layer
    with pytest.MonkeyPatch.context() as m:
        made,pack = [],kernels.carry
        m.setattr(kernels, 'carry', lambda of, t: made.append(weakref.ref(t)) or pack(of, t))
        loss = l(x).sum()
        assert made[0]() is not None
        loss.backward()
    gc.collect()
    assert len(made)==1 and made[0]() is None and loss.grad_fn is not None

def test_odd_strides_compile():
    "What a compiled layer is promised about the layout of its results is what it gets"
    m = dsb.SparseConv2d.from_dense(nn.Conv2d(8,16,3, padding=1), structure(16, 72, 16, 1, .5, torch.Generator().manual_seed(0))).to(DEVICE)
    x = torch.randn(8,4,6,6, device=DEVICE).transpose(0,1).requires_grad_()
    def f(x): return m(x).relu()
    with dsb.backend('triton'):
        y,want = torch.compile(f, fullgraph=True)(x),f(x)
        g,g2 = (torch.autograd.grad(o.square().sum(), x)[0] for o in (y,want))
    assert error(y, want.double())<1e-3 and error(g, g2.double())<1e-3
    assert y.stride()==want.stride() and g.stride()==g2.stride()

def model():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(4,16,3, padding=1), nn.ReLU(), nn.Conv2d(16,24,3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24*4,16))
    return dsb.sparsify(m, .5, 8, 'uniform', dense=()).to(DEVICE)

def step(m, opt, upd, x):
    loss = m(x).square().mean()
    loss.backward(); opt.step(); opt.zero_grad(); upd.step()
    return loss.item()

def test_trains_like_the_reference():
    "Weights after training steps with updates of the structure"
    x,found = torch.randn(8,4,6,6, device=DEVICE),[]
    for name in ('reference','triton'):
        with dsb.backend(name):
            m = model()
            opt = torch.optim.SGD(m.parameters(), lr=.1, momentum=.9)
            upd = dsb.Updater(m, opt, T=2, T_end=100, alpha=.5, rule='columns')
            losses = [step(m, opt, upd, x) for _ in range(5)]
        found.append((m[2].mask(),torch.tensor(losses),m[2].dense_weight().detach()))
    (mask,losses,w),(mask2,losses2,w2) = found
    assert not torch.equal(mask, model()[2].mask()), 'no update changed anything'
    assert torch.equal(mask, mask2) and torch.allclose(losses, losses2, rtol=1e-3) and torch.allclose(w, w2, atol=1e-4)

def test_operators_compile_and_autocast():
    m,x = model(),torch.randn(4,4,6,6, device=DEVICE)
    with dsb.backend('triton'):
        want = m(x)
        got = torch.compile(m, fullgraph=True, backend='aot_eager')(x)
        assert torch.allclose(got, want, atol=1e-5)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = m(x)
            assert y.dtype==torch.bfloat16 and error(y, want.double())<2e-2
            y.float().sum().backward()
        assert m[0].values.grad.dtype==torch.float32
        l,s = m[2],m[2].structure
        args = torch.randn(2,16,6,6, device=DEVICE, requires_grad=True),l.values,None,s.rows,s.group_ptr,s.cols,l.checksum,8,*l.shape,*map(list, l.args[:4]),1,0,'triton'
        assert set(torch.library.opcheck(torch.ops.dsb.conv2d.default, args, atol=1e-3, rtol=1e-3).values())=={'SUCCESS'}
        l,s = m[5],m[5].structure
        args = torch.randn(3,96, device=DEVICE, requires_grad=True),l.values,l.bias,s.rows,s.group_ptr,s.cols,l.checksum,8,*l.shape,0,'triton'
        assert set(torch.library.opcheck(torch.ops.dsb.linear.default, args, atol=1e-3, rtol=1e-3).values())=={'SUCCESS'}

def test_without_triton():
    "The library works, and says what is missing when asked for these kernels"
    code = "import sys; sys.modules['triton'] = None\nimport torch, dsb\nfrom dsb.kernels import triton\nprint(triton.supports(torch.ones(1), None))\ndsb.backend('triton')"
    r = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True)
    assert r.stdout=='Triton is not installed\n' and r.stderr.splitlines()[-1]=='ValueError: Triton is not installed; pip install triton, or use dsb.backend("reference")'

LARGE = 64,256,256,14,14,32,ConvArgs((3,3),(1,1),(1,1))

@needs_gpu
@pytest.mark.parametrize('dtype', list(LIMIT))
def test_as_exact_as_dense(dtype):
    "Error against float64 at most twice that of torch's dense kernels of the same type"
    got,want,(x,w,b,dy) = products(*LARGE, dtype, False)
    a = LARGE[-1]
    dx,dw,_ = torch.ops.aten.convolution_backward(dy, x, w, None, *a[1:4], False, [0,0], a.groups, [True,True,False])
    for g,t,d in zip(got[:2], want[:2], (F.conv2d(x, w, b, *a[1:]), dx)): assert error(g, t)<=2*error(d, t)

@needs_gpu
@pytest.mark.parametrize('kind', ['float32','tf32'])
def test_graph_follows_the_structure(kind):
    "A captured step sees a structure that is replaced in place, and values, rounded or not; nothing waits for the device"
    from dsb.structure.extract import extract_blocks
    torch.manual_seed(0)
    l,x = dsb.SparseConv2d.from_dense(nn.Conv2d(16,32,3, padding=1), extract_blocks(torch.rand(32,144), 6, 16)).to(DEVICE),torch.randn(32,16,8,8, device=DEVICE, requires_grad=True)
    def f():
        y = l(x)
        return y,*torch.autograd.grad(y.square().sum(), (x,l.values))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), number_mode(kind):
        for _ in range(3): f()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        with number_mode(kind): f()
    finally: torch.cuda.set_sync_debug_mode('default')
    graph = torch.cuda.CUDAGraph()
    with number_mode(kind), torch.cuda.graph(graph): out = f()
    s = extract_blocks(torch.rand(32,144), 6, 16).to(DEVICE)
    l.set_structure(s, torch.randn(len(s.cols),16, device=DEVICE))
    graph.replay()
    with dsb.backend('reference'): want = f()
    for g,w in zip(out, want): assert error(g, w.double())<1e-3
