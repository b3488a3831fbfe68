"""Several processes on one machine

What they have collected of a gradient is brought together after the step, and nobody waits for somebody who does not
come.
"""
import os, signal, socket
from pathlib import Path
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as Parallel
import dsb
from dsb.structure.rules import dealt_out
from dsb.topology import Updater
from traffic import model as traffic_model, traffic

class Net(nn.Module):
    "Layers that a step can leave out"
    def __init__(self):
        super().__init__()
        self.first,self.left,self.right,self.last = (nn.Linear(32,32) for _ in range(4))
    def forward(self, x, ways='lr'):
        x = self.first(x).tanh()
        return self.last(x + sum({'l':self.left, 'r':self.right}[o](x).tanh() for o in ways))

def model(seed=0, B=8, **kw):
    torch.manual_seed(seed)
    return dsb.sparsify(Net(), .7, B, **kw)

def train(m, net, rank, steps=6, ways=lambda i: 'lr', T=2, upd=None, **kw):
    "(updates, masks, values, active weights) after some steps with images of one's own"
    opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
    if m.first.block_size and 'method' not in kw: kw['rule'] = 'columns'
    upd = Updater(upd or net, opt, T=T, T_end=1000, alpha=.5, **kw)
    g,n = torch.Generator().manual_seed(rank),0
    for i in range(steps):
        net(torch.randn(16,32,generator=g), ways(i)).square().mean().backward()
        opt.step(); opt.zero_grad()
        n += upd.step() is not None
    masks = [o.checksum.tolist() for o in dsb.sparse_layers(m).values()]
    active = sum(o.structure.nnz for o in dsb.sparse_layers(m).values())
    return n,masks,[round(p.double().abs().sum().item(), 6) for p in m.parameters()],active

def together(rank, m=None, wrapped={}, **kw):
    "Train a model in parallel; `wrapped` goes to the wrapper, the rest to `train`"
    m = m or model()
    return train(m, Parallel(m, **wrapped), rank, **kw)

unused = dict(find_unused_parameters=True)
def plain(rank): return together(rank)
def other_weights(rank): return together(rank, model(seed=rank))  # those of the first count, structures included
def norms(rank): return together(rank, grow='norm')
def part(rank): return together(rank, part=.5, accumulate=2)
def chance(rank): return together(rank, grow='random')
def single(rank): return together(rank, model(B=0), method='rigl')
def left_out(rank): return together(rank, wrapped=unused, ways=lambda i: 'l' if rank and i%2 else 'lr')
def apart(rank): return together(rank, wrapped=unused, ways=lambda i: 'lr'[rank%2])
def bare(rank): return together(rank, m:=model(), upd=m)             # the wrapper is found
def frozen(rank):
    m = model(); m.left.requires_grad_(False)
    return together(rank, m)

def pruned(rank): return together(rank, model(initial_ratio=3), prune_end=6)
def pruned_still(rank): return together(rank, model(B=0, initial_ratio=3), method='static', prune_end=6, wrapped=dict(gradient_as_bucket_view=True))
def pruned_bare(rank): return together(rank, m:=model(initial_ratio=3), upd=m, prune_end=6, wrapped=dict(static_graph=True))

TOGETHER = [plain, other_weights, norms, part, chance, single, left_out, apart, bare, frozen, pruned, pruned_still, pruned_bare]

def own_models(rank): m = model(seed=rank); return train(m, m, rank)
def only_first(rank): return train(m:=model(), m, rank) if rank==0 else None

def differ(rank):
    "One process has another structure: the next update names the layer"
    m = model(); net = Parallel(m, broadcast_buffers=False)
    if rank==1:
        o = m.right; s = o.structure; rows = s.rows.flip(0)
        o.set_structure(type(s)(rows, s.group_ptr, s.cols, 8, s.shape), o.values.detach().clone())
    try: train(m, net, rank)
    except RuntimeError as e: return str(e)

def out_of_step(rank):
    m = model()
    net,opt = Parallel(m),torch.optim.SGD(m.parameters(), .1)
    upd = Updater(net, opt, T=2, rule='columns')
    if rank: upd.t = 2
    try:
        for i in range(2): net(torch.randn(4,32)).sum().backward(); opt.step(); opt.zero_grad(); upd.step()
    except RuntimeError as e: return str(e)

def some_together(rank, groups=[]):
    "Two of three processes train one model, the third one its own"
    pair = dist.new_group([0,1])
    m = model(seed=rank)
    return train(m, Parallel(m, process_group=pair) if rank<2 else m, rank)

