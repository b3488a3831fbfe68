"Images stored innermost: normalisation by Triton's kernels and layers in a row, on a GPU or in the interpreter, against float64"
import copy
import pytest, torch, torch.nn as nn, torch.nn.functional as F
import dsb
from dsb.fuse import batch_norm
from dsb.kernels.reference import empty_batch_last, is_batch_last

pytest.importorskip('triton')
GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
LIMIT = {torch.float32:1e-4, torch.float16:2e-3, torch.bfloat16:16e-3}

def innermost(t): return empty_batch_last(t, t.shape).copy_(t)
def error(got, want): return ((got.double()-want).norm()/want.double().norm().clamp(min=1e-3)).item()

@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    "By Triton on any device; nothing is timed"
    monkeypatch.setenv('DSB_AUTOTUNE', '0')
    with dsb.backend('triton'): yield

CASES = [((40,20,9,9), torch.float32, True, True, True, True), ((7,3,5,1), torch.float32, True, False, True, True),
         ((3,5,2,3), torch.float32, False, True, False, False), ((16,6,4,4), torch.bfloat16, True, True, True, True),
         ((16,6,4,4), torch.float16, True, False, True, False)]
CASES += [((256,64,14,14), torch.bfloat16, True, True, True, True), ((130,2,57,57), torch.float32, True, False, True, True)]*GPU

@pytest.mark.parametrize('shape,dtype,affine,add,relu,training', CASES)
def test_batch_norm(shape, dtype, affine, add, relu, training):
    "Output, gradients and running statistics of a training step or of evaluation; the ReLU's mask is that of the output"
    g = torch.Generator().manual_seed(0)
    x,r,dy = (torch.randn(shape, generator=g).to(DEVICE, dtype) for _ in range(3))
    bn = nn.BatchNorm2d(shape[1], affine=affine).to(DEVICE).train(training)
    if affine:
        for p in bn.parameters(): p.data.copy_(torch.rand(len(p), generator=g)+.5)
    exact,leaves = copy.deepcopy(bn).double(),[innermost(x).requires_grad_(), r.requires_grad_()]
    y = batch_norm(leaves[0], bn, leaves[1] if add else None, relu)
    wide = [o.detach().double().requires_grad_() for o in leaves]
    z = exact(wide[0])+wide[1] if add else exact(wide[0])
    used = slice(None, 1+add)
    got = torch.autograd.grad(y, [*leaves[used],*bn.parameters()], innermost(dy))
    want = torch.autograd.grad(z, [*wide[used],*exact.parameters()], dy.double()*(y>0) if relu else dy.double())
    assert is_batch_last(y) and is_batch_last(got[0])
    for p,q in zip((y,*got,*bn.buffers()), (z.relu() if relu else z,*want,*exact.buffers())): assert error(p, q)<LIMIT[dtype]

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1,self.bn1,self.conv2,self.bn2 = (f(c) for f in (self.conv, nn.BatchNorm2d)*2)
    @staticmethod
    def conv(c): return nn.Conv2d(c, c, 3, padding=1, bias=False)
    def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))+x)

@pytest.mark.parametrize('c,size,n', [(16,4,16),(32,5,7)] if GPU else [(16,4,6)])
def test_row_of_layers(c, size, n):
    "A step of a fused network whose images are innermost from its first layer on, against the dense network in float64"
    torch.manual_seed(0)
    model = dsb.sparsify(nn.Sequential(nn.Conv2d(3,c,3,padding=1), nn.BatchNorm2d(c), nn.ReLU(), Block(c)), .5, 16).to(DEVICE)
    exact,x = dsb.densify(copy.deepcopy(model)).double(),torch.randn(n,3,size,size,device=DEVICE)
    fused = dsb.fuse(model, innermost=True)
    y,z = fused(x),exact(x.double())
    assert is_batch_last(y) and error(y, z)<1e-3
    (y*torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)).sum().backward()
    (z*torch.linspace(-1, 1, z.numel(), device=DEVICE, dtype=torch.double).view_as(z)).sum().backward()
    dense = dict(exact.named_parameters())
    for k,p in fused.named_parameters():
        if not k.endswith('.values'): assert error(p.grad, dense[k].grad)<2e-2, k
    stats = dict(exact.named_buffers())
    for k,b in fused.named_buffers():
        if 'running' in k: assert error(b, stats[k])<1e-4, k
