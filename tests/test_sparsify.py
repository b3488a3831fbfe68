"The drop-in promise on networks of others: a training step runs, the budget holds, and densify undoes it"
import copy
import pytest, torch
import torch.nn as nn, torchvision.models as tv
import dsb

def resnet18(): return tv.resnet18(num_classes=10), torch.randn(2,3,64,64)
def bottlenecks(): return tv.ResNet(tv.resnet.Bottleneck, [1,1,1,1], num_classes=10), torch.randn(2,3,64,64)
def vit(): return tv.VisionTransformer(64, 16, 2, 4, 192, 768, num_classes=10), torch.randn(2,3,64,64)
def convnext_tiny(): return tv.convnext_tiny(num_classes=10), torch.randn(2,3,64,64)
def mobilenet_v3_small(): return tv.mobilenet_v3_small(num_classes=10), torch.randn(2,3,64,64)
def encoder():
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2,7,128)

def swin(): return tv.SwinTransformer([4,4], 48, [1,1,2], [3,6,12], [7,7], num_classes=10), torch.randn(2,3,64,64)

def timm_model(name, size=64, **kw):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    return timm.create_model(name, num_classes=10, **kw), torch.randn(2,3,size,size)

def timm_vit(): return timm_model('vit_tiny_patch16_224', img_size=64)
def timm_mixer(): return timm_model('mixer_s16_224', img_size=64)

class Logits(nn.Module):
    "A model of transformers that gives a tensor"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(x)[0]

def of_transformers(kind, **kw):
    t = pytest.importorskip('transformers', reason='transformers is not installed')
    return Logits(getattr(t, kind+'Model')(getattr(t, kind+'Config')(**kw)))

def gpt2():
    model = of_transformers('GPT2', n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32)
    return model, torch.randint(100, (2,9))
def bert():
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100)
    return of_transformers('Bert', **sizes), torch.randint(100, (2,9))
def llama():
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100)
    return of_transformers('Llama', **sizes), torch.randint(100, (2,9))
def unet():
    "Down and up again, with a transposed convolution"
    down,up = nn.Conv2d(3,32,3, stride=2, padding=1),nn.ConvTranspose2d(64,32,2, stride=2)
    return nn.Sequential(down, nn.ReLU(), nn.Conv2d(32,64,3, padding=1), nn.ReLU(), up), torch.randn(2,3,16,16)
def video():
    return nn.Sequential(nn.Conv3d(3,32,3, padding=1), nn.ReLU(), nn.Conv3d(32,32,3, stride=2)), torch.randn(2,3,6,8,8)
def sound():
    return nn.Sequential(nn.Conv1d(4,32,5, stride=2), nn.ReLU(), nn.ConvTranspose1d(32,32,4, stride=2)), torch.randn(2,4,40)

@pytest.mark.parametrize('make,sparsity,block_size', [
    (swin,.9,16), (timm_vit,.9,16), (timm_mixer,.9,16), (gpt2,.8,16), (bert,.8,16), (llama,.8,16),
    (unet,.7,16), (video,.7,16), (sound,.6,16), (gpt2,.8,0), (unet,.7,0),
    (resnet18,.9,16), (bottlenecks,.9,16), (vit,.9,16), (convnext_tiny,.9,16), (encoder,.9,16),
    (mobilenet_v3_small,.8,16), # its depthwise and small layers are more than a tenth of it
    (resnet18,.9,0), (mobilenet_v3_small,.9,0), (encoder,.9,0)])
def test_one_training_step(make, sparsity, block_size):
    torch.manual_seed(0)
    model,x = make()
    attentions = sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    modules = len(list(model.modules())) + 3*attentions      # three more projections are layers
    dsb.sparsify(model, sparsity, block_size)
    s = dsb.summary(model)
    assert abs(s.active-(1-sparsity)*s.size) <= max(block_size**2, 1), s
    assert len(list(model.modules()))==modules
    assert all(r.note for r in s.rows if r.kind=='dense'), 'a layer stayed dense and nobody says why'
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9)
    upd = dsb.Updater(model, opt, method='dsb' if block_size else 'rigl', T=1, T_end=10)
    before = [p.detach().clone() for p in model.parameters()]
    (model(x)-1).square().mean().backward(); opt.step(); opt.zero_grad()
    report = upd.step()
    assert report.total('planned')>0 and dsb.summary(model).active==s.active
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a,b) for a,b in zip(before, model.parameters()))

