"""Whatever is put in is computed rightly or refused, and nothing crashes.

The families of `hostile.py`, each in a process of its own.

Under the address sanitizer (GCC, Linux; some minutes, fused models included):

    DSB_CACHE=/tmp/dsb-asan DSB_CXXFLAGS="-march=native -g -fsanitize=address" \\
    ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \\
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \\
    python tests/hostile.py fused 300
"""
import os, subprocess, sys, threading
import pytest, torch, torch.multiprocessing as mp
from torch import nn
import dsb
from hostile import FAMILIES

HOW_MANY = dict(inputs=200, parameters=100, structures=200, builds=150, fused=80, settings=22, transforms=60)

@pytest.mark.parametrize('family', FAMILIES)
def test_family(family, root):
    command = [sys.executable,'-X','faulthandler',root/'tests'/'hostile.py',family,str(HOW_MANY[family])]
    r = subprocess.run(command, capture_output=True, text=True, errors='replace', timeout=600,
                       env={**os.environ, 'OMP_NUM_THREADS':'2'})
    tried = [o for o in r.stderr.splitlines() if o.startswith(f'{family} {{')]
    said = '\n'.join(o for o in r.stderr.splitlines() if not o.startswith(f'{family} {{'))[-4000:]
    last = (tried or ['none'])[-1]
    assert r.returncode==0, f'exit status {r.returncode} after {len(tried)} cases, the last one\n{last}\n{said}'

def test_many_threads():
    "Sixteen threads with more shapes than tables are kept for"
    torch.manual_seed(0)
    m = dsb.sparsify(nn.Sequential(nn.Conv2d(8,16,3,padding=1)), .5, 8)
    xs = [torch.randn(1+i%3, 8, 3+i//3, 5) for i in range(24)]
    with torch.no_grad(): want = [m(x) for x in xs]
    wrong,before = [],sys.getswitchinterval()
    def work(k):
        try:
            with torch.no_grad():
                for i in range(48):
                    j = (i*5+k)%24
                    if not torch.equal(m(xs[j]), want[j]): wrong.append(j)
        except Exception as e: wrong.append(repr(e))
    sys.setswitchinterval(1e-6)
    try:
        ts = [threading.Thread(target=work, args=(k,)) for k in range(16)]
        for t in ts: t.start()
        for t in ts: t.join()
    finally: sys.setswitchinterval(before)
    assert not wrong, wrong[:3]

def _compute(m, x, q): q.put(m(x).detach().tolist())

def test_memory_that_moves():
    "A used model whose tensors go to shared memory, and on to another process"
    torch.manual_seed(0)
    body = nn.Conv2d(8,16,3,padding=1),nn.BatchNorm2d(16),nn.ReLU(),nn.Flatten(),nn.Linear(16*16,16)
    m,x = dsb.fuse(dsb.sparsify(nn.Sequential(*body), .5, 8)).eval(),torch.randn(2,8,4,4)
    want = m(x).detach()
    assert torch.equal(m.share_memory()(x), want)
    m[0].cols.data = m[0].cols.clone()
    assert torch.equal(m(x), want)
    ctx = mp.get_context('spawn'); q = ctx.Queue()
    p = ctx.Process(target=_compute, args=(m,x,q)); p.start()
    got = torch.tensor(q.get(timeout=120)); p.join()
    assert torch.allclose(got, want, atol=1e-6) and torch.equal(m(x), want)

def test_checks_are_cheap():
    "What is asked at every call, where nothing has changed, does not grow into something that is felt"
    from timeit import repeat
    from dsb.kernels.reference import fits
    m = dsb.sparsify(nn.Sequential(nn.Linear(256,256)), .8, 16)[0]
    x = torch.randn(4,256); m(x)
    s = m.structure
    each = min(repeat(lambda: (m.structure, fits(x, m.values, m.bias, s)), number=2000, repeat=7))/2000
    call = min(repeat(lambda: m(x), number=500, repeat=7))/500
    assert each<.5*call, f'{1e6*each:.1f} of {1e6*call:.1f} µs'
