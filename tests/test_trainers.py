"""Other people's trainers, averages and optimizers, each with the real library; skipped where it is not installed"""
import os, socket, warnings
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
import torch.nn as nn, torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
import dsb
from dsb.structure.rules import RULES
from dsb.trainers import lightning_callback, transformers_callback

HOW = dict(T=2, T_end=1000, rule='columns', alpha=.5)

def net(seed=0, **kw):
    torch.manual_seed(seed)
    return dsb.sparsify(nn.Sequential(nn.Linear(16,32), nn.Tanh(), nn.Linear(32,16)), .5, 8, **kw)

def row(i): return torch.randn(16, generator=torch.Generator().manual_seed(i))

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 32
    def __getitem__(self, i): return dict(x=row(i))

def same_state(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def moved(m, start): return any(a.structure!=b.structure for a,b in zip(*(dsb.sparse_layers(o).values() for o in (m,start))))

# Lightning

def lightning_fit(folder, epochs, ckpt=None, how=HOW):
    L = pytest.importorskip('lightning.pytorch', reason='Lightning is not installed')
    class Small(L.LightningModule):
        def __init__(self): super().__init__(); self.net = net()
        def training_step(self, batch, i): return F.mse_loss(self.net(batch['x']), batch['x'])
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), 1e-2)
    m,c = Small(),lightning_callback(**how)
    trainer = L.Trainer(max_epochs=epochs, accelerator='cpu', accumulate_grad_batches=2, logger=False, callbacks=[c],
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(m, torch.utils.data.DataLoader(Rows(), 4), ckpt_path=ckpt)
    trainer.save_checkpoint(folder/f'{epochs}.ckpt')
    return m.net,c

def test_lightning_resumes(tmp_path):
    whole,c = lightning_fit(tmp_path, 3)
    assert (c.upd.t, len(c.reports))==(12,6) and moved(whole, net())
    lightning_fit(tmp_path, 1)
    again,d = lightning_fit(tmp_path, 3, tmp_path/'1.ckpt')
    assert d.upd.t==12 and len(d.reports)==4 and same_state(whole, again)

def test_lightning_two_losses(tmp_path):
    "A generator and its critic, an optimizer each: what moves is decided by the generator's own loss"
    L = pytest.importorskip('lightning.pytorch', reason='Lightning is not installed')
    class Gan(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.generator,self.critic,self.automatic_optimization = net(),nn.Linear(16,1),False
        def training_step(self, batch, i):
            x = batch['x']; g,d = self.optimizers()
            (self.critic(self.generator(x).detach())-self.critic(x)).mean().backward(); d.step(); d.zero_grad()
            loss = -self.critic(self.generator(x)).mean(); self.manual_backward(loss); g.step(); g.zero_grad()
            d.zero_grad()
        def configure_optimizers(self):
            return [torch.optim.Adam(o.parameters(), 1e-2) for o in (self.generator,self.critic)],[]
    m,c = Gan(),lightning_callback('generator', **HOW)
    trainer = L.Trainer(max_epochs=1, accelerator='cpu', logger=False, callbacks=[c], enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(m, torch.utils.data.DataLoader(Rows(), 4))
    assert c.upd.t==8 and len(c.reports)==4 and moved(m.generator, net())

# Transformers and Accelerate

class WithLoss(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return dict(loss=F.mse_loss(self.net(x), x))

def transformers_fit(folder, resume=None, **kw):
    tr = pytest.importorskip('transformers', reason='Transformers is not installed')
    pytest.importorskip('accelerate', reason='the Trainer of Transformers needs Accelerate')
    args = tr.TrainingArguments(str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=12,
                                use_cpu=True, report_to=[], save_steps=5, disable_tqdm=True, logging_strategy='no', **kw)
    c = transformers_callback(**HOW)
    trainer = tr.Trainer(WithLoss(), args, train_dataset=Rows(), callbacks=[c])
    trainer.train(resume_from_checkpoint=resume)
    c = next(o for o in trainer.callback_handler.callbacks if type(o) is type(c))
    return trainer.model.net,c

def test_transformers_resumes(tmp_path):
    whole,c = transformers_fit(tmp_path)
    assert (c.upd.t, len(c.reports))==(12,6) and moved(whole, net())
    for kw in {},dict(restore_callback_states_from_checkpoint=True):
        again,d = transformers_fit(tmp_path, str(tmp_path/'checkpoint-5'), **kw)
        assert (d.upd.t, len(d.reports))==(12,4) and same_state(whole, again), kw

def test_accelerate_resumes(tmp_path):
    acc_ = pytest.importorskip('accelerate', reason='Accelerate is not installed')
    def fit(first, last, load=None, save=None):
        acc = acc_.Accelerator(cpu=True, gradient_accumulation_steps=2)
        m = net(seed=0 if load is None else 5)
        m,opt = acc.prepare(m, torch.optim.AdamW(m.parameters(), 1e-2))
        upd = dsb.Updater(m, opt, **HOW)
        acc.register_for_checkpointing(upd)
        if load is not None: acc.load_state(load)
        for i in range(2*first, 2*last):
            with acc.accumulate(m):
                x = torch.stack([row(i), row(i+100)]); acc.backward(F.mse_loss(m(x), x))
                opt.step(); opt.zero_grad()
            if acc.sync_gradients: upd.step()
        if save is not None: acc.save_state(save)
        return m
    whole = fit(0, 8)
    fit(0, 5, save=tmp_path)
    assert moved(whole, net()) and same_state(fit(5, 8, load=tmp_path), whole)

# averages

def averaged(make, update, follow=False, late=False, steps=6):
    "(the average's output, the model, the average) after some steps"
    m = net(); opt = torch.optim.SGD(m.parameters(), .1)
    early = None if late else make(m)
    upd = dsb.Updater(m, opt, **HOW, follow=[early] if follow else [])
    e = make(m) if late else early
    for i in range(steps):
        F.mse_loss(m(row(i)[None]), row(i)[None]).backward()
        opt.step(); opt.zero_grad(); upd.step(); update(e, m)
    inside = getattr(e, 'module', None) or e.ema
    return inside(row(0)[None]),m,inside

def kinds():
    found = [('torch', lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.9)), AveragedModel.update_parameters),
             ('torch, buffers', lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True),
              AveragedModel.update_parameters)]
    timms = 'ModelEma','ModelEmaV2','ModelEmaV3'
    return [pytest.param(*o[1:], id=o[0]) for o in found] + [pytest.param(o, None, id=o) for o in timms]

@pytest.mark.parametrize('make,update', kinds())
def test_averages_follow(make, update):
    if update is None:
        kind = getattr(pytest.importorskip('timm.utils', reason='timm is not installed'), make)
        make,update = lambda m: kind(m, decay=.9),lambda e, m: e.update(m)
    y,m,e = averaged(make, update)
    assert moved(m, net())
    for a,b in zip(dsb.sparse_layers(m).values(), dsb.sparse_layers(e).values()): assert a.structure==b.structure
    assert torch.equal(y, averaged(make, update, follow=True)[0])
    assert torch.equal(y, averaged(make, update, late=True)[0])
    for n,w in dense_average(copies_first=update is AveragedModel.update_parameters).items():
        assert torch.allclose(dsb.sparse_layers(e)[n].dense_weight(), w, atol=1e-6), n

def dense_average(copies_first, steps=6):
    "By hand: the average of the dense weights, forgotten wherever a weight is not active"
    m = net(); opt = torch.optim.SGD(m.parameters(), .1)
    upd,layers = dsb.Updater(m, opt, **HOW),dsb.sparse_layers(m)
    mean = {n:o.dense_weight().detach().clone() for n,o in layers.items()}
    for i in range(steps):
        F.mse_loss(m(row(i)[None]), row(i)[None]).backward()
        opt.step(); opt.zero_grad(); upd.step()
        for n,o in layers.items():
            mean[n] *= o.mask()
            mean[n].lerp_(o.dense_weight().detach(), 1. if copies_first and i==0 else .1)
    return mean

# optimizers

class SAM(torch.optim.Optimizer):
    "Sharpness-aware: a step up, a second gradient, a step down from where it was"
    def __init__(self, params, base, rho=.05, **kw):
        super().__init__(params, dict(rho=rho, **kw))
        self.base_optimizer = base(self.param_groups, **kw)
        self.param_groups = self.base_optimizer.param_groups
    @torch.no_grad()
    def up(self):
        ps = [p for g in self.param_groups for p in g['params']]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        for p in ps:
            self.state[p]['before'] = p.clone()
            p.add_(p.grad*.05/(norm+1e-12))
    @torch.no_grad()
    def down(self):
        for g in self.param_groups:
            for p in g['params']: p.copy_(self.state[p]['before'])
        self.base_optimizer.step()

def test_sam():
    "Growth goes by the gradient of the second pass, and all state moves along"
    m = net(); opt = SAM(m.parameters(), torch.optim.SGD, lr=.1, momentum=.9)
    seen = []
    def look(w, f):
        seen.append(w.seen.gradient.clone())
        return RULES['columns'](w, f)
    look.keeps = 'columns'
    upd = dsb.Updater(m, opt, **HOW | dict(rule=look))
    for i in range(8):
        x = row(i)[None]
        F.mse_loss(m(x), x).backward(); opt.up(); opt.zero_grad()
        F.mse_loss(m(x), x).backward(); opt.down()
        want,n = [o.values.grad.abs() for o in dsb.sparse_layers(m).values()],len(seen)
        opt.zero_grad(); upd.step()
        for a,b in zip(seen[n:], want): assert torch.allclose(a, b, atol=1e-6)
        for o in dsb.sparse_layers(m).values(): assert not opt.state[o.values]['before'][o.structure.index()<0].any()
    assert upd.updates==4 and len(seen)==8 and moved(m, net())

def test_two_optimizers_over_one_model():
    def fit(split):
        m = net()
        kinds = ('values','bias') if split else ('',)
        groups = [[p for n,p in m.named_parameters() if k in n] for k in kinds]
        opts = [torch.optim.SGD(g, .1, momentum=.9) for g in groups]
        upd = dsb.Updater(m, opts if split else opts[0], **HOW)
        for i in range(6):
            F.mse_loss(m(row(i)[None]), row(i)[None]).backward()
            for o in opts: o.step(); o.zero_grad()
            upd.step()
        return m
    assert moved(fit(False), net()) and same_state(fit(True), fit(False))

def test_gan_by_hand():
    "Backward passes of the other loss, before and after, change nothing about what moves"
    def fit(order):
        g,d = net(),nn.Linear(16,1); torch.manual_seed(1); nn.init.normal_(d.weight)
        og = torch.optim.SGD(g.parameters(), .1)
        upd = dsb.Updater(g, og, **HOW)
        def other():                                        # the critic's loss, through the generator
            (g(row(50)[None])**2).sum().backward(); og.zero_grad()
        for i in range(6):
            if order=='before': other()
            F.mse_loss(g(row(i)[None]), row(i)[None]).backward(); og.step(); og.zero_grad()
            if order=='after': other()
            upd.step()
        return g
    assert moved(fit(None), net())
    assert same_state(fit('before'), fit(None)) and same_state(fit('after'), fit(None))

# sharded

@pytest.fixture
def alone():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@pytest.mark.parametrize('orig', [True, False])
def test_fsdp_is_refused(alone, orig):
    from torch.distributed.fsdp import FullyShardedDataParallel
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = FullyShardedDataParallel(net(), device_id=torch.device('cpu'), use_orig_params=orig)
    opt = torch.optim.SGD(m.parameters(), .1)
    with pytest.raises(ValueError, match='sharded over processes .* use DistributedDataParallel'): dsb.Updater(m, opt)

def test_fsdp2_is_refused_and_computes(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    m,x = net(),row(0)[None]
    want = m(x)
    fully_shard(m, mesh=init_device_mesh('cpu', (1,)))
    opt = torch.optim.SGD(m.parameters(), .1)
    with pytest.raises(ValueError, match="values of '0' are sharded over processes"): dsb.Updater(m, opt)
    y = m(x)
    assert torch.equal(y, want)
    y.sum().backward(); opt.step()
    assert not torch.equal(m(x), want)                       # blocks that stay where they are can be trained so

def zero(rank, port, q):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    def fit(shared, **kw):
        m = net(**kw); ddp = nn.parallel.DistributedDataParallel(m)
        if shared: opt = ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, lr=.1, momentum=.9)
        else: opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
        upd = dsb.Updater(ddp, opt, **HOW, **(dict(prune_end=6) if kw else {}))
        for i in range(8):
            F.mse_loss(ddp(x := row(10*i+rank)[None]), x).backward()
            opt.step(); opt.zero_grad(); upd.step()
        checksums = [o.checksum.tolist() for o in dsb.sparse_layers(m).values()]
        return upd.updates,[p.detach().tolist() for p in m.parameters()],checksums
    try: q.put((rank, fit(True), fit(False), fit(True, initial_ratio=1.5), fit(False, initial_ratio=1.5)))
    except Exception as e: q.put((rank, f'{type(e).__name__}: {e}'))
    dist.barrier(); dist.destroy_process_group()

def test_shares_of_an_optimizer():
    "ZeroRedundancyOptimizer, each process with the state of its own share, does what one optimizer does"
    ctx = mp.get_context('spawn'); q = ctx.Queue()
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ps = [ctx.Process(target=zero, args=(r, port, q)) for r in range(2)]
    for p in ps: p.start()
    try: got = sorted((q.get(timeout=120) for _ in ps), key=lambda o: o[0])
    finally:
        for p in ps: p.join(30); p.kill()
    for r in got: assert len(r)==5, r
    a,b = got
    assert a[1]==b[1]==a[2] and a[3]==b[3]==a[4] and a[1][0]==4
