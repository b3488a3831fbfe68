"Fused networks compute what plain ones do, and survive what is done to networks"
import copy, io, os, subprocess, sys
import pytest, torch, torch.nn.functional as F
import dsb
from dsb.training.models import create_model

def network(name, sparse, seed=0):
    torch.manual_seed(seed)
    stem = dict(stem='pool') if name.startswith('ResNet') else {}
    model = create_model(name, **stem).to(memory_format=torch.channels_last)
    return dsb.sparsify(model, .7, 16, generator=torch.Generator().manual_seed(seed)) if sparse else model

def batch(n=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n,3,32,32, generator=g).contiguous(memory_format=torch.channels_last)
    return x,torch.randint(10, (n,), generator=g)

def grads(model):
    x,y = batch()
    model.zero_grad()
    p = model(x)
    F.cross_entropy(p, y).backward()
    return {n:q.grad.clone() for n,q in model.named_parameters()},p.detach()

def far(a, b): return ((a-b).norm()/b.norm().clamp(min=1e-9)).item()

@pytest.mark.parametrize('sparse', [False,True])
@pytest.mark.parametrize('name', ['wrn-10-2','vgg-d','ResNet18','ResNet50'])
def test_same_function(name, sparse):
    "Outputs, gradients, running statistics and evaluation, against the plain network in float64"
    plain,fused = network(name, sparse),dsb.fuse(network(name, sparse))
    assert list(plain.state_dict())==list(fused.state_dict())
    exact = copy.deepcopy(plain).double()
    x,y = batch()
    F.cross_entropy(exact(x.double()), y).backward()
    want = {n:q.grad for n,q in exact.named_parameters()}
    (p,_),(f,_) = grads(plain),grads(fused)
    for n,w in want.items():                         # rounding may turn a ReLU over
        if w.norm()>1e-6: assert far(f[n].double(), w)<max(5e-2, 4*far(p[n].double(), w)), n
    for (n,a),b,e in zip(fused.named_buffers(), plain.buffers(), exact.buffers()):
        assert far(a.double(), e.double())<max(1e-4, 4*far(b.double(), e.double())), n
    assert far(fused.eval()(x), plain.eval()(x))<1e-3

def test_copies():
    "A deep copy is fused and independent; pickled and saved models are plain"
    model = dsb.fuse(network('wrn-10-2', True))
    twin = copy.deepcopy(model)
    assert type(twin.group1[0]).forward is type(model.group1[0]).forward
    assert type(twin.group1[0]).__name__=='PreActBlock'
    with torch.no_grad(): twin.group3[0].conv2.values.zero_()
    assert model.group3[0].conv2.values.abs().sum()>0
    f = io.BytesIO()
    torch.save(model, f); f.seek(0)
    loaded = torch.load(f, weights_only=False)
    assert type(loaded.group1[0]).__module__=='dsb.training.models' and '_unfused' not in dir(loaded.group1[0])
    x,_ = batch()
    assert far(loaded.eval()(x), model.eval()(x))<1e-4
    assert far(dsb.densify(model)(x), model(x))<1e-4
    assert far(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), model(x))<1e-6
    assert type(dsb.unfuse(model).group1[0]) is type(loaded.group1[0])

def test_training_with_updates():
    "A few steps with topology updates stay close to those of the plain network"
    res = []
    for fuse in (False,True):
        model = network('wrn-10-2', True)
        if fuse: dsb.fuse(model)
        opt = torch.optim.SGD(model.parameters(), lr=.02, momentum=.9)
        upd = dsb.Updater(model, opt, method='dsb', T=2, T_end=100, generator=torch.Generator().manual_seed(0))
        x,y = batch(16)
        for _ in range(4):
            loss = F.cross_entropy(model(x), y)
            loss.backward(); opt.step(); opt.zero_grad(); upd.step()
        res.append((loss.item(), upd))
    assert abs(res[0][0]-res[1][0])<.05*abs(res[0][0])

def test_compiles():
    model = dsb.fuse(network('wrn-10-2', True))
    x,_ = batch()
    with torch.no_grad(): assert far(torch.compile(model.eval(), fullgraph=True, backend='aot_eager')(x), model(x))<1e-4

def test_without_compiler(tmp_path):
    "One warning, and torch's own operations"
    code = '''
import warnings, torch, dsb
from dsb.training.models import create_model
with warnings.catch_warnings(record=True) as w:
    warnings.simplefilter('always')
    model = dsb.fuse(dsb.sparsify(create_model('wrn-10-2'), .7, 16)).to(memory_format=torch.channels_last)
    model(torch.randn(2,3,32,32).contiguous(memory_format=torch.channels_last)).sum().backward()
print(sum('could not be built' in str(o.message) for o in w))
'''
    env = os.environ|dict(PATH=str(tmp_path), CXX='', DSB_CACHE=str(tmp_path/'cache'))
    r = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert r.returncode==0 and r.stdout.strip()=='1', r.stderr
