"Whatever the layer, the scores and the drop fraction: an update keeps every rule that a structure has to keep"
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
import dsb
from dsb.bench.updates import wither
from dsb.structure.rules import RULES, Collector, Weights, confirm_drops

@st.composite
def layers(draw):
    "A layer of random shape, block size and density, and a seed"
    seed,B,groups = draw(st.integers(0,2**16)),draw(st.sampled_from([0,4,8])),draw(st.sampled_from([1,1,2]))
    per,inputs,k = draw(st.integers(max(B,2),3*max(B,4))),draw(st.integers(1,8)),draw(st.sampled_from([1,3]))
    dense = nn.Conv2d(inputs*groups, per*groups, k, groups=groups)
    K = inputs*k*k
    if K<B: dense = nn.Conv2d(B*groups, per*groups, k, groups=groups)
    torch.manual_seed(seed)
    nn.init.normal_(dense.weight)
    d = draw(st.floats(.15,.9))
    try: model = dsb.sparsify(nn.Sequential(dense), 1-d, B)
    except ValueError: return None,seed
    return (model if dsb.sparse_layers(model) else None),seed

@settings(max_examples=120)
@given(layers(), st.floats(.01,1), st.integers(1,3))
def test_an_update_keeps_the_rules(made, alpha, zeros):
    model,seed = made
    if model is None: return
    layer, = dsb.sparse_layers(model).values()
    opt = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9)
    upd = dsb.Updater(model, opt, method='dsb' if layer.block_size else 'rigl', T=1, T_end=1000, alpha=alpha)
    g = torch.Generator().manual_seed(seed)
    size = layer.args.kernel_size[0]+2
    for _ in range(3):
        old,nnz,x = layer.structure,layer.structure.nnz,torch.randn(2, layer.in_channels, size, size, generator=g)
        if zeros==1: x[:,:1] = 0   # ties: columns without any gradient
        model(x).square().mean().backward(); opt.step(); opt.zero_grad()
        w,was = layer.dense_weight().detach().clone(),old.mask()
        report = upd.step()
        new = layer.structure; new.validate()
        mask,now = new.mask(),layer.dense_weight().detach()
        assert new.nnz==nnz and int(mask.sum())==nnz
        assert (now.flatten(1)[~mask]==0).all() and (now.flatten(1)[mask&~was]==0).all()
        kept = now.flatten(1)[mask&was]
        assert ((kept==w.flatten(1)[mask&was])|(kept==0)).all()
        assert report.total('changed')==int((mask&~was).sum())
        assert report.total('grown')<=report.total('confirmed')<=report.total('planned')
        m = new.scatter(opt.state[layer.values]['momentum_buffer'])
        assert (m[mask&~was]==0).all()
        if layer.block_size: assert layer.values.shape==(new.n_blocks*layer.block_size, layer.block_size)

@settings(max_examples=60)
@given(st.integers(0,2**16), st.sampled_from([2,4,8]), st.floats(0,1))
def test_confirmed_drops_by_the_rule(seed, B, share):
    "Against the rule as a loop"
    planned = torch.rand(3*B,B, generator=torch.Generator().manual_seed(seed))<share
    want = torch.zeros_like(planned)
    for t in range(3):
        tile = planned[t*B:(t+1)*B]
        for i in range(B):
            for j in range(B):
                if tile[i,j] and (tile[i].sum()*2>=B or tile[:,j].sum()*2>=B): want[t*B+i,j] = True
    assert torch.equal(confirm_drops(planned), want)

@pytest.mark.parametrize('name', RULES)
def test_update_does_not_depend_on_threads(name):
    "Equal weights and scores give equal structures on one thread and on several"
    torch.manual_seed(0)
    layer = wither(dsb.sparsify(nn.Conv2d(128,128,3), .9))
    s,v,dW = layer.structure,layer.values.detach(),torch.randn(128,1152)
    def update():
        seen = Collector(s, int(.3*s.nnz), columns=RULES[name].keeps=='columns'); seen(dW)
        return RULES[name](Weights(s, v, seen, taps=9), .3).structure
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = update()
        torch.set_num_threads(4); four = update()
    finally: torch.set_num_threads(before)
    assert one==four and not torch.equal(one.mask(), s.mask())

def test_structures_do_not_pile_up():
    "A thousand updates leave no structure behind"
    import gc
    from dsb.ops import _seen
    layer = dsb.sparsify(nn.Linear(32,32), .5, 8)
    for i in range(1000):
        s = layer.structure
        layer.set_structure(s, layer.values.detach()); layer(torch.randn(2,32))
    gc.collect()
    assert len([o for o in _seen.values() if o.ref() is layer.cols])==1
