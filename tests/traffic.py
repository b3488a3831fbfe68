"""What processes send to one another while they train: counted where torch is asked to send it, and on the wire

    python tests/traffic.py [N]      # for N processes, 2 unless said otherwise

prints a line of JSON for each way to train. The bytes on the wire are those of the loopback interface, so they are
right where nothing else uses it; `unshare -rn` gives the command an interface of its own:

    unshare -rn sh -c 'ip link set lo up; python tests/traffic.py'
"""
import json, os, socket, sys, warnings
from contextlib import contextmanager
from pathlib import Path
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as Parallel

WAYS = dict(dense={}, dsb=dict(method='dsb'), paper=dict(method='dsb', rule='paper'), rigl=dict(method='rigl'))

def size(t): return t.numel()*t.element_size()

@contextmanager
def counted(n):
    "The bytes that this process has to send for the calls of `dist` in a `with` block, name -> sum"
    sent, real = {}, {k: getattr(dist, k) for k in ('all_reduce', 'all_to_all_single', 'all_gather')}
    def note(k, b): sent[k] = sent.get(k, 0)+b
    def all_reduce(t, *a, **kw): note('all_reduce', 2*(n-1)*size(t)/n); return real['all_reduce'](t, *a, **kw)
    def all_gather(ts, t, *a, **kw): note('all_gather', (n-1)*size(t)); return real['all_gather'](ts, t, *a, **kw)
    def all_to_all_single(out, t, **kw): note('all_to_all', (n-1)*size(t)/n); return real['all_to_all_single'](out, t, **kw)
    try:
        for f in all_reduce, all_gather, all_to_all_single: setattr(dist, f.__name__, f)
        yield sent
    finally:
        for k, f in real.items(): setattr(dist, k, f)

def count_gradients(ddp, n):
    "A list to which each bucket of gradients adds the bytes that this process has to send for it"
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    sent = []
    def hook(group, bucket):
        sent.append(2*(n-1)*size(bucket.buffer())/n)
        return allreduce_hook(group, bucket)
    ddp.register_comm_hook(None, hook)
    return sent

def on_the_wire():
    "Bytes that the loopback interface has sent, on Linux"
    table = Path('/proc/net/dev')
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(l.split()[9]) for l in lines if l.split()[0] == 'lo:'), 0)

def model(way, name='wrn-10-2', sparsity=.9):
    "A network of CIFAR's size, and the way in which it is trained"
    import dsb
    from dsb.training.models import create_model
    torch.manual_seed(0)
    m = create_model(name, 10, 32)
    return m if way == 'dense' else dsb.sparsify(m, sparsity, 0 if way == 'rigl' else 16)

def steps(way, m, n, rank, T=2, **wrapped):
    "A network in parallel; call what comes back for a step, it returns the report of the update or None"
    from dsb.topology import Updater
    with warnings.catch_warnings():                    # of torch 2.14, about a new name of an option
        warnings.simplefilter('ignore', FutureWarning)
        ddp = Parallel(m, **wrapped)
    opt = torch.optim.SGD(m.parameters(), .1, momentum=.9)
    upd = None if way == 'dense' else Updater(ddp, opt, T=T, T_end=100, **WAYS[way])
    g = torch.Generator().manual_seed(rank)
    def step():
        ddp(torch.randn(2, 3, 32, 32, generator=g)).square().mean().backward()
        opt.step(); opt.zero_grad()
        return upd and upd.step()
    return ddp, step

def traffic(way, rank, n, **wrapped):
    "Bytes of a step, and of one with an update, by the calls and, for all processes together, on the wire"
    m = model(way)
    ddp, step = steps(way, m, n, rank, **dict(broadcast_buffers=False) | wrapped)
    sent = count_gradients(ddp, n)
    step()                                             # buckets are made in the first step
    got = {}
    for what in ('step', 'update') if way != 'dense' else ('step',):
        while True:
            dist.barrier(); before = on_the_wire(); dist.barrier()
            sent.clear()
            with counted(n) as calls: moved = step() is not None
            dist.barrier(); after = on_the_wire(); dist.barrier()
            if moved == (what == 'update'): break
        got[what] = dict(gradients=sum(sent), **calls, wire=after-before)
    return got

def job(rank, n, port, q):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=n)
    for way in WAYS: q.put((way, rank, traffic(way, rank, n)))
    for way in 'dsb', 'rigl': q.put((f'{way}, buffers too', rank, traffic(way, rank, n, broadcast_buffers=True)))
    dist.destroy_process_group()

def main(n=2):
    ctx = mp.get_context('spawn'); q = ctx.Queue()
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    ps = [ctx.Process(target=job, args=(r, n, port, q)) for r in range(n)]
    for p in ps: p.start()
    rows = [q.get(timeout=300) for _ in range(n*(len(WAYS)+2))]
    for p in ps: p.join()
    for way in dict.fromkeys(w for w, _, _ in rows):
        each = {r: o for w, r, o in rows if w == way}
        print(json.dumps(dict(way=way, processes=[each[r] for r in range(n)])))

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
