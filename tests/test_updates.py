"""Any update, whatever the rule and the shape, keeps the rules that every structure has to keep.

More cases: DSB_CASES=2000 python -m pytest tests/test_updates.py
"""
import copy, os
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from dsb.structure.extract import extract_blocks
from dsb.layers import SparseConv2d, SparseLinear
from dsb.structure.rules import RULES
from dsb.topology import Updater

CASES = settings(max_examples=int(os.environ.get('DSB_CASES', 60)), deadline=None, derandomize=True,
                 suppress_health_check=list(HealthCheck))

@st.composite
def layers(draw):
    "(layer, shape of an input, a seed): linear and convolution, short groups, convolution groups, few columns"
    B = draw(st.sampled_from([2,4,8]))
    seed = draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    groups = draw(st.sampled_from([1,1,1,2,3]))
    Og = draw(st.integers(B, 4*B+1))
    O = Og*groups
    if linear := groups==1 and draw(st.booleans()): K = draw(st.integers(B, 40)); dense = nn.Linear(K, O)
    else:
        I = draw(st.integers(B, 10))
        k = draw(st.sampled_from([1,3]))
        dense = nn.Conv2d(I*groups, O, k, padding=k//2, stride=draw(st.sampled_from([1,2])), groups=groups)
        K = I*k*k
    full,short = O//groups//B*groups,groups*(O//groups%B>0)
    most = K//B
    n_short = draw(st.integers(1, most)) if short else 0
    n = draw(st.integers(full, full*most)) + n_short*short
    scores = torch.rand(O, K, generator=g)
    s = extract_blocks(scores, n, B, mask=scores>.7, groups=groups, n_short=n_short)
    make = SparseLinear if linear else SparseConv2d
    return make.from_dense(dense, s),(5,K) if linear else (2,I*groups,6,5),seed

rules = st.sampled_from([(r,g) for r in RULES for g in ('gradient','norm','random')])
numbers = st.fixed_dictionaries(dict(alpha=st.sampled_from([.05,.3,1.]), accumulate=st.sampled_from([0,1]),
                                     part=st.sampled_from([1.,.5])))

def one_update(layer, shape, seed, rule, grow, kw):
    "The layer's structure and dense pictures of values and momentum, before and after an update"
    torch.manual_seed(seed)
    opt = torch.optim.SGD(layer.parameters(), lr=.1, momentum=.9)
    upd = Updater(layer, opt, rule=rule, grow=grow, T=1, T_end=10, **kw)
    layer(torch.randn(shape)).square().sum().backward()
    opt.step()
    def state():
        tensors = layer.values,opt.state[layer.values]['momentum_buffer'],layer.values.grad
        return [layer.structure.scatter(o.detach()).clone() for o in tensors]
    s = layer.structure
    old = s.mapped(torch.clone)
    before = state()
    return old,before,upd.step(),layer.structure,state()

@CASES
@given(layers(), rules, numbers)
def test_every_rule_and_way_keeps_the_rules(case, how, kw):
    layer,shape,seed = case
    old,before,report,new,after = one_update(layer, shape, seed, *how, kw)
    new.validate()                                               # a union of blocks under one permutation of the rows
    assert new.nnz==old.nnz==report.layers[0].active and new.n_blocks==old.n_blocks
    was,now = old.mask(),new.mask()
    assert int((now&~was).sum())==int((was&~now).sum())==report.layers[0].changed
    if old.n_blocks>=old.n_groups: assert (new.group_ptr.diff()>0).all()   # no output loses its input
    assert (new.group_ptr.diff()<=new.shape[1]).all()
    short = lambda s: s.group_ptr.diff()[(s.rows.view(-1,s.block_size)<0).any(1)].tolist()
    assert short(new)==short(old)
    g = new.rows.view(-1,new.block_size).clamp(min=0)//(new.shape[0]//getattr(layer,'groups',1))
    assert ((g==g[:,:1]) | (new.rows.view(-1,new.block_size)<0)).all()     # rows stay in their convolution group
    for a,b in zip(after, before):
        assert (a[now&~was]==0).all()                # grown and filler start at zero, and so does their momentum
        kept = a[now&was]==b[now&was]
        assert (a[now&was][~kept]==0).all()                          # dropped and back again: from zero
    absent = new.index()<0
    assert (layer.values[absent]==0).all()
    restarted = was & now & (after[0]==0) & (before[0]!=0)
    assert int(restarted.sum())<=report.layers[0].confirmed

@settings(CASES, max_examples=CASES.max_examples//4)
@given(layers(), rules, numbers)
def test_threads_change_nothing(case, how, kw):
    layer,shape,seed = case
    first,n = copy.deepcopy(layer),torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = one_update(first, shape, seed, *how, kw)[3]
        torch.set_num_threads(2)
        assert one_update(layer, shape, seed, *how, kw)[3]==one
    finally: torch.set_num_threads(n)
