"""Triton kernels against float64: interpreted on CPU tensors, compiled where there is a GPU, and what the compiler makes of them"""
import importlib.util, os, subprocess, sys
import pytest, torch, torch.nn as nn, torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
import dsb
from dsb.kernels import reference
from dsb.kernels.reference import ConvArgs

triton = pytest.importorskip('triton')
from dsb.kernels import triton as kernels
from test_cpu_kernels import structure

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
needs_gpu = pytest.mark.skipif(not GPU, reason='no GPU')
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

@settings(max_examples=200 if GPU else 15)
@given(layers(), st.sampled_from(list(LIMIT)), st.booleans(), st.integers(0,2**16))
def test_fuzz(layer, dtype, cl, seed):
    a = layer[-1]
    assume(min(a.out_size(*layer[3:5]))>0)
    got,want,_ = products(*layer, dtype, cl, seed)
    tf32 = GPU and dtype==torch.float32 and kernels.precisions(dtype, True)==('tf32',)
    for g,w in zip(got, want): assert error(g, w)<(1e-3 if tf32 else LIMIT[dtype])

@pytest.mark.parametrize('capability', [80,90])
@pytest.mark.parametrize('dtype,B,precision', [('fp32',16,'tf32'), ('fp32',32,'ieee'), ('fp32',16,'tf32x3'), ('bf16',64,'ieee'), ('fp16',8,'ieee')])
def test_compiles(capability, dtype, B, precision):
    "For GPUs that are not here: the first tiles compile, and fetch 16 bytes at a time"
    const = dict(KH=3, KW=3, B=B, M=max(16,B), VEC=16, PREC=precision)
    for kernel,product,more in ((kernels._forward,'forward',dict(BIAS=True, RELU=False)), (kernels._input_gradient,'input_gradient',{}), (kernels._weight_gradient,'weight_gradient',{})):
        tile = {k:v for k,v in kernels.TILES[product][0].items() if k!='parts'}
        ptx = kernels.compiled_for(kernel, dtype, capability, **const, **more, **tile).asm['ptx']
        assert 'cp.async.cg.shared.global' in ptx or 'ld.global.v4' in ptx
        assert f'.target sm_{capability}' in ptx
        assert ('mma' in ptx)==(precision!='ieee' or dtype!='fp32')

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
def test_graph_follows_the_structure():
    "A captured step sees a structure that is replaced in place, and nothing waits for the device"
    from dsb.structure.extract import extract_blocks
    torch.manual_seed(0)
    l,x = dsb.SparseConv2d.from_dense(nn.Conv2d(16,32,3, padding=1), extract_blocks(torch.rand(32,144), 6, 16)).to(DEVICE),torch.randn(32,16,8,8, device=DEVICE, requires_grad=True)
    def f():
        y = l(x)
        return y,*torch.autograd.grad(y.square().sum(), (x,l.values))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3): f()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: f()
    finally: torch.cuda.set_sync_debug_mode('default')
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = f()
    s = extract_blocks(torch.rand(32,144), 6, 16).to(DEVICE)
    l.set_structure(s, torch.randn(len(s.cols),16, device=DEVICE))
    graph.replay()
    with dsb.backend('reference'): want = f()
    for g,w in zip(out, want): assert error(g, w.double())<1e-3
