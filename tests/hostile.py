"""Inputs, parameters and structures that do not fit: computed rightly or refused, in a process of its own.

    python tests/hostile.py inputs 300      # a family and how many cases; `test_hostile.py` runs them all

Each case is drawn by hypothesis and written to standard error before it is tried, so that after a crash the last line
tells which it was.
Right is what the ordinary dense layers say about the same thing, or the definition applied to the layer's own tensors.
"""
import copy, sys, warnings
from contextlib import contextmanager, nullcontext
import torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
import dsb

warnings.filterwarnings('ignore')
CL,Refusals = torch.channels_last,(RuntimeError,ValueError,TypeError,IndexError,NotImplementedError)

def note(*case): print(*case, file=sys.stderr, flush=True)

def attempt(f):
    "('value', result) or ('error', text)"
    try: return 'value',f()
    except Refusals as e: return 'error',f'{type(e).__name__}: {e}'

def close(a, b, what, tol=None):
    fits = a.shape==b.shape and a.dtype==b.dtype
    assert fits, f'{what}: {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}'
    tol = tol or {torch.bfloat16:3e-2, torch.float16:4e-3, torch.float64:1e-9}.get(a.dtype, 2e-4)
    a,b = (o.detach().resolve_neg().double() for o in (a, b))
    assert torch.equal(a.isnan(), b.isnan()), f'{what}: other NaNs'
    a,b = (o.nan_to_num() for o in (a, b))
    far = (a-b).abs().max().item()/max(1., b.abs().max().item()) if a.numel() else 0.
    assert far<=tol, f'{what}: off by {far:.2g}'

LAYERS = dict(
    linear=lambda: nn.Linear(48,40), plain=lambda: nn.Linear(32,32,bias=False),
    conv=lambda: nn.Conv2d(8,32,3,padding=1), valid=lambda: nn.Conv2d(16,24,3), one=lambda: nn.Conv2d(32,32,1),
    stride=lambda: nn.Conv2d(8,16,3,stride=2,padding=1), groups=lambda: nn.Conv2d(16,32,3,groups=2),
    dilated=lambda: nn.Conv2d(8,16,(3,2),dilation=(2,1),padding=(2,0)),
    reflect=lambda: nn.Conv2d(8,16,3,padding=1,padding_mode='reflect'),
    same=lambda: nn.Conv2d(8,16,(3,2),padding='same'))

def make(kind, B, seed=0):
    "(sparse layer, its dense twin)"
    torch.manual_seed(seed)
    m = dsb.sparsify(nn.Sequential(LAYERS[kind]()), distribution={'0':.5}, block_size=B)
    return m[0],dsb.densify(m)[0]

def like(layer, n=3, hw=(6,5)):
    "An input that fits"
    return torch.randn(n, layer.in_features) if isinstance(layer, nn.Linear) else torch.randn(n, layer.in_channels, *hw)