def sent_by_columns(rank): return traffic('dsb', rank, 2)
def sent_by_entries(rank): return traffic('paper', rank, 2)

def by_formula(n=2):
    "What a process has to send: gradients of a step, and for an update whole gradients, shares of them, and scores (the largest)"
    m = traffic_model('dsb')
    layers = dsb.sparse_layers(m).values()
    def cuts(s): return [s.n_groups*s.shape[1]*i//n for i in range(n+1)]
    def scores(s): return 1+max(b-a+len(o)*16 for a,b,o in zip(cuts(s), cuts(s)[1:], dealt_out(s, cuts(s))))
    whole = 4*sum(o.shape[0]*o.shape[1] for o in layers)
    facts,checks = 8*(3+2*len(layers)),2*4*sum(len(o.checksum) for o in layers)
    ring = 2*(n-1)/n
    return dict(gradients=ring*4*sum(p.numel() for p in m.parameters()), beside=ring*(facts+checks), whole=ring*whole,
                shares=(n-1)*whole, scores=(n-1)*4*sum(scores(o.structure) for o in layers))

def job(rank, n, port, jobs, q):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=n)
    for f in jobs:
        try: q.put((f.__name__, rank, f(rank)))
        except Exception as e: q.put((f.__name__, rank, f'{type(e).__name__}: {e}'))
        dist.barrier()
    dist.destroy_process_group()

def run(n, jobs):
    "name -> what each process returned"
    ctx = mp.get_context('spawn'); q = ctx.Queue()
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ps = [ctx.Process(target=job, args=(r, n, port, jobs, q)) for r in range(n)]
    for p in ps: p.start()
    res = {}
    try:
        for _ in range(n*len(jobs)):
            name,rank,got = q.get(timeout=240)
            res.setdefault(name, {})[rank] = got
        for p in ps: p.join(60)
    finally:
        for p in ps: p.kill()
    return {k:[v[r] for r in range(n)] for k,v in res.items()}

def test_two():
    got = run(2, [*TOGETHER, own_models, only_first, differ, out_of_step, sent_by_columns, sent_by_entries])
    for f in TOGETHER:
        a,b = got[f.__name__]
        assert isinstance(a, tuple), (f.__name__, a)
        assert a==b and a[0]==3, (f.__name__, [x==y for x,y in zip(a,b)], a[0])
    sizes = [sum(o.nnz for o in (m.structure for m in dsb.sparse_layers(model(B=B)).values())) for B in (8,0)]
    assert [got[k][0][3] for k in ('pruned','pruned_still','pruned_bare')]==[sizes[0],sizes[1],sizes[0]]
    a,b = got['own_models']; assert a[0]==b[0]==3 and a[1]!=b[1]
    assert got['only_first'][0][0]==3 and got['only_first'][1] is None
    assert all("other structures in 'right'" in o for o in got['differ']), got['differ']
    assert all('at different steps, 1 and 3' in o for o in got['out_of_step']), got['out_of_step']
    alone = train(m:=model(), m, 0)
    assert got['plain'][0][1]!=alone[1]      # both processes counted
    f,columns,whole = by_formula(),got['sent_by_columns'],got['sent_by_entries']
    for o in (*columns, *whole):             # a step sends the gradients of active weights, and nothing else
        assert o['step']['gradients']==o['step']['all_reduce']==o['update']['gradients']==f['gradients'] and len(o['step'])==3
    assert [o['update']['all_reduce']-f['gradients'] for o in columns]==[f['beside']]*2
    assert [o['update']['all_reduce']-f['gradients'] for o in whole]==[f['beside']+f['whole']]*2
    assert sum(o['update']['all_to_all'] for o in columns)==f['shares']
    assert [o['update']['all_gather'] for o in columns]==[f['scores']]*2 and f['shares']/2+f['scores']<.65*f['whole']

class Noise:
    "Images of random numbers in double precision, of which each process gets its share of a batch"
    num_classes, image_size, channels, steps_per_epoch = 4, 8, 1, 8
    def __init__(self, rank=0, world=1):
        g = torch.Generator().manual_seed(0)
        self.x,self.y = torch.randn(128,1,8,8,generator=g,dtype=torch.float64),torch.arange(128)%4
        self.rank,self.world = rank,world
    def train_batches(self, epoch, start=0):
        for b in range(start, 8): yield tuple(t[16*b:16*b+16].chunk(self.world)[self.rank] for t in (self.x, self.y))
    def test_batches(self): yield tuple(t[self.rank::self.world] for t in (self.x, self.y))

