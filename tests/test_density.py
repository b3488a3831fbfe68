"Exact budgets: over every network of the commands, and over random layers"
import re
from functools import lru_cache
from math import prod

import pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st

from dsb.structure.density import DISTRIBUTIONS, budgets, erk
from dsb.structure.extract import extract_blocks
from dsb.training.models import create_model

NETWORKS = ['alexnet-s', 'alexnet-b', 'vgg-c', 'vgg-d', 'vgg-like', 'wrn-22-2', 'wrn-28-2', 'wrn-22-8', 'wrn-16-8',
            'wrn-16-10', 'ResNet18', 'ResNet34', 'ResNet50', 'mlp', 'lenet5', 'lenet300-100']


@lru_cache
def layer_shapes(name):
    "Weight shapes and groups of a network's maskable layers"
    size = dict(image_size=28, in_channels=1) if name.startswith('lenet') else {}
    with torch.device('meta'): model = create_model(name, **size)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return ({n: tuple(m.weight.shape) for n, m in layers.items()},
            {n: m.groups for n, m in layers.items() if isinstance(m, nn.Conv2d)})


def check_layer(b, shape, B, groups=1):
    "One budget against the definitions, computed here from scratch"
    O, K = shape[0], prod(shape[1:])
    assert b.size == O*K and 0 < b.active <= b.size and b.density == b.active/b.size
    if b.reason:
        assert (b.active, b.n_blocks, b.n_short) == (b.size, 0, 0)
        return
    assert b.active < b.size
    if B == 0:
        assert b.n_blocks == b.n_short == 0
        return
    full, r = divmod(O//groups, B)
    full, short = full*groups, groups if r else 0
    assert b.n_short <= (K//B if short else 0)
    n_full = b.n_blocks - short*b.n_short
    assert 0 <= n_full <= full*(K//B) and b.n_blocks >= 1
    assert b.active == n_full*B*B + short*b.n_short*B*r
    if b.active >= B*O + B*B:   # more than a block for every row group, by more than rounding
        assert n_full >= full and (b.n_short >= 1 or not short)


def check(shapes, sparsity, B, distribution='erk', dense=(), groups={}, tolerance=1., retry=True):
    "Budgets that hold every promise, or the sparsity that an error names instead and that does work"
    target = (1-sparsity)*sum(map(prod, shapes.values()))
    try: bs = budgets(shapes, sparsity, B, distribution, dense, groups)
    except ValueError as e:
        assert '\n' not in str(e)
        near = re.search(r"can't be reached: .*; nearest reachable sparsity: ([\d.e-]+)$", str(e))
        assert near and retry, str(e)
        check(shapes, float(near[1]), B, distribution, dense, groups, retry=False)
        return None
    assert list(bs) == list(shapes)
    assert all(bs[n].reason == 'kept dense' for n in dense)
    for n, s in shapes.items(): check_layer(bs[n], s, B, groups.get(n, 1))
    assert bs.active == sum(b.active for b in bs.values())
    assert abs(bs.active-target) <= tolerance*max(B, 1)**2 + 1e-6
    return bs


@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name):
    "Within half a block of the target at every sparsity and block size, or an error that names a sparsity that works"
    shapes, groups = layer_shapes(name)
    for B in (0, 8, 16, 32):
        for sparsity in (.5, .6, .8, .9, .95, .98, .99):
            for distribution in DISTRIBUTIONS: check(shapes, sparsity, B, distribution, groups=groups, tolerance=.5)


def test_few_networks_miss():
    "From sparsity 0.9 up, only the narrow networks run out of blocks"
    missed = {(n, B, s) for n in NETWORKS for B in (8, 16, 32) for s in (.9, .95, .98, .99)
              if check(layer_shapes(n)[0], s, B) is None}
    assert missed == {('wrn-22-2', 32, .98), ('wrn-22-2', 32, .99), ('wrn-28-2', 32, .99),
                      ('lenet5', 16, .99), ('lenet5', 32, .99)}


def test_stem_and_classifier_dense():
    "Layers kept dense on request are paid for by the others"
    shapes, groups = layer_shapes('wrn-22-2')
    first, last = list(shapes)[0], list(shapes)[-1]
    bs = check(shapes, .9, 16, 'uniform', dense=(first, last), tolerance=.5)
    assert {n for n, b in bs.items() if b.reason} == {first, last}
    assert budgets(shapes, .9, 16, 'uniform', dense=[first, last]) == bs


def test_deterministic():
    shapes, _ = layer_shapes('ResNet18')
    assert budgets(shapes, .95, 16) == budgets(dict(shapes), .95, 16)


@st.composite
def layer_tables(draw, max_layers=6):
    "Shapes of linear layers and grouped convolutions, sometimes too small for blocks, and their groups"
    shapes, groups = {}, {}
    for i in range(draw(st.integers(1, max_layers))):
        g = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
        O, I, k = g*draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.sampled_from([0, 1, 3]))
        if g > 1: k = k or 3
        shapes[f'l{i}'], groups[f'l{i}'] = ((O, I, k, k) if k else (O, I)), g
    return shapes, groups


@settings(max_examples=400, deadline=None)
@given(layer_tables(), st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 2, 3, 4, 8, 16]),
       st.sampled_from(list(DISTRIBUTIONS)), st.data())