def reshaped(x, how):
    "The same number of dimensions or not, wider or narrower"
    w = 1 if x.dim()>1 else 0
    return {
        'fits':lambda: x, 'narrow':lambda: x.narrow(w, 0, x.shape[w]-1),
        'half':lambda: x.narrow(w, 0, x.shape[w]//2), 'wide':lambda: torch.cat([x,x.narrow(w,0,1)], w),
        'double':lambda: torch.cat([x,x], w), 'one':lambda: x.narrow(w, 0, 1), 'none':lambda: x.narrow(w, 0, 0),
        'empty':lambda: x[:0], 'row':lambda: x[0], 'scalar':lambda: x.reshape(-1)[0],
        'turned':lambda: x.transpose(0,1), 'deeper':lambda: x[None], 'deepest':lambda: x[None,None],
        'flat':lambda: x.reshape(-1), 'small':lambda: x[...,:2], 'tiny':lambda: x[...,:2,:1] if x.dim()>3 else x,
        'no pixels':lambda: x[...,:0,:0] if x.dim()>3 else x[:0]}[how]()

SHAPES = ['fits']*8 + 'narrow half wide double one none empty row scalar turned deeper deepest flat small tiny'.split()
SHAPES += ['no pixels']

VIEWS = dict(
    plain=lambda x: x, copied=lambda x: x.clone(),
    last=lambda x: x.contiguous(memory_format=CL) if x.dim()==4 else x,
    every_other=lambda x: torch.cat([x,x],-1)[...,::2] if x.dim() else x,
    turned=lambda x: x.transpose(0,-1).contiguous().transpose(0,-1) if x.dim() else x,
    expanded=lambda x: x[:1].expand(x.shape) if x.dim() and len(x) else x,
    inner=lambda x: x[...,:1].expand(x.shape) if x.dim() and x.shape[-1] else x,
    negative=lambda x: torch._neg_view(x), zero=lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    images=lambda x: x.movedim(0,-1).contiguous().movedim(-1,0) if x.dim()>1 else x,
    offset=lambda x: torch.cat([x.reshape(-1)[:1],x.reshape(-1)])[1:].view(x.shape) if x.numel() else x,
    sparse=lambda x: x.to_sparse() if x.dim() else x,
    mkldnn=lambda x: x.to_mkldnn() if x.dtype==torch.float32 and x.numel() else x, meta=lambda x: x.to('meta'),
    derived=lambda x: x.as_subclass(Derived), parameter=lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    inference=lambda x: torch.inference_mode()(lambda: x.clone())())

class Derived(torch.Tensor): pass

TYPES = 'float32 float64 bfloat16 float16 int64 int32 bool uint8 complex64'.split()

def settled(layer, dense, x, dy):
    "What a layer makes of an input and of an output gradient, gradients included"
    y = layer(x)
    if not (y.requires_grad and y.dtype.is_floating_point) or y.is_meta: return y,
    ts = [t for t in (x, layer.bias) if t is not None and t.requires_grad]
    w = layer.values if hasattr(layer, 'values') else layer.weight
    return y,*torch.autograd.grad(y, [*ts,w], dy(y))

GRADIENTS = dict(
    ones=torch.ones_like, random=lambda y: torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape),
    expanded=lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
    negative=lambda y: torch._neg_view(torch.ones_like(y)),
    zero=lambda y: torch._efficientzerotensor(y.shape, dtype=y.dtype),
    last=lambda y: torch.ones_like(y).contiguous(memory_format=CL) if y.dim()==4 else torch.ones_like(y),
    turned=lambda y: torch.arange(y.numel()).to(y.dtype).view(y.shape[::-1]).permute(*range(y.dim())[::-1]))

def compare(layer, dense, x, dy=torch.ones_like, tol=None):
    "'right', 'refused', or 'both' where the dense layer refuses too; AssertionError for anything else"
    (a,got),(b,want) = (attempt(lambda: settled(o, dense, x, dy)) for o in (layer, dense))
    if a=='error': return 'refused' if b=='value' else 'both'
    assert b=='value', f'dense says {want}, but sparse computes'
    for i,(p,q) in enumerate(zip(got, want)):
        if p.is_meta or q.is_meta:
            assert p.shape==q.shape and p.is_meta==q.is_meta
            continue
        if i==len(got)-1 and i: q = layer.structure.gather(q)
        what = 'output','first gradient','second gradient','last gradient'
        close(p.as_subclass(torch.Tensor), q.as_subclass(torch.Tensor), what[i], tol)
    return 'right'

@st.composite
def input_case(draw):
    return dict(
        kind=draw(st.sampled_from(list(LAYERS))), B=draw(st.sampled_from([8,8,16,4,0])),
        shape=draw(st.sampled_from(SHAPES)),
        view=draw(st.sampled_from(['plain']*4+list(VIEWS))), dtype=draw(st.sampled_from(['float32']*5+TYPES)),
        model=draw(st.sampled_from(['float32']*4+TYPES[:4])), grad=draw(st.booleans()),
        dy=draw(st.sampled_from(list(GRADIENTS))), backend=draw(st.sampled_from(['auto']*4+['reference'])),
        first=draw(st.booleans()), n=draw(st.sampled_from([1,3,5,17])), autocast=draw(st.sampled_from([False]*3+[True])),
        hw=draw(st.sampled_from([(6,5),(4,8),(1,1),(3,3)])))

def seen_as(x, c):
    "An input in the shape, type and view of a case"
    return VIEWS[c['view']](reshaped(x, c['shape']).to(getattr(torch, c['dtype'])))