@pytest.mark.parametrize('make', [resnet18, encoder, mobilenet_v3_small, swin, gpt2, unet, video, sound],
                         ids=lambda f: f.__name__)
def test_densify_computes_the_same(make):
    torch.manual_seed(0)
    model,x = make()
    dsb.sparsify(model, .7, 8).eval()
    plain = dsb.densify(model).eval()
    assert not dsb.sparse_layers(plain)
    assert {type(m) for m in plain.modules()} <= {type(m) for m in make()[0].modules()}
    with torch.no_grad(): torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)

def test_encoder_in_evaluation_mode():
    "TransformerEncoderLayer hands the weights of its layers to a fused kernel when nothing is trained"
    torch.manual_seed(0)
    model,x = encoder()
    dsb.sparsify(model, .7, 8).eval()
    with torch.no_grad(): fused = model(x)
    torch.testing.assert_close(fused, model(x).detach(), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('mode', ['train', 'eval', 'eval, no gradients', 'eval, compiled'])
def test_attention_is_not_passed_by(mode):
    "torch's encoder has shortcuts that read the weights and pass by the layers; each sparse layer computes all the same"
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0., batch_first=True)
    model = dsb.sparsify(nn.TransformerEncoder(layer, 2), .7, 8).train(mode=='train')
    plain,seen = dsb.densify(model),[]
    assert type(plain.layers[0].self_attn) is nn.MultiheadAttention
    x,pad = torch.randn(3,7,64),torch.arange(7)>torch.tensor([6,3,5])[:,None]
    with torch.set_grad_enabled(mode in ('train','eval')):
        f = torch.compile(model, backend='aot_eager') if 'compiled' in mode else model
        for given in dict(), dict(src_key_padding_mask=pad):
            torch.backends.mha.set_fastpath_enabled(False)
            try: want = plain(x, **given)
            finally: torch.backends.mha.set_fastpath_enabled(True)
            torch.testing.assert_close(f(x, **given), want, rtol=1e-4, atol=1e-4)
        if 'compiled' in mode: return
        for m in dsb.sparse_layers(model).values(): m.register_forward_hook(lambda m,*_: seen.append(m))
        model(x, src_key_padding_mask=pad)
    assert len(seen)==len(dsb.sparse_layers(model))>6

def test_a_whole_transformer():
    "Encoder and decoder, masks, training with updates, and back"
    torch.manual_seed(0)
    model = dsb.sparsify(nn.Transformer(32, 4, 1, 2, 64, 0., batch_first=True), .6, 8)
    assert len(dsb.sparse_layers(model))>=20 and not dsb.summary(model).others
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    upd = dsb.Updater(model, opt, T=2, T_end=100, rule='columns')
    a,b,later = torch.randn(4,9,32),torch.randn(4,5,32),nn.Transformer.generate_square_subsequent_mask(5)
    first = {n:m.mask() for n,m in dsb.sparse_layers(model).items()}
    for _ in range(6):
        loss = (model(a, b, tgt_mask=later, tgt_is_causal=True)-1).square().mean()
        loss.backward(); opt.step(); opt.zero_grad(); upd.step()
    moved = [n for n,m in dsb.sparse_layers(model).items() if not torch.equal(m.mask(), first[n])]
    assert any('q_proj' in n for n in moved) and any('out_proj' in n for n in moved)
    with torch.no_grad():
        torch.testing.assert_close(dsb.densify(model)(a, b, tgt_mask=later), model(a, b, tgt_mask=later), rtol=1e-4, atol=1e-4)

def test_subclasses_when_asked():
    "timm's convolution with standardised weights stays what it is, keeps its own forward, and becomes sparse with `also`"
    layers = pytest.importorskip('timm.layers', reason='timm is not installed')
    torch.manual_seed(0)
    model,x = nn.Sequential(layers.StdConv2d(16, 32, 3), nn.Conv2d(32, 32, 3)),torch.randn(2,16,8,8)
    why = [why for _,why in dsb.summary(dsb.sparsify(copy.deepcopy(model), .5)).others.values()]
    assert len(why)==1 and 'also=nn.Conv2d' in why[0]
    sparse = dsb.sparsify(copy.deepcopy(model), .5, also=nn.Conv2d)
    assert isinstance(sparse[0], layers.StdConv2d) and len(dsb.sparse_layers(sparse))==2
    plain = dsb.densify(sparse)
    assert type(plain[0]) is layers.StdConv2d
    torch.testing.assert_close(sparse(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse[0](x), nn.functional.conv2d(x, sparse[0].dense_weight(), sparse[0].bias, padding=1))
    sparse(x).sum().backward()
    assert sparse[0].values.grad.abs().sum()>0
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))