def test_random_layers(table, sparsity, B, distribution, data):
    shapes, groups = table
    dense = data.draw(st.sets(st.sampled_from(list(shapes)), max_size=2))
    check(shapes, sparsity, B, distribution, dense, groups)


@settings(max_examples=100, deadline=None)
@given(layer_tables(), st.sampled_from([0, 2, 4, 8, 16]), st.data())
def test_given_densities(table, B, data):
    "A dict of densities is used as given, within a block and the limits of the layer"
    shapes, groups = table
    names = data.draw(st.sets(st.sampled_from(list(shapes))))
    wanted = {n: data.draw(st.floats(.01, 1)) for n in sorted(names)}
    bs = budgets(shapes, None, B, wanted, groups=groups)
    for n, s in shapes.items():
        b, unit = bs[n], max(B, 1)
        check_layer(b, s, B, groups[n])
        if n not in wanted:
            assert b.reason
            continue
        most = prod(s[1:])//unit*unit*s[0]   # weights that blocks can cover
        if b.reason == 'full density':       # nearer to all weights than to that, but for rounding
            assert wanted[n]*b.size >= (b.size+most)/2 - unit**2
        if not b.reason: assert abs(b.active - min(max(wanted[n]*b.size, unit**2), most)) <= unit**2


def iterated_erk(shapes, sparsity):
    "The usual ERK procedure, step by step: layers above 1 become dense, the others start again"
    zeros = sparsity*sum(map(prod, shapes.values()))
    full = set()
    while True:
        rest = {n: s for n, s in shapes.items() if n not in full}
        if not rest: return {n: 1. for n in shapes}
        eps = (sum(map(prod, rest.values()))-zeros)/sum(sum(s) for s in rest.values())
        most = max(erk(s) for s in rest.values())
        if eps*most <= 1: return {n: 1. if n in full else eps*erk(s) for n, s in shapes.items()}
        full |= {n for n, s in rest.items() if erk(s) == most}


@settings(max_examples=150, deadline=None)
@given(layer_tables(12), st.floats(.02, .9))
def test_unstructured_is_erk(table, sparsity):
    "Without blocks each layer is within one weight of the iterated ERK density"
    shapes, groups = table
    usual = iterated_erk(shapes, sparsity)
    if min(usual[n]*prod(s) for n, s in shapes.items()) < 1: return   # here we give every layer a weight, ERK does not
    ours = budgets(shapes, sparsity, 0, groups=groups)
    for n, s in shapes.items(): assert abs(ours[n].active - usual[n]*prod(s)) < 1 + 1e-6


@pytest.mark.parametrize('shape,B,groups', [((20, 40), 16, 1), ((42, 5, 3, 3), 8, 2),
                                            ((32, 16, 3, 3), 16, 1), ((27, 50), 4, 3)])
def test_extraction_delivers(shape, B, groups):
    "A structure chosen with a budget's block counts has exactly its active weights"
    scores = torch.rand(shape[0], prod(shape[1:]), generator=torch.Generator().manual_seed(0))
    for d in (.1, .3, .6):
        b = budgets(dict(a=shape), None, B, dict(a=d), groups=dict(a=groups))['a']
        s = extract_blocks(scores, b.n_blocks, B, groups=groups, n_short=b.n_short)
        assert (s.nnz, s.n_blocks) == (b.active, b.n_blocks)