def inputs(c):
    layer,dense = make(c['kind'], c['B'])
    model = getattr(torch, c['model'])
    layer,dense = layer.to(model),dense.to(model)
    good = like(layer).to(model)
    with torch.no_grad(): want = dense(good)
    with dsb.backend(c['backend']):
        if c['first']: layer(good)
        made,x = attempt(lambda: seen_as(like(layer, c['n'], c['hw']), c))
        if made=='error': return
        differentiable = (x.is_floating_point() or x.is_complex()) and not x.is_inference() and not x._is_zerotensor()
        if c['grad'] and differentiable: x = x.detach().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=c['autocast']):
            got = compare(layer, dense, x, GRADIENTS[c['dy']], 3e-2 if c['autocast'] else None)
        with torch.no_grad(): close(layer(good), want, 'a good call afterwards')
    usual = c['shape'] in ('fits','empty') and c['dtype']==c['model'] and c['hw']==(6,5)
    usual = usual and c['view'] not in ('sparse','mkldnn','meta')
    assert got!='refused' or not usual, 'refused, though it fits'

PARAMETERS = dict(
    empty=lambda p: p[:0], short=lambda p: p[:-1], turned=lambda p: p.T, turned_back=lambda p: p.T.contiguous().T,
    flat=lambda p: p.reshape(-1), doubled=lambda p: torch.cat([p,p]), deeper=lambda p: p[None],
    scalar=lambda p: p.reshape(-1)[0], every_other=lambda p: p.repeat_interleave(2,-1)[...,::2],
    expanded=lambda p: p[:1].expand(p.shape), double=lambda p: p.double(), half=lambda p: p.bfloat16(),
    whole=lambda p: p.long(), complex=lambda p: p.to(torch.cfloat), meta=lambda p: p.to('meta'),
    negative=lambda p: torch._neg_view(p), zero=lambda p: torch._efficientzerotensor(p.shape),
    long=lambda p: torch.cat([p,p])[:len(p)], same=lambda p: p.clone())

def by_definition(layer):
    "The dense weight from the layer's tensors, one entry after the other; None if their sizes make no sense"
    O,K = layer.shape
    w,v = torch.zeros(O,K, dtype=layer.values.dtype),layer.values.detach().resolve_neg()+0
    if not layer.block_size:
        if v.shape!=(len(layer.flat),1): return None
        return w.view(-1).index_put((layer.flat.long(),), v.view(-1)).view(layer.weight_shape)
    B = layer.block_size
    if v.shape!=(len(layer.cols),B): return None
    for g in range(len(layer.group_ptr)-1):
        for c in range(int(layer.group_ptr[g]), int(layer.group_ptr[g+1])):
            for r in range(B):
                if (row:=int(layer.rows[g*B+r]))>=0: w[row,int(layer.cols[c])] = v[c,r]
    return w.view(layer.weight_shape)

def parameters(c):
    layer,_ = make(c['kind'], c['B'])
    x = like(layer)
    if c['first']: layer(x)
    for name in c['which']:
        p = getattr(layer, name, None)
        if p is None: return
        new = attempt(lambda: PARAMETERS[c['how']](p.detach()))
        if new[0]=='error': return
        if c['data']: attempt(lambda: setattr(p, 'data', new[1]))
        else: layer._parameters[name] = nn.Parameter(new[1], requires_grad=new[1].is_floating_point())
    with dsb.backend(c['backend']): got,y = attempt(lambda: layer(x))
    if got=='error': return
    assert not y.is_meta and not any(p.is_meta for p in layer.parameters()), 'computed without numbers'
    w = by_definition(layer)
    assert w is not None, 'computed with values of another size'
    b = None if layer.bias is None else layer.bias.detach()
    want = attempt(lambda: F.linear(x, w, b) if isinstance(layer, nn.Linear) else layer._conv_forward(x, w, b))
    assert want[0]=='value', f'dense says {want[1]}'
    close(y, want[1], 'output')

WRITES = 'copy data data_copy numpy shared setattr load assign whole'.split()