def test_complex_numbers_are_refused():
    "Complex weights stay dense and are named; a complex input meets torch's own kind of error"
    m = dsb.sparsify(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, dtype=torch.cfloat)), .4, 8)
    assert [r.note for r in dsb.summary(m).rows if r.kind=='dense']==['its weight is complex64']
    for B in (8, 0):
        with pytest.raises(RuntimeError, match='dtype|type'): dsb.sparsify(nn.Linear(32, 32), .5, B)(torch.ones(2,32).cfloat())

def test_hooks_stay():
    "Hooks on a layer that becomes sparse keep working"
    model,seen = nn.Sequential(nn.Linear(64,64)),[]
    model[0].register_forward_hook(lambda m,i,o: seen.append(o.shape))
    dsb.sparsify(model, .5)
    model(torch.randn(3,64))
    assert seen==[(3,64)]

@pytest.mark.parametrize('name,B', [('wrn-22-2',16), ('vgg-d',16)])
def test_memory_is_compact(name, B):
    "Parameters, gradients and momentum of the linear and convolution weights at sparsity 0.9, beside the dense ones"
    from dsb.training.models import create_model
    def state_bytes(model, opt):
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, dsb.layers.SparseLayer))]
        weights = [getattr(m, 'values', None) if isinstance(m, dsb.layers.SparseLayer) else m.weight for m in layers]
        return sum(t.numel()*t.element_size() for w in weights for t in (w, w.grad, opt.state[w]['momentum_buffer']))
    def after_a_step(model):
        opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
        model(torch.randn(2,3,32,32)).sum().backward(); opt.step()
        return state_bytes(model, opt)
    dense = after_a_step(create_model(name, 10))
    model = dsb.sparsify(create_model(name, 10), .9, B)
    sparse,index = after_a_step(model), sum(m.structure.nbytes for m in dsb.sparse_layers(model).values())
    assert sparse <= .13*dense and index <= .1*sparse, (sparse/dense, index/sparse)

FALLS_BACK = '''
import sys, torch, dsb
class Net(torch.nn.Sequential): pass
net = Net(*(torch.nn.Linear(32, 32) for _ in range(3)))
dsb.sparsify(net, .5, int(sys.argv[1]))
with dsb.backend(sys.argv[2]):
    for _ in range(2): net(torch.ones(4, 32)).sum().backward()
net.double()
for _ in range(2): net(torch.ones(4, 32).double()).sum().backward()
'''

def falls_back(block_size, backend, *options):
    "A process in which three layers compute, forward and backward, twice in float32, then twice in float64"
    import subprocess, sys
    p = subprocess.run([sys.executable, *options, '-c', FALLS_BACK, str(block_size), backend], capture_output=True, text=True)
    return p.returncode, [l for l in p.stderr.splitlines() if 'computed by plain torch' in l]

def test_falling_back_is_said_once():
    "One warning for each reason, none for what was asked for; it can be made an error"
    from dsb.kernels.cpu import native
    if native()[1]: pytest.skip(native()[1])
    status, said = falls_back(16, 'auto')
    assert status==0 and len(said)==1 and 'float64' in said[0]
    status, said = falls_back(4, 'auto')
    assert status==0 and len(said)==2 and 'blocks of 8' in said[0]
    assert falls_back(4, 'auto', '-W', 'error::UserWarning')[0]==1
    assert 'blocks of 8' not in ''.join(falls_back(4, 'reference')[1])

def test_summary_says_numbers_and_kernels():
    from dsb.kernels.cpu import native
    net = dsb.sparsify(nn.Sequential(nn.Linear(32,32), nn.Linear(32,32)), .5, dense='1')
    def computed(): return dsb.summary(net).computed()
    plain = 'plain torch, slow' if native()[1] else 'native kernels ('
    assert computed().startswith('Computed in float32: 1 layer by '+plain) and computed().endswith('1 layer by torch')
    with torch.autocast('cpu', torch.bfloat16): assert computed().startswith('Computed in bfloat16 by autocast: ')
    net.bfloat16()
    assert computed().startswith('Computed in bfloat16: ') and str(dsb.summary(net)).endswith(computed())
    assert computed() in dsb.summary(net)._repr_markdown_()
    with dsb.backend('reference'): assert 'plain torch, slow' in computed()
