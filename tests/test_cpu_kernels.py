"""Native CPU kernels against float64, in float32 and in bfloat16, and the ways in which they are built.

The same cases under the address sanitizer (GCC, Linux; a few minutes):

    DSB_CACHE=/tmp/dsb-asan DSB_CXXFLAGS="-march=native -g -fsanitize=address" ASAN_OPTIONS=detect_leaks=0 \
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" python -m pytest -p no:cacheprovider tests/test_cpu_kernels.py -k "fuzz or linear or norm"
"""
import contextlib, gc, os, re, subprocess, sys, warnings
import pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from unittest import mock
from dsb.kernels import build, cpu, norm, packing, vectors
from dsb.kernels.reference import ConvArgs
from dsb.structure.blocks import ShuffledBlocks

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    no_library = cpu.native()[1]
pytestmark = pytest.mark.skipif(bool(no_library) and 'compiler on PATH' in no_library, reason=no_library or 'never')
CL = torch.channels_last

def structure(O, K, B, groups, density, g, empty=False):
    "Random rows, random columns; short groups where a convolution group's rows are no multiple of B"
    rows = []
    for i in range(groups):
        r = (torch.randperm(O//groups, generator=g)+i*(O//groups)).tolist()
        rows += r+[-1]*(-len(r)%B)
    top = K//B
    n = [max(0 if empty else 1, min(top, round(2*density*top*torch.rand((), generator=g).item()))) for _ in range(len(rows)//B)]
    cols = [torch.randperm(K, generator=g)[:o*B] for o in n]
    ptr = torch.tensor([0,*n]).cumsum(0)*B
    return ShuffledBlocks(torch.tensor(rows).int(), ptr.int(), torch.cat(cols).int(), B, (O,K), check=False)

def error(got, want): return ((got-want).abs().max()/want.abs().max().clamp(min=1e-3)).item() if want.numel() else 0.

LOW = torch.bfloat16
# a sum of float32 products; what rounding such a sum to bfloat16 may add, half a unit in the last of 8 bits
ALLOWED = {torch.float32:1e-5, LOW:1e-5+2**-8}
HALVES = [None,None,'mixed','all']   # which tensors are bfloat16: none, all but the parameters, all

def lower(half, *activations): return [o if half is None or o is None else o.to(LOW) for o in activations]

def parameter(half, t): return t.to(LOW) if half=='all' and t is not None else t

def lanes_are(rows):
    "Rows are lanes in every forward pass; in those where they should be faster"
    return mock.patch.object(packing, 'takes_rows', lambda *o: True) if rows else contextlib.nullcontext()

def off(got, want):
    "Error in units of what the type of a result allows"
    return error(got, want)/ALLOWED[got.dtype]

def check(N, C, O, H, W, B, a, density, seed, cl=False, dy_cl=False, bias=False, empty=False, need=(True,True), half=None, rows=False):
    "Largest error of the products that are wanted, 1 is allowed"
    g = torch.Generator().manual_seed(seed)
    s = structure(O, C//a.groups*a.kernel_size[0]*a.kernel_size[1], B, a.groups, density, g, empty)
    x,v,b = torch.randn(N,C,H,W, generator=g), torch.randn(len(s.cols),B, generator=g), torch.randn(O, generator=g) if bias else None
    absent = (s.rows.view(-1,B)<0)[torch.repeat_interleave(torch.arange(len(s.group_ptr)-1), s.group_ptr.diff().long())]
    v[absent] = 0
    (x,),v,b = lower(half, x),parameter(half, v),parameter(half, b)
    if cl: x = x.contiguous(memory_format=CL)
    w = s.scatter(v.to(x.dtype).float()).view(O,-1,*a.kernel_size).double()
    want = F.conv2d(x.double(), w, b if b is None else b.double(), *a[1:])
    dy, = lower(half, torch.randn(want.shape, generator=g))
    if dy_cl: dy = dy.contiguous(memory_format=CL)
    dx,dw,_ = torch.ops.aten.convolution_backward(dy.double(), x.double(), w, None, *a[1:4], False, [0,0], a.groups, [True,True,False])
    with lanes_are(rows): y = cpu.conv2d(x, v, b, s, a)
    kept = CL if not x.is_contiguous() else torch.contiguous_format
    assert y.shape==want.shape and y.dtype==x.dtype and y.is_contiguous(memory_format=kept)
    gx,gv = cpu.conv2d_backward(dy, x, v, s, a, *need)
    assert (gx is not None, gv is not None)==need
    errs = [off(y, want)]
    if need[0]: assert gx.dtype==x.dtype and gx.is_contiguous(memory_format=kept); errs.append(off(gx, dx))
    if need[1]: assert gv.dtype==v.dtype and not gv[absent].any(); errs.append(off(gv, s.gather(dw.reshape(s.shape))))
    return max(errs)

small = st.integers(1,3)
@st.composite
def layers(draw):
    "A convolution that torch accepts"
    B,groups = draw(st.sampled_from([8,16,32,64])),draw(st.sampled_from([1,1,1,2,3]))
    k = draw(st.tuples(st.sampled_from([1,1,2,3,3,5]), st.sampled_from([1,1,2,3,3,4])))
    plain = draw(st.booleans())
    stride,dil = ((1,1),(1,1)) if plain else (draw(st.tuples(small,small)),draw(st.tuples(st.integers(1,2),small)))
    pad = draw(st.sampled_from([(0,0),(k[0]//2,k[1]//2),(2,1),(0,3)]))
    Cg = draw(st.sampled_from([1,3,8,16,20,32]))
    while Cg*k[0]*k[1]<B: Cg *= 2
    Og = max(B, draw(st.sampled_from([8,16,24,33,48,64])))
    H,W = (max(draw(st.sampled_from(o)), (n-1)*d+1-2*p) for o,n,d,p in zip(([1,2,3,4,5,7,8,9,13,16], [1,2,3,4,6,7,8,9,16,17,32]), k, dil, pad))
    return dict(N=draw(st.sampled_from([1,2,3,4,5,8,13,17])), C=Cg*groups, O=Og*groups, H=H, W=W, B=B, a=ConvArgs(k,stride,pad,dil,groups),
                density=draw(st.sampled_from([.05,.2,.5,1.])), seed=draw(st.integers(0,10**6)), cl=draw(st.booleans()), dy_cl=draw(st.booleans()),
                bias=draw(st.booleans()), empty=draw(st.booleans()), need=draw(st.sampled_from([(True,True),(True,True),(True,False),(False,True)])), half=draw(st.sampled_from(HALVES)), rows=draw(st.booleans()))

@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(layers())
def test_fuzz(layer):
    assume(layer['N']*layer['C']*layer['H']*layer['W']<2e5)
    assert check(**layer)<1

def check_norm_conv(N, C, O, H, W, B, a, density, seed, dy_cl=True, bias=False, need_values=True, half=None, rows=False):
    """Largest error of a convolution that normalises its input, 1 is allowed

    Ten times what a product may be off in float32, because scale·x+shift may cancel. In pairs the normalised input is rounded too, and so
    is its gradient before its sums are taken."""
    g = torch.Generator().manual_seed(seed)
    s = structure(O, C//a.groups*a.kernel_size[0]*a.kernel_size[1], B, a.groups, density, g)
    v = s.gather(s.scatter(torch.randn(len(s.cols),B, generator=g)))
    x, = lower(half, torch.randn(N,C,H,W, generator=g).contiguous(memory_format=CL))
    v = parameter(half, v)
    mean,var,scale,shift = stats = torch.randn(4,C, generator=g)
    z = (x.double()*scale.view(-1,1,1)+shift.view(-1,1,1)).relu()
    w,b = s.scatter(v.to(x.dtype).float()).view(O,-1,*a.kernel_size).double(),torch.randn(O, generator=g) if bias else None
    b = parameter(half, b)
    want = F.conv2d(z, w, b if b is None else b.double(), *a[1:])
    dy, = lower(half, torch.randn(want.shape, generator=g).contiguous(memory_format=CL if dy_cl else torch.contiguous_format))
    dz,dw,_ = torch.ops.aten.convolution_backward(dy.double(), z, w, None, *a[1:4], False, [0,0], a.groups, [True,True,False])
    delta = dz*(x.double()*scale.view(-1,1,1)+shift.view(-1,1,1)>0)
    got = cpu.norm_conv2d_backward(dy, x, stats, v, s, a, need_values)
    sums = torch.stack([delta.sum((0,2,3)), (delta*(x-mean.view(-1,1,1))).sum((0,2,3))])
    size = torch.stack([delta.abs().sum((0,2,3)), (delta*(x-mean.view(-1,1,1))).abs().sum((0,2,3))])   # a sum may come out near 0
    far = ((got[1]-sums).abs()/size.clamp(min=1e-3)).max().item() if delta.numel() else 0.
    s.cache.clear()
    with lanes_are(rows): y = cpu.norm_conv2d(x, stats, v, b, s, a)
    pairs = [(y, want), (got[0], delta)] + [(got[2], s.gather(dw.reshape(s.shape)))]*need_values
    rounded = 2**-8 if half and cpu.native('bf16')[0].dsb_pairs() else 0
    return max(far/(1e-4+rounded), *(error(*o)/(9e-5+ALLOWED[o[0].dtype]+rounded) for o in pairs))

@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(layers())
def test_norm_conv_fuzz(layer):
    l = layer
    C = -(-l['C']//(16*l['a'].groups))*16*l['a'].groups
    assume(l['N']*C*l['H']*l['W']<2e5)
    assert check_norm_conv(l['N'], C, l['O'], l['H'], l['W'], l['B'], l['a'], l['density'], l['seed'], l['dy_cl'], l['bias'], l['need'][1], l['half'], l['rows'])<1

def image(*shape, g): return torch.randn(*shape, generator=g).contiguous(memory_format=CL)

def check_norm(N, C, H, W, seed, res, relu, batch, offset=0., half=None):
    "Largest error of a normalisation and its gradients, 1 is allowed"
    g = torch.Generator().manual_seed(seed)
    x,r,dy = lower(half, image(N,C,H,W, g=g)+offset, image(N,C,H,W, g=g) if res else None, image(N,C,H,W, g=g))
    w,b,m,v = (torch.randn(C, generator=g) for _ in range(4))
    w,b,m,v = (parameter(half, o) for o in (w, b, m, v.abs()+.1))
    given = (None,None) if batch else (m,v)
    ts = [o.double().requires_grad_() for o in ((x,w,b,r) if res else (x,w,b))]
    z = F.batch_norm(ts[0], *(o if o is None else o.double() for o in given), ts[1], ts[2], batch, eps=1e-3)
    z = z+ts[3] if res else z
    z = z.relu() if relu else z
    want = torch.autograd.grad(z, ts, dy.double())
    stats = norm.statistics(x, w, b, *given, 1e-3)
    y = norm.norm(x, stats, r, relu)
    kept,dx,dr = y if res and relu else None,torch.empty_like(x),torch.empty_like(x) if res else None
    dw,db = norm.norm_finish(dy, x, kept, stats, norm.norm_sums(dy, x, kept, stats, relu), 1e-3, relu, batch, dx, dr)
    scale = max(1e-3, *(o.abs().max().item() for o in want))   # one scale for all: a gradient may come out near 0
    assert y.dtype==x.dtype and dw.dtype==torch.float32
    return max(error(y, z)/(9e-5+ALLOWED[y.dtype]),
               *((p-q).abs().max().item()/scale/(9e-5+ALLOWED[p.dtype]) for p,q in zip((dx,dw,db,dr), want)))

@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(1,9), st.integers(1,70), st.integers(1,12), st.integers(2,12), st.integers(0,999), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(HALVES))
def test_norm(N, C, H, W, seed, res, relu, batch, half): assert check_norm(N, C, H, W, seed, res, relu, batch, half=half)<1

def check_pool(N, C, H, W, k, s, p, seed, half=None):
    "Largest error of normalisation, ReLU and max pooling, 1 is allowed"
    g = torch.Generator().manual_seed(seed)
    (x,),w,b = lower(half, image(N,C,H,W, g=g)),torch.randn(C, generator=g)+.1,torch.randn(C, generator=g)
    w,b = parameter(half, w),parameter(half, b)
    stats = norm.statistics(x, w, b, None, None, 1e-3)
    y,place = norm.norm_pool(x, stats, k, s, p)
    ts = [o.double().requires_grad_() for o in (x,w,b)]
    want = F.max_pool2d(F.batch_norm(ts[0], None, None, ts[1], ts[2], True, eps=1e-3).relu(), k, s, p)
    dy, = lower(half, image(*want.shape, g=g))
    grads = torch.autograd.grad(want, ts, dy.double())
    dx,(dw,db) = norm.norm_pool_backward(dy, x, y, place, stats, k, s, p, 1e-3, True, True)
    scale = max(1e-3, *(o.abs().max().item() for o in grads))
    tolerance = 1e-2 if half else 1e-4              # sums are made of y, which has been rounded
    return max(error(y, want)/(9e-5+ALLOWED[y.dtype]), *((a-b).abs().max().item()/scale/tolerance for a,b in zip((dx,dw,db), grads)))

pairs = st.tuples(small,small)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(1,5), st.integers(1,40), st.integers(3,12), st.integers(3,12), pairs, pairs, st.tuples(*[st.booleans()]*2), st.integers(0,999), st.sampled_from(HALVES))
def test_norm_pool(N, C, H, W, k, s, padded, seed, half):
    assert check_pool(N, C, H, W, k, s, tuple(o//2 if f else 0 for o,f in zip(k, padded)), seed, half)<1

@pytest.mark.parametrize('threads', [1,2,3])
def test_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed,N in enumerate((1,2,9)):
            for half in (None,'mixed'): assert check(N, 24, 32, 9, 8, 16, ConvArgs((3,3),(1,1),(1,1)), .3, seed, cl=bool(seed%2), half=half, rows=seed<2)<1
    finally: torch.set_num_threads(before)

@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1,140), st.integers(8,130), st.integers(8,90), st.sampled_from([8,16,32,64]), st.integers(0,99), st.sampled_from(HALVES), st.booleans())
def test_linear(M, K, O, B, seed, half, rows):
    assume(K>=B and O>=B)
    g = torch.Generator().manual_seed(seed)
    s = structure(O, K, B, 1, .3, g)
    v,x,b,dy = s.gather(s.scatter(torch.randn(len(s.cols),B, generator=g))),torch.randn(M,K, generator=g),torch.randn(O, generator=g),torch.randn(M,O, generator=g)
    (x,dy),v,b = lower(half, x, dy),parameter(half, v),parameter(half, b)
    w = s.scatter(v.to(x.dtype).float()).double()
    with lanes_are(rows): assert off(cpu.linear(x, v, b, s), x.double()@w.T+b)<1
    dx,dv = cpu.linear_backward(dy, x, v, s, True, True)
    assert off(dx, dy.double()@w)<1 and off(dv, s.gather(dy.double().T@x.double()))<1
    assert (dx.dtype, dv.dtype)==(x.dtype, v.dtype)

@pytest.mark.parametrize('half', [None,'mixed'])
@pytest.mark.parametrize('cl', [False,True])
@pytest.mark.parametrize('H,C', [(16,64),(15,80)])
def test_large(cl, H, C, half):
    "Tensors beyond the size from which results bypass the caches"
    assert check(72, C, 64, H, H, 16, ConvArgs((3,3),(1,1),(1,1)), .1, 0, cl=cl, dy_cl=cl, bias=True, half=half)<1

@pytest.mark.parametrize('dtype', [torch.float32,LOW])
def test_empty_batch(dtype):
    g = torch.Generator().manual_seed(0)
    s = structure(16, 72, 8, 1, .3, g)
    v,a = torch.randn(len(s.cols),8),ConvArgs((3,3),(1,1),(1,1))
    x = torch.randn(0,8,4,4).to(dtype)
    assert cpu.conv2d(x, v, None, s, a).shape==(0,16,4,4)
    dx,dv = cpu.conv2d_backward(torch.randn(0,16,4,4).to(dtype), x, v, s, a, True, True)
    assert dx.shape==x.shape and not dv.any()

def test_changing_shapes():
    "Memory stays where it is over many calls"
    g = torch.Generator().manual_seed(0)
    s,a = structure(16, 72, 8, 1, .3, g),ConvArgs((3,3),(1,1),(1,1))
    v = torch.randn(len(s.cols),8)
    def rounds(n):
        for i in range(n):
            x = torch.randn(1+i%7,8,3+i%11,3+i%13).to(LOW if i%2 else torch.float32)
            y = cpu.conv2d(x, v, None, s, a)
            cpu.conv2d_backward(y, x, v, s, a, True, True)
        gc.collect()
        return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
    if not os.path.exists('/proc/self/statm'): pytest.skip('no /proc')
    before = rounds(1700)
    assert rounds(3400)-before<8 and len(s.cache['cpu'])<=8   # 10 200 calls in all

smoke = '''
import sys, warnings; sys.path[:0] = {path!r}
import torch; torch.set_num_threads(2)
import test_cpu_kernels as t
from dsb.kernels.reference import ConvArgs
from dsb.kernels import build, cpu
{body}
'''
def run(body, **env):
    "Run python code in another process, beside this file"
    here = os.path.dirname(os.path.abspath(__file__))
    code = smoke.format(path=[here, os.path.dirname(here)], body=body)
    return subprocess.Popen([sys.executable, '-c', code], env=os.environ|env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

cases = '''
for i,(B,k,st,cl) in enumerate([(8,3,1,0),(16,3,1,1),(16,3,2,1),(32,1,1,0),(64,3,1,1),(16,5,1,0)]):
    for half in (None,'mixed','all'):
        for N,H in ((5,8),(2,7),(17,4)):
            e = t.check(N, 32, 64, H, H, B, ConvArgs((k,k),(st,st),(k//2,k//2)), .3, i, cl=bool(cl), bias=True, half=half, rows=N==2)
            assert e<1, (B,k,st,cl,N,H,half,e)
        e = t.check_norm_conv(5, 32, 64, 9, 7, B, ConvArgs((k,k),(st,st),(k//2,k//2)), .3, i, half=half, rows=i%2)
        assert e<1, ('norm', B, k, st, half, e)
        for r in range(8): assert t.check_norm(3, 20+13*i, 5, 6, i, bool(r&1), bool(r&2), bool(r&4), half=half)<1
        assert t.check_pool(2, 20+13*i, 9, 8, (3,3), (2,2), (1,1), i, half)<1 and t.check_pool(2, 33, 8, 8, (2,2), (2,2), (0,0), i, half)<1
print('lanes', cpu.native()[0].dsb_lanes(), 'pairs', cpu.native('bf16')[0].dsb_pairs())
'''
x86 = pytest.mark.skipif(not any(o in build.platform.machine() for o in ('x86','AMD')), reason='x86 flags')
@x86
@pytest.mark.parametrize('pairs', [0,1])
@pytest.mark.parametrize('flags,lanes,feature', [('-march=x86-64',4,''), ('-mavx2 -mfma',8,'avx2'), ('-mavx512f',16,'avx512f')])
def test_flags(flags, lanes, feature, pairs, tmp_path):
    "Each width of vectors, bfloat16 widened and in pairs (which are emulated unless the flags have the instruction)"
    if feature not in build.cpu_features(): pytest.skip(f'no {feature} here')
    p = run(cases, DSB_CXXFLAGS=flags+' -DDSB_PAIRS'*pairs, DSB_CACHE=str(tmp_path))
    out,err = p.communicate()
    assert p.returncode==0 and f'lanes {lanes} pairs {pairs}' in out, err
    for name in ('cpu','norm','cpu-bf16','norm-bf16'): assert err.count(f'building the {name} kernels')==1

@x86
def test_pairs_compile(tmp_path):
    "What a processor with the instruction would get: it is there, in all three products"
    source = vectors.numbered('bf16', cpu.cpp.source('forward', 'backward'))
    cxx,flags,link = build.command()
    (tmp_path/'k.cpp').write_text(source)
    r = subprocess.run([*cxx, *flags, '-mavx512f', '-mavx512bf16', '-S', 'k.cpp', '-o', 'k.s'], cwd=tmp_path, capture_output=True, text=True)
    if 'unrecognized' in r.stderr: pytest.skip('a compiler without AVX512-BF16')
    assert r.returncode==0, r.stderr
    functions = re.split(r'\n(?=\w+:\n)', (tmp_path/'k.s').read_text())
    for name in ('forward_tile','input_rows','weight_tile'):
        assert [o for o in functions if name in o.split(':')[0] and 'vdpbf16ps' in o], name

@x86
def test_fuzz_in_pairs(tmp_path):
    "The fuzz tests above, where bfloat16 is computed in pairs"
    body = '''
assert cpu.native('bf16')[0].dsb_pairs()
t.HALVES[:] = ['mixed','all']
t.test_fuzz(); t.test_norm_conv_fuzz(); t.test_linear()
'''
    p = run(body, DSB_CXXFLAGS='-march=native -DDSB_PAIRS', DSB_CACHE=str(tmp_path))
    _,err = p.communicate()
    assert p.returncode==0, err[-3000:]

def test_builds_at_once(tmp_path):
    "Three processes start on an empty cache; a fourth finds the library"
    env = dict(DSB_CACHE=str(tmp_path/'new'/'folder'))
    ps = [run('assert not cpu.native()[1]; assert t.check(2,16,16,5,5,8,ConvArgs((3,3)),.5,0)<1', **env) for _ in range(3)]
    for p in ps: assert p.communicate() and p.returncode==0
    assert [o.suffix for o in (tmp_path/'new'/'folder').iterdir()]==['.so']
    p = run('cpu.check()', **env)
    assert p.communicate()==('','') and p.returncode==0

def test_no_compiler(tmp_path):
    body = '''
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    s = t.structure(16, 72, 8, 1, .3, torch.Generator())
    for _ in range(3): print(cpu.supports(torch.randn(2,8,4,4), s, ConvArgs((3,3))))
    try: cpu.check()
    except ValueError as e: print('check', e)
'''
    p = run(body, PATH=str(tmp_path), CXX='', DSB_CACHE=str(tmp_path/'cache'))
    out,err = p.communicate()
    lines = out.splitlines()
    assert p.returncode==0 and len(lines)==4 and 'no C++ compiler' in lines[0] and lines[0]==lines[2] and lines[3].startswith('check'), err
    assert err.count('building')==0

def test_failing_compiler(tmp_path):
    "One warning, with the compiler's first error"
    p = run('print(cpu.native()[1]); cpu.native()', DSB_CXXFLAGS='-march=nonsense', DSB_CACHE=str(tmp_path))
    out,err = p.communicate()
    assert p.returncode==0 and 'nonsense' in out and not list(tmp_path.glob('*.so'))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_fork():
    "A child of a process that has used threads computes, alone"
    body = '''
import os
s = t.structure(32, 288, 16, 1, .3, torch.Generator().manual_seed(0))
v,x,a = torch.ones(len(s.cols),16),torch.ones(9,32,8,8),ConvArgs((3,3),(1,1),(1,1))
def total():
    y = cpu.conv2d(x, v, None, s, a)
    dx,dv = cpu.conv2d_backward(y, x, v, s, a, True, True)
    s.cache.clear()
    return y[0,:,4,4].sum().item(), dx[0,:,4,4].sum().item(), dv[0,0].item()
want = total()
pid = os.fork()
if pid==0: os._exit(0 if total()==want else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==0
'''
    p = run(body)
    try: _,err = p.communicate(timeout=120)
    finally: p.kill()
    assert p.returncode==0, err