def corrupt(t, how, g, K):
    "Another tensor in the place of an index tensor"
    new = t.clone()
    at = torch.randint(max(1, len(t)), (1+int(torch.randint(3, (), generator=g)),), generator=g)
    def put(v):
        if len(new): new[at] = v
        return new
    return {
        'one up':lambda: put(new[at]+1), 'one down':lambda: put(new[at]-1), 'huge':lambda: put(2**31-1),
        'negative':lambda: put(-2), 'zero':lambda: put(0),
        'random':lambda: put(torch.randint(K, (len(at),), generator=g).int()), 'all':lambda: torch.zeros_like(new),
        'shuffled':lambda: new[torch.randperm(len(new), generator=g)], 'turned':lambda: new.flip(0),
        'averaged':lambda: (.9*new+.1*new).int(), 'long':lambda: new.long()+2**32, 'float':lambda: new+.5,
        'exact':lambda: new.double(), 'short':lambda: new[:-1], 'longer':lambda: torch.cat([new,new[:1]]),
        'none':lambda: new[:0], 'square':lambda: new[None], 'same':lambda: new, 'min':lambda: put(-2**31),
        'step':lambda: new+torch.arange(len(new)).int()*2**24,
        'every_other':lambda: torch.stack([new,new],1)[:,0]}[how]()

HOWS = ('one up|one down|huge|negative|zero|random|all|shuffled|turned|averaged|long|float|exact|short|longer|none|'
        'square|same|min|step|every_other').split('|')

def write(layer, name, new, way):
    "Bring a tensor into a layer's buffer by one of the ways there are"
    old = getattr(layer, name)
    if way=='copy': old.copy_(new)
    elif way=='data': old.data = new
    elif way=='data_copy': old.data.copy_(new)
    elif way=='numpy': old.numpy()[...] = new.numpy()
    elif way=='shared': old.share_memory_(); old.numpy()[...] = new.numpy()
    elif way=='setattr': setattr(layer, name, new)
    elif way=='load': layer.load_state_dict({name:new}, strict=False)
    elif way=='assign': layer.load_state_dict({**layer.state_dict(), name:new}, strict=False, assign=True)
    else: layer.load_state_dict({**layer.state_dict(), name:new})

def structures(c):
    g = torch.Generator().manual_seed(c['seed'])
    layer,_ = make(c['kind'], c['B'])
    x,want = like(layer),None
    with torch.no_grad(): want = layer(x)
    if not c['first']: layer,_ = make(c['kind'], c['B'])
    if c['copied']: layer = copy.deepcopy(layer)
    before,names = {k:v.clone() for k,v in layer.state_dict().items()},[k for k in layer._buffers if k!='checksum']
    name = names[c['which']%len(names)]
    attempt(lambda: write(layer, name, corrupt(getattr(layer, name), c['how'], g, layer.shape[1]), c['way']))
    got,y = attempt(lambda: layer(x))
    now = {k:getattr(layer, k) for k in names}
    if got=='error':
        for ask in (layer.dense_weight, lambda: layer.structure):
            assert attempt(ask)[0]=='error', 'refused in one way only'
        if any(v.shape!=before[k].shape for k,v in now.items()): return
        layer.load_state_dict(before, assign=any(v.dtype!=before[k].dtype for k,v in now.items()))
        return close(layer(x), want, 'after loading what was there')
    same = all(v.shape==before[k].shape and bool((v==before[k]).all()) for k,v in now.items())
    assert same, 'another structure, and nothing is said'
    close(y, want, 'output')
    y.sum().backward()

def builds(c):
    "The constructors and `set_structure`"
    g = torch.Generator().manual_seed(c['seed'])
    layer,_ = make(c['kind'], c['B'])
    s,x = layer.structure,like(layer)
    state = dict(s.state())
    name = list(state)[c['which']%len(state)]
    state[name] = corrupt(state[name], c['how'], g, s.shape[1])
    cls,kw = type(s),dict(block_size=s.block_size) if s.block_size else {}
    if c['size']: kw['shape'] = {
        1:(s.shape[0]+1,s.shape[1]), 2:(s.shape[0],s.shape[1]-1), 3:s.shape[::-1], 4:(0,0),
        5:(s.shape[0],s.shape[1],1)}[c['size']]
    got,new = attempt(lambda: cls(**{'shape':s.shape, **state, **kw}, check=c['check']))
    if got=='error': return
    values = torch.randn(new.values_shape) if c['values'] else torch.randn(3)
    before = {k:v.clone() for k,v in layer.state_dict().items()}
    got,_ = attempt(lambda: layer.set_structure(new, values))
    if got=='error':
        for k,v in layer.state_dict().items(): assert torch.equal(v, before[k]), f'{k} was changed before the error'
    y = layer(x)
    w = by_definition(layer)
    want = F.linear(x, w, layer.bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, w, layer.bias)
    close(y, want, 'output')