def in_double(rank, world=1, parts=1):
    "(weights, masks, updates, losses) of a run without BatchNorm in double precision"
    from dsb.training.train import TrainConfig, Trainer, structure_checksum
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        c = TrainConfig(model='lenet300-100', data_set='noise', method='dsb', rule='columns', initial_ratio=1, block_size=8, sparsity=.7, T=2, epochs=2, lr=.05, batch_size=16,
                        accumulate_steps=parts, device='cpu')
        t = Trainer(c, data=Noise(rank, world), verbose=False)
        t.fit()
    finally: torch.set_default_dtype(before)
    assert all(p.dtype==torch.float64 for p in t.model.parameters())
    return [p.tolist() for p in t.model.parameters()],structure_checksum(t.model),[u for h in t.history for u in h['updates']],[h['train_loss'] for h in t.history]

def halves(rank): return in_double(rank, 2)
def quarters(rank): return in_double(rank, 2, 2)

def cut_in_two(out, **kw):
    "What trains a run on `Noise`, from its beginning or from where it stopped, to its end or `until` a step is done"
    from dsb.training.train import Interrupted, TrainConfig, Trainer, structure_checksum
    class Cut(Trainer):
        def _load_data(self): return Noise(self.rank, self.world)
        def train_step(self, x, y):
            super().train_step(x, y)
            if self.step==self.until: self._stop(signal.SIGTERM)
    def train(until=None):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        if dist.is_initialized(): dist.barrier()                         # the first process has saved
        begun = (out/'last.pt').exists()
        try:
            c = TrainConfig(model='lenet300-100', method='dsb', rule='columns', initial_ratio=1, block_size=8, sparsity=.7, T=2, accumulate=2, epochs=2, lr=.05, batch_size=16, device='cpu', **kw)
            t = Cut.resume(out, verbose=False) if begun else Cut(c, out, verbose=False)
            if dist.is_initialized(): dist.barrier()                     # all have looked
            t.until = until
            try: t.fit()
            except Interrupted: return
        finally: torch.set_default_dtype(before)
        return [p.tolist() for p in t.model.parameters()],structure_checksum(t.model),[u for h in t.history for u in h['updates']],[h['train_loss'] for h in t.history]
    return train

def runs(): return Path(os.environ['DSB_TEST_RUNS'])
def two_first(rank): return cut_in_two(runs()/'two-one')(5)
def two_then(rank): return cut_in_two(runs()/'one-two')()
def two_whole(rank): return cut_in_two(runs()/'two')()
def two_cut(rank): cut_in_two(runs()/'two-two')(5); return cut_in_two(runs()/'two-two')()

def far(a, b):
    "Greatest distance of two runs' weights and losses"
    return max(max((torch.tensor(p)-torch.tensor(q)).abs().max().item() for p,q in zip(a[0], b[0])), max(abs(p-q) for p,q in zip(a[3], b[3])))

def test_two_are_one(tmp_path, monkeypatch):
    """Two processes with half of each batch, also in parts, make the run of one process: its weights but for rounding, its structures at every update.
    So does a run that is stopped in the midst of an epoch and of a sum of gradients and goes on in one process instead of two, or in two instead of one"""
    monkeypatch.setenv('DSB_TEST_RUNS', str(tmp_path))
    one = in_double(0)
    assert len(one[2])>=5 and sum(u['net_changed'] for u in one[2])>0
    cut_in_two(tmp_path/'one-two')(5)
    got = run(2, [halves, quarters, two_first, two_then, two_whole, two_cut])
    for other in (*got['halves'], *got['quarters'], in_double(0, parts=2)):
        assert not isinstance(other, str), other
        assert other[1:3]==one[1:3] and far(one, other)<1e-10
    assert got['two_first']==[None,None], got['two_first']
    whole = cut_in_two(tmp_path/'one')()
    assert len(whole[2])>=5 and whole[1]!=one[1]                         # sums of two steps' gradients
    for other in (*got['two_then'], *got['two_whole'], cut_in_two(tmp_path/'two-one')()):
        assert not isinstance(other, str), other
        assert other[1:3]==whole[1:3] and far(whole, other)<1e-10
    assert got['two_cut']==got['two_whole']                              # bit for bit

def test_three():
    a,b,c = run(3, [some_together])['some_together']
    assert a==b and a[0]==c[0]==3 and a[1]!=c[1]

def test_before_wrapping():
    with pytest.raises(ValueError, match='sparsify first, wrap it then'):
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
        try: dsb.sparsify(Parallel(Net()))
        finally: dist.destroy_process_group()
