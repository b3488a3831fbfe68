"""The rule `paper` against a literal reading of the published algorithm, with loops over entries and lists of blocks"""
import math
import numpy as np, pytest, torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from dsb.structure.extract import extract_blocks
from dsb.structure.rules import Collector, Weights, paper

def blocks_of(s):
    "[(rows, columns)] of each block, in stored order"
    B = s.block_size
    return [(s.rows.view(-1,B)[g].tolist(), s.cols[i:i+B].tolist())
            for g in range(s.n_groups) for i in range(int(s.group_ptr[g]), int(s.group_ptr[g+1]), B)]

def dropped(W, blocks, k, B):
    "Steps 1 and 2: the k smallest are planned; a drop stands if its row or its column of the block has B/2 planned"
    entries = [(abs(W[r,c]), i) for i,(r,c) in enumerate((r,c) for rows,cols in blocks for c in cols for r in rows)]
    at = [(r,c) for rows,cols in blocks for c in cols for r in rows]
    planned = {at[i] for _,i in sorted(entries)[:k]}
    stands = set()
    for rows,cols in blocks:
        for r in rows:
            for c in cols:
                in_row,in_col = sum((r,o) in planned for o in cols),sum((o,c) in planned for o in rows)
                if (r,c) in planned and (2*in_row>=B or 2*in_col>=B): stands.add((r,c))
    return planned,stands

def grown(dW, active, k):
    "Step 3: as many of the largest gradients among the inactive and the dropped"
    O,K = dW.shape
    free = [(-abs(dW[r,c]), r*K+c, (r,c)) for r in range(O) for c in range(K) if (r,c) not in active]
    return {rc for *_,rc in sorted(free)[:k]}

def grouped(M, B):
    "Extraction 2 to 4: cosine similarity, complete linkage into O/B clusters, the largest first, cut every B rows"
    O = len(M)
    d = np.zeros((O,O))
    for a in range(O):
        for b in range(O):
            if a!=b: d[a,b] = 1 - (M[a]*M[b]).sum()/max(1, math.sqrt(M[a].sum()*M[b].sum()))
    z = linkage(squareform(d, checks=False), 'complete')
    z[:,2] = np.arange(1, O)
    label = fcluster(z, O-O//B+.5, 'distance')
    clusters = sorted(([r for r in range(O) if label[r]==l] for l in set(label)), key=lambda c: (-len(c), c[0]))
    flat = [r for c in clusters for r in c]
    return [flat[i:i+B] for i in range(0, O, B)]

def extracted(S, M, n, B):
    "Extraction 5 and 6, and the rule that every group keeps its best block where there are enough"
    blocks = []
    for g,rows in enumerate(grouped(M, B)):
        norm = [math.sqrt(sum(S[r,c]**2 for r in rows)) for c in range(S.shape[1])]
        order = sorted(range(S.shape[1]), key=lambda c: (-norm[c], c))
        for j in range(0, S.shape[1]//B*B, B):
            cols = order[j:j+B]
            blocks.append((j==0 and n>=len(S)//B, sum(norm[c] for c in cols), -g, -j, rows, cols))
    mask = np.zeros(S.shape, dtype=bool)
    for *_,rows,cols in sorted(blocks, key=lambda b: b[:4], reverse=True)[:n]: mask[np.ix_(rows,cols)] = True
    return mask

@pytest.mark.parametrize('seed', range(30))
def test_paper_rule_entry_by_entry(seed):
    g = torch.Generator().manual_seed(seed)
    B = [2,4][seed%2]
    O,K = B*int(torch.randint(2, 6, (), generator=g)),int(torch.randint(2*B, 30, (), generator=g))
    n = int(torch.randint(O//B, O//B*(K//B), (), generator=g))
    s = extract_blocks(torch.rand(O,K, generator=g), n, B, torch.rand(O,K, generator=g)>.6)
    values = s.gather(torch.randn(O,K, generator=g, dtype=torch.double))
    dW = torch.randn(O,K, generator=g, dtype=torch.double)
    f = [.1,.3,.7][seed%3]
    seen = Collector(s, int(f*s.nnz)); seen(dW)
    change = paper(Weights(s, values, seen), f)

    W,active,blocks = s.scatter(values).numpy(),s.mask().numpy(),blocks_of(s)
    planned,stands = dropped(W, blocks, int(f*s.nnz), B)
    assert change.planned==len(planned)
    out = s.scatter(change.drop.double()).bool()
    assert {tuple(o) for o in out.nonzero().tolist()}==stands
    keep = {tuple(o) for o in active.nonzero()[0:0]} | {(r,c) for r,c in zip(*active.nonzero())} - stands
    new = grown(dW.numpy(), keep, len(stands))
    assert {divmod(o, K) for o in change.grown.tolist()}==new
    if not stands: return
    M = np.zeros((O,K)); S = np.zeros((O,K))
    for r,c in keep: M[r,c],S[r,c] = 1,abs(W[r,c])
    mean = np.mean([S[r,c] for r,c in keep if S[r,c]>0]) if keep else 1.
    for r,c in new: M[r,c],S[r,c] = 1,mean
    assert (change.structure.mask().numpy()==extracted(S, M, n, B)).all()