@st.composite
def structure_case(draw):
    return dict(
        kind=draw(st.sampled_from(['linear','conv','groups','valid'])), B=draw(st.sampled_from([8,16,4,0])),
        which=draw(st.integers(0,2)), how=draw(st.sampled_from(HOWS)), way=draw(st.sampled_from(WRITES)),
        seed=draw(st.integers(0,9999)), first=draw(st.booleans()), copied=draw(st.booleans()),
        size=draw(st.sampled_from([0]*6+[1,2,3,4,5])), check=draw(st.booleans()),
        values=draw(st.sampled_from([True,True,True,False])))

@st.composite
def parameter_case(draw):
    return dict(
        kind=draw(st.sampled_from(list(LAYERS))), B=draw(st.sampled_from([8,16,4,0])),
        which=draw(st.sampled_from([('values',),('bias',),('values','bias')])),
        how=draw(st.sampled_from(list(PARAMETERS))), data=draw(st.booleans()), first=draw(st.booleans()),
        backend=draw(st.sampled_from(['auto']*3+['reference'])))

class Block(nn.Module):
    "All that `fuse` knows: BatchNorm into a convolution, with an addition, into a pooling, and alone"
    def __init__(self, c=16):
        super().__init__()
        self.conv1,self.conv2,self.conv3 = (nn.Conv2d(c,c,3,padding=1,bias=i>0) for i in range(3))
        self.bn1,self.bn2,self.bn3,self.bn4 = (nn.BatchNorm2d(c) for _ in range(4))
        for o in (self.bn1,self.bn2,self.bn3,self.bn4):
            nn.init.uniform_(o.bias, .2, .8)   # where all inputs are alike, off the kink of ReLU
        self.pool,self.relu = nn.MaxPool2d(2),nn.ReLU()
    def forward(self, x):
        y = self.conv2(self.relu(self.bn1(self.conv1(x))))
        y = F.relu(self.bn2(y)+x)
        y = self.pool(self.relu(self.bn3(self.conv3(y))))
        return self.bn4(y)

STATISTICS = dict(
    same=lambda p: p.clone(), short=lambda p: p[:-1], long=lambda p: torch.cat([p,p]),
    every_other=lambda p: p.repeat_interleave(2)[::2], expanded=lambda p: p[:1].expand(p.shape),
    double=lambda p: p.double(), half=lambda p: p.bfloat16(), meta=lambda p: p.to('meta'),
    negative=lambda p: torch._neg_view(-p), column=lambda p: p[:,None], empty=lambda p: p[:0],
    nothing=lambda p: None)

def fused(c):
    torch.manual_seed(0)
    plain = dsb.sparsify(Block(), .5, 8).to(memory_format=CL).to(getattr(torch, c['model']))
    plain.train(c['train'])
    for which,how in c['changes']:
        m = getattr(plain, which[0]); t = getattr(m, which[1])
        if t is None: continue
        new = STATISTICS[how](t.detach())
        if new is not None and new.shape!=t.shape: return    # torch itself reads beyond the end of these
        # and these it reads wrongly in its backward pass, or writes to one place
        if how in ('expanded','every_other') and which[1].startswith('running'): return
        if which[1] in ('weight','bias'): m._parameters[which[1]] = None if new is None else nn.Parameter(new)
        elif new is not None: m._buffers[which[1]] = new
    fast = dsb.fuse(copy.deepcopy(plain))
    made,x = attempt(lambda: seen_as(torch.randn(c['n'],16,*c['hw']).contiguous(memory_format=CL), c))
    if made=='error': return
    dy,res = GRADIENTS[c['dy']],[]
    for m in (fast, plain):
        def run():
            y = m(x)
            if y.is_meta: return y,
            grads = torch.autograd.grad(y, list(m.parameters()), dy(y), allow_unused=True) if y.requires_grad else ()
            return y,*(g for g in grads if g is not None),*(b.float() for b in m.buffers() if b.is_floating_point())
        with torch.autocast('cpu', torch.bfloat16, enabled=c['autocast']): res.append(attempt(run))
    (a,got),(b,want) = res
    if a=='error': return
    assert b=='value', f'unfused says {want}, but fused computes'
    assert [p.is_meta for p in got]==[q.is_meta for q in want]
    got,want = ([o.detach().as_subclass(torch.Tensor) for o in os if not o.is_meta] for os in (got, want))
    if not got: return
    scale = max([1e-3]+[q.double().nan_to_num().abs().max().item() for q in want[1:] if q.numel()])
    flat = c['view'] in ('zero','expanded','inner')      # nothing varies: noise is blown up
    rough = c['autocast'] or c['dtype']!='float32' or c['model']!='float32' or flat
    close(got[0], want[0], 'output', 5e-2 if rough else 2e-3)
    for p,q in zip(got[1:], want[1:]): close(p/scale, q/scale, 'a gradient or a statistic', .2 if rough else 5e-2)

@st.composite
def fused_case(draw):
    tensors = 'weight','bias','running_mean','running_var'
    places = st.tuples(st.sampled_from(['bn1','bn2','bn3','bn4']), st.sampled_from(tensors))
    return dict(
        train=draw(st.booleans()), n=draw(st.sampled_from([1,2,5])),
        hw=draw(st.sampled_from([(4,4),(6,5),(2,2),(1,3)])),
        shape=draw(st.sampled_from(['fits']*6+'narrow wide none empty row deeper tiny'.split())),
        view=draw(st.sampled_from(['plain']*4+list(VIEWS))),
        dtype=draw(st.sampled_from(['float32']*5+['float64','bfloat16','bfloat16','int64'])),
        model=draw(st.sampled_from(['float32']*3+['bfloat16'])),
        dy=draw(st.sampled_from(list(GRADIENTS))),
        changes=draw(st.lists(st.tuples(places, st.sampled_from(list(STATISTICS))), max_size=2)),
        autocast=draw(st.sampled_from([False]*4+[True])))

def everything(m, x):
    "What a user does with a model: forward, backward, updates, summary, copies, saving"
    upd = dsb.Updater(m, torch.optim.SGD(m.parameters(), lr=.05, momentum=.9), T=1, T_end=99, rule='columns', alpha=.5)
    for i in range(2):
        y = m(x); y.square().mean().backward(); upd.opt.step(); upd.opt.zero_grad(); upd.step()
    dsb.summary(m); repr(m)
    m2 = copy.deepcopy(m); m2.load_state_dict(m.state_dict())
    return m(x),m2(x),dsb.densify(m)(x),*(p.detach() for p in m.parameters())

def net():
    torch.manual_seed(0)
    return dsb.sparsify(nn.Sequential(Block(), nn.Flatten(), nn.Linear(64,32)), .7, 8).to(memory_format=CL)

def settings_of_torch(c):
    "Switches of torch that should make no difference, and places to be in"
    x = torch.randn(4,16,4,4, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=CL)
    want = everything(net(), x)
    m = dsb.fuse(net()) if c['fuse'] else net()
    if c['what']=='type': torch.set_default_dtype(getattr(torch, c['which']))
    if c['what']=='device': torch.set_default_device(c['which'])
    place = {
        'autocast off':lambda: torch.autocast('cpu', torch.bfloat16, enabled=False),
        'anomaly':lambda: torch.autograd.set_detect_anomaly(True),
        'saved':lambda: torch.autograd.graph.save_on_cpu(), 'profile':lambda: torch.profiler.profile(),
        'deterministic':lambda: deterministic(), 'grad':lambda: torch.enable_grad(),
        'threads':lambda: threads()}.get(c['which'], nullcontext)
    try:
        with place(): got = everything(m, x)
    finally: torch.set_default_dtype(torch.float32); torch.set_default_device(None)
    for p,q in zip(got, want): close(p, q, 'result', 2e-2 if c['fuse'] else 1e-3)

@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try: yield
    finally: torch.use_deterministic_algorithms(False)

@contextmanager
def threads():
    n = torch.get_num_threads(); torch.set_num_threads(3)
    try: yield
    finally: torch.set_num_threads(n)

PLACES = 'autocast off','anomaly','saved','profile','deterministic','grad','threads'

@st.composite
def settings_case(draw):
    types = [dict(what='type', which=o) for o in ('float64','bfloat16','float16')]
    places = [dict(what='place', which=o) for o in PLACES]
    return dict(fuse=draw(st.booleans()), **draw(st.sampled_from(types + [dict(what='device', which='meta')] + places)))

TRANSFORMS = ['call','grad','vjp','vmap','jvp','parameters','jacrev','second','hessian','inference','no grad','trace',
              'compile','fake','half']
ONLY_CALLS = 'inference','no grad','trace','compile','fake'          # these give what a call gives

def transformed(m, what, x, params, name):
    "What a layer gives under a transform; `name` is what its weight is called among its parameters"
    def by(p): return torch.func.functional_call(m, p, (x,))
    def loss(x): return m(x).square().sum()
    return {
        'call':lambda: by(params),
        'grad':lambda: torch.func.grad(loss)(x),
        'vjp':lambda: torch.func.vjp(m, x)[1](torch.ones_like(m(x)))[0],
        'vmap':lambda: torch.func.vmap(m)(x),
        'jvp':lambda: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
        'parameters':lambda: torch.func.grad(lambda p: by(p).square().sum())(params)[name],
        'jacrev':lambda: torch.func.jacrev(lambda x: m(x).sum())(x),
        'second':lambda: second_by_autograd(loss, x, getattr(m, name)),
        'hessian':lambda: second(m, params[name], name, x),
        'inference':lambda: torch.inference_mode()(m)(x),
        'no grad':lambda: torch.no_grad()(m)(x),
        'trace':lambda: torch.jit.trace(m, x, check_trace=False)(x),
        'compile':lambda: compiled(m, x),
        'fake':lambda: fake(m, x),
        'half':lambda: torch.autocast('cpu', torch.bfloat16)(m)(x)}[what]()

def transforms(c):
    "`torch.func`, forward derivatives, copies that share parameters: right or refused"
    (layer,dense),what = make(c['kind'], c['B']),c['what']
    x,weight = like(layer),{'weight':dense.weight.detach()}
    own = {n:p.detach() for n,p in layer.named_parameters()}
    got,y = attempt(lambda: transformed(layer, what, x, own, 'values'))
    if got=='error':
        assert what=='jvp' or layer.block_size==0, f'refused: {y}'
        return
    want = transformed(dense, 'call' if what in ONLY_CALLS else what, x, weight, 'weight')
    close(y, layer.structure.gather(want) if what in ('parameters','second','hessian') else want, what)

def second_by_autograd(loss, x, w):
    x = x.clone().requires_grad_()
    dx, = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), w)[0]

def second(m, w, name, x):
    "A derivative of a derivative, by `torch.func`"
    f = torch.func.grad(lambda w,x: torch.func.functional_call(m, {name:w}, (x,)).square().sum(), argnums=1)
    return torch.func.grad(lambda w: f(w, x).square().sum())(w)

def compiled(layer, x):
    torch._dynamo.reset()
    return torch.compile(layer, backend='aot_eager', fullgraph=True)(x)

def fake(layer, x):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True): y = layer(x)
    real = layer(x)
    assert y.shape==real.shape and y.stride()==real.stride()
    return real

@st.composite
def transform_case(draw):
    return dict(
        kind=draw(st.sampled_from(list(LAYERS))), B=draw(st.sampled_from([8,16,4,0])),
        what=draw(st.sampled_from(TRANSFORMS)))

FAMILIES = dict(
    settings=(settings_of_torch, settings_case()), transforms=(transforms, transform_case()),
    inputs=(inputs, input_case()), parameters=(parameters, parameter_case()),
    structures=(structures, structure_case()), builds=(builds, structure_case()), fused=(fused, fused_case()))

def main(family, n, seed=None):
    f,cases = FAMILIES[family]
    def one(case):
        note(family, case)
        f(case)
    rules = dict(deadline=None, database=None, derandomize=seed is None, report_multiple_bugs=True)
    run = settings(max_examples=int(n), suppress_health_check=list(HealthCheck), **rules)(given(cases)(one))
    if seed is not None:
        from hypothesis import seed as with_seed
        run = with_seed(int(seed))(run)
    run()
    print(f'{family}: {n} cases')

if __name__=='__main__': main(*sys.argv[1:])
