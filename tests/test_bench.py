"dsb bench: small runs from end to end, what they write, and what is refused before anything is measured"
import json, re, subprocess, sys
from pathlib import Path
import pytest
import torch
from dsb.cli import main
from dsb.structure.rules import RULES

LAYERS = 'bench layers --batch 2 --repeats 1 --numbers float32 --no_compile'.split()
STEP = ('bench step --model wrn-10-1 --distribution uniform --density .2 --batch 2 --repeats 1 --numbers float32 '
        '--no_compile').split()
UPDATE = 'bench update --quick --model wrn-10-1 --distribution uniform --density .2 --batch 2'.split()

def bench(capsys, tmp_path, words):
    "(what was printed, what was written) by a run that must succeed"
    assert main([*words, '--json', str(tmp_path/'out.json')]) == 0
    printed = capsys.readouterr().out
    assert [o.name for o in tmp_path.iterdir() if o.suffix != '.png'] == ['out.json']
    return printed, json.loads((tmp_path/'out.json').read_text())

def refused(capsys, words):
    "The one line on stderr with which a wrong argument ends"
    with pytest.raises(SystemExit) as e: main(words)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ''
    assert err.count('\n') == 1 and err.startswith('dsb: error: '), err
    return err

def check_report(report):
    m = report['machine']
    assert m['processor'] and m['torch'] == torch.__version__ and m['threads'] >= 1 and m['cores'] >= 1
    assert {'python', 'dsb', 'date', 'load', 'huge_pages', 'memory_kept', 'peak_gflops', 'peak_gflops_end'} <= set(m)
    assert set(m['flags']) <= {'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'asimd', 'bf16'} and m['numbers']
    assert report['options'].get('no_compile') is None or any('torch.compile' in n for n in report['notes'])

def test_layers(capsys, tmp_path):
    words = [*LAYERS, '--layers', '3x3:16@4,1x1:16x24@5/2n1,linear:32x16', '--density', '.2,.5', '--format', 'both',
             '--plot', str(tmp_path/'p.png')]
    printed, report = bench(capsys, tmp_path, words)
    check_report(report)
    rows = report['results']
    assert len(rows) == (2 + 2 + 1)*2*4 and (tmp_path/'p.png').read_bytes()[:4] == b'\x89PNG'
    for r in rows:
        assert r['q1'] <= r['ms'] <= r['q3'] and r['ms'] > 0 and r['n'] >= 1 and 0 < r['density'] <= 1
        assert r['gflops'] == pytest.approx(r['flops']/r['ms']/1e6)
        assert r['share'] is None or r['share'] == pytest.approx(r['gflops']/r['peak_gflops'])
        assert r['dense_ms'] == min(d['ms'] for d in r['dense'].values()) == r['dense'][r['best_dense']]['ms']
        assert r['ratio'] == pytest.approx(r['dense_ms']/r['ms'])
        assert r['ratio_over_flops'] == pytest.approx(r['ratio']*r['density'])
        for p in r['peers'].values(): assert p['ratio'] == pytest.approx(p['ms']/r['ms'])
        fits = r['product'] == 'forward' and r['layer'] != '1x1:16x24@5/2n1'
        assert 'plain' in r['peers'] and ('bsr' in r['peers']) == fits
    lines = [l for l in printed.splitlines() if re.match(r'\dx\d:|linear:', l)]
    assert len(lines) == len(rows)
    for line, r in zip(lines, rows):
        assert line.startswith(r['layer']) and r['product'] in line and r['best_dense'] in line
        assert 'nchw ' in line or r['format'] != 'nchw'

def test_work_is_counted_by_hand(capsys, tmp_path):
    words = [*LAYERS, '--layers', '3x3:16@4', '--block_size', '8', '--density', '1']
    rows = bench(capsys, tmp_path, words)[1]['results']
    assert [r['flops'] for r in rows] == [2*16*144*2*16]*3 + [4*16*144*2*16]
    assert [r['density'] for r in rows] == [1]*4

def test_step(capsys, tmp_path):
    words = [*STEP, '--distribution', 'uniform,erk', '--density', '.2,.4', '--format', 'both',
             '--plot', str(tmp_path/'p.png')]
    printed, report = bench(capsys, tmp_path, words)
    check_report(report)
    r, = report['results']
    assert set(r['qualifying']) == {'nchw', 'channels_last'} and (tmp_path/'p.png').exists()
    qualified = r['dense'].keys() - {'fused'}
    assert qualified and qualified <= r['qualifying'].keys() and 'fused' in r['dense']
    assert r['dense_ms'] == min(r['dense'][m]['ms'] for m in qualified) and 0 < r['conv_share'] < 1
    assert 'any_ms' not in r and 'bfloat16 was not measured: --numbers float32,bfloat16' in printed
    cases = [(d, x, f) for d in ('uniform', 'erk') for x in (.2, .4) for f in ('nchw', 'channels_last')]
    assert [(s['distribution'], s['density'], s['format']) for s in r['sparse']] == cases
    for s in r['sparse']:
        assert s['q1'] <= s['ms'] <= s['q3'] and s['n'] == 2 and s['faults'] >= 0
        assert s['ratio'] == pytest.approx(r['dense_ms']/s['ms'])
        assert s['of_bound'] == pytest.approx(s['ratio']/s['bound_ratio'])
        eager = r['dense'][r['best_eager']]['ms']
        assert s['bound_ms'] == pytest.approx(eager*(1 - r['conv_share']*(1 - s['flop_share'])))
        assert sum(s['shares'].values()) == pytest.approx(1) and s['shares']['sparse kernels'] > 0
        assert f"{s['ms']:.1f}" in printed
    uniform, erk = (next(s['flop_share'] for s in r['sparse'] if s['distribution'] == d) for d in ('uniform', 'erk'))
    assert .2 < uniform < .5 and erk > uniform       # small layers, which do much of the work, stay denser

def test_step_plain(capsys, tmp_path):
    printed, report = bench(capsys, tmp_path, [*STEP, '--no_fuse'])
    assert 'fused' not in printed and set(report['results'][0]['dense']) <= {'nchw', 'channels_last'}
    assert report['results'][0]['sparse'][0]['shares']['normalisation'] > 0

BOTH = ['--numbers', 'float32,bfloat16']

def test_step_in_both_numbers(capsys, tmp_path):
    "A record for each kind, the fastest dense of any named, ratios to both"
    printed, report = bench(capsys, tmp_path, [*STEP, *BOTH, '--plot', str(tmp_path/'p.png')])
    check_report(report)
    records = report['results']
    assert [r['numbers'] for r in records] == report['machine']['numbers'] == ['float32', 'bfloat16']
    best = min(records, key=lambda r: r['dense_ms'])
    for r in records:
        assert (r['any_ms'], r['any_dense']) == (best['dense_ms'], f"{best['best_dense']} {best['numbers']}")
        for s in r['sparse']:
            assert s['ratio'] == pytest.approx(r['dense_ms']/s['ms'])
            assert s['ratio_any'] == pytest.approx(best['dense_ms']/s['ms'])
        assert f"wrn-10-1, batch 2, {r['numbers']}" in printed
    assert f"fastest dense of all: {best['any_dense']}" in printed
    assert 'not measured' not in printed

def test_layers_in_both_numbers(capsys, tmp_path):
    printed, report = bench(capsys, tmp_path, [*LAYERS, *BOTH, '--layers', '3x3:16@4', '--plot', str(tmp_path/'p.png')])
    rows = report['results']
    assert [r['numbers'] for r in rows] == ['float32']*4 + ['bfloat16']*4
    for p in {r['product'] for r in rows}:
        two = [r for r in rows if r['product'] == p]
        least = min(two, key=lambda r: r['dense_ms'])
        assert {r['any_ms'] for r in two} == {least['dense_ms']}
        assert {r['any_dense'] for r in two} == {f"{least['best_dense']} {least['numbers']}"}
        for r in two: assert r['ratio_any'] == pytest.approx(r['any_ms']/r['ms'])
    assert sum(' bfloat16 ' in l and l.startswith('3x3:16@4') for l in printed.splitlines()) >= 4

def test_numbers_that_fail(capsys, tmp_path, monkeypatch):
    "A dense candidate that fails is named with its reason; where no dense one is left, that ends it"
    from dsb.bench.steps import Step
    plain, bad = Step.train, [torch.channels_last]
    def train(self):
        formats = [f for f in bad if self.half and self.x.is_contiguous(memory_format=f)]
        if formats and not any('values' in n for n, _ in self.model.named_parameters()): raise RuntimeError('no bf16')
        plain(self)
    monkeypatch.setattr(Step, 'train', train)
    printed, report = bench(capsys, tmp_path, [*STEP, *BOTH, '--no_fuse'])
    assert 'note: wrn-10-1: bfloat16 dense channels_last was left out: RuntimeError: no bf16' in printed
    assert list(report['results'][1]['dense']) == ['nchw'] and report['results'][1]['qualifying'] == {}
    bad.append(torch.contiguous_format)
    with pytest.raises(RuntimeError, match='wrn-10-1: RuntimeError: no bf16'): main([*STEP, *BOTH, '--no_fuse'])

@pytest.mark.parametrize('features, kinds', [('avx2 avx512f', ['float32']), ('avx512f avx512_bf16', ['float32', 'bfloat16']),
                                             ('avx2 amx_bf16', ['float32', 'bfloat16'])])
def test_numbers_by_default(features, kinds, capsys, tmp_path, monkeypatch):
    "What the processor can multiply is measured, and the report says what was and what was not"
    monkeypatch.setattr('dsb.bench.timing.cpu_features', lambda: features)
    words = [w for w in LAYERS if w not in ('--numbers', 'float32')]
    printed, report = bench(capsys, tmp_path, [*words, '--layers', 'linear:16x16'])
    assert report['options']['numbers'] == kinds and f"numbers: {', '.join(kinds)}; " in printed
    assert ('bfloat16 was not measured: --numbers float32,bfloat16 measures both' in printed) == (len(kinds) == 1)
    assert report['machine']['flags'] == features.split()

def test_update(capsys, tmp_path):
    "Times that fit together, the worst layers, and one line for each rule and way to grow"
    words = [*UPDATE, '--grow', 'gradient,norm,random', '--part', '1,.5', '--T', '10', '--plot', str(tmp_path/'p.png')]
    printed, report = bench(capsys, tmp_path, words)
    check_report(report)
    r, = report['results']
    assert (r['model'], r['T'], r['batch'], r['fused']) == ('wrn-10-1', 10, 2, True) and (tmp_path/'p.png').exists()
    ways = ('gradient', 1), ('gradient', .5), ('norm', 1), ('random', 1)
    ways = [(u, g, p) for u in RULES for g, p in ways]
    assert [(u['rule'], u['grow'], u['part']) for u in r['updates']] == ways
    for u in r['updates']:
        assert u['q1'] <= u['ms'] <= u['q3'] and u['n'] == 2
        assert u['step_ms'] > 0 and u['plain_ms'] > 0 and 0 <= u['changed'] < 1
        assert (u['collector_ms'] > 0) == ('collector' in u['memory']) == (u['grow'] != 'random')
        worst = [u['memory'][p] for p in ('collector', 'update') if p in u['memory']]
        for w in worst:
            assert w['granted'] == 6*w['rows']*w['columns'] + 4*w['rows']**2 and w['peak'] > 0
            assert w['arrays'] == pytest.approx(max(0, w['peak'] - w['granted'])/4/w['active'])
        assert min(u['memory']['armed'], u['memory']['plain']) > 0 and any(w['layer'] in printed for w in worst)
    lines = [l for l in printed.splitlines() if re.match(f"({'|'.join(RULES)}), ", l)]
    assert len(lines) == len(ways) and 'columns, gradient of 0.5' in printed and 'a plain step of 2 images' in printed

def test_threads_are_given_back(capsys, tmp_path):
    before = torch.get_num_threads()
    report = bench(capsys, tmp_path, [*LAYERS, '--layers', 'linear:16x16', '--threads', '1'])[1]
    assert report['machine']['threads'] == 1
    assert torch.get_num_threads() == before

def test_compile_that_fails(capsys, tmp_path, monkeypatch):
    "The reason is said, and the rest is measured"
    def broken(f): raise RuntimeError('no compiler\nfor this')
    monkeypatch.setattr(torch, 'compile', lambda f, **options: lambda *args: broken(f))
    printed, report = bench(capsys, tmp_path, STEP[:-1])
    assert 'note: wrn-10-1: float32 dense compiled was left out: RuntimeError: no compiler for this' in printed
    assert 'compiled' not in report['results'][0]['dense']
    printed, report = bench(capsys, tmp_path, [*LAYERS[:-1], '--layers', 'linear:16x16'])
    assert 'linear:16x16: float32 dense compiled forward was left out: RuntimeError: no compiler for this' in printed
    assert len(report['results']) == 4

def test_without_a_peak(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('dsb.bench.timing.peak_library', lambda: None)
    printed, report = bench(capsys, tmp_path, [*LAYERS, '--layers', 'linear:16x16'])
    assert 'no register peak' in printed and {r['share'] for r in report['results']} == {None}

def test_without_native_kernels(capsys, tmp_path):
    printed, report = bench(capsys, tmp_path, [*LAYERS, '--layers', 'linear:16x16', '--block_size', '4'])
    assert 'note: the sparse side is plain torch: the cpu kernels take blocks of 8, 16, 32 or 64 rows, not 4' in printed

@pytest.mark.parametrize('words, says', [
    ('bench fast', "unknown command 'bench fast': expected bench layers, bench step, bench update"),
    ('bench layers --layers 3x3:64', "layer '3x3:64': expected KxK:CHANNELS@SIZE"),
    ('bench layers --layers 3x3:8@4', 'choose a smaller --block_size'),
    ('bench layers --layers 5x3:32@0', "layer '5x3:32@0': expected"),
    ('bench layers --batch 0', 'batch=0: expected a whole number, at least 1'),
    ('bench layers --batch few', "argument --batch: invalid int value: 'few'"),
    ('bench layers --threads -1', 'threads=-1: expected'),
    ('bench layers --block_size 0', 'block_size=0: expected'),
    ('bench step --repeats 0', 'repeats=0: expected'),
    ('bench step --density 10', "density='10': expected shares of active weights in (0, 1]"),
    ('bench step --density .1,', "density='.1,': expected"),
    ('bench step --density .001', 'wrn-22-2, uniform, density 0.001: '),
    ('bench step --distribution rek', "distribution='rek': expected one of uniform, er, erk; did you mean 'erk'?"),
    ('bench step --format nhwc', "format='nhwc': expected one of nchw, channels_last, both; did you mean 'nchw'?"),
    ('bench step --model wrn-23-2', 'did you mean wrn-22-2?'),
    ('bench step --numbers bf16', "numbers='bf16': expected one of float32, bfloat16; did you mean 'bfloat16'?"),
    ('bench layers --numbers float32,', "numbers='': expected one of float32, bfloat16"),
    ('bench update --numbers float32', 'unknown option --numbers'),
    ('bench step --modle vgg-d', 'unknown option --modle; did you mean --model?'),
    ('bench step --layers 3x3:64@8', 'unknown option --layers'),
    ('bench update --rule rigl', "rule='rigl': expected one of paper, "),
    ('bench update --rules paper', 'unknown option --rules; did you mean --rule?'),
    ('bench update --grow norms', "grow='norms': expected one of gradient, norm, random; did you mean 'norm'?"),
    ('bench update --part 0', "part='0': expected shares of the batch in (0, 1]"),
    ('bench update --T 0', 'T=0: expected a whole number, at least 1'),
    ('bench update --no_compile', 'unknown option --no_compile'),
    ('bench update --density .001', 'wrn-22-2, erk, density 0.001: '),
    ('bench inference --batch 1,none', "batch='1,none': expected numbers of images, separated by commas"),
    ('bench inference --batch 0', "batch='0': expected numbers of images"),
    ('bench inference --repeats 0', 'repeats=0: expected a whole number, at least 1'),
    ('bench inference --density 2', "density='2': expected shares of active weights"),
    ('bench inference --model wrn-23-2', 'did you mean wrn-22-2?'),
    ('bench inference --format nchw', 'unknown option --format'),
    ('bench gpu --device cpu --repeats 0', 'repeats=0: expected a whole number, at least 1'),
    ('bench gpu --device cpu --density 2', "density='2': expected shares of active weights"),
    ('bench gpu --device cpu --format nhwc', "format='nhwc': expected one of nchw, channels_last, both; did you mean 'nchw'?"),
    ('bench gpu --device cpu --block_size 12', "block_size='12': expected one of 8, 16, 32, 64"),
    ('bench layers --json /proc/dsb.json', 'cannot write to --json /proc/dsb.json: '),
    ('bench layers --plot picture.txt', 'cannot write to --plot picture.txt: expected a name that ends in .png'),
])
def test_refused(words, says, capsys):
    assert says in refused(capsys, words.split())

def test_refused_files(capsys, tmp_path):
    assert 'it is a folder' in refused(capsys, [*LAYERS, '--json', str(tmp_path)])
    nowhere = str(tmp_path/'no/where.json')
    assert 'choose a file in a folder that can be written to' in refused(capsys, [*LAYERS, '--json', nowhere])

def test_interrupted(capsys, tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr('dsb.bench.layers.measure_layer', stop)
    assert main([*LAYERS, '--json', str(tmp_path/'a.json')]) == 130
    assert not list(tmp_path.iterdir()) and 'nothing was written' in capsys.readouterr().err

def test_the_table_of_commands_is_light():
    "The commands can be listed without torch, which comes with the one that is wanted"
    alone = "import sys, types; m = types.ModuleType('dsb'); m.__path__ = ['dsb']; sys.modules['dsb'] = m; " \
            "from dsb.bench.jobs import JOBS; assert 'torch' not in sys.modules; print(*JOBS)"
    p = subprocess.run([sys.executable, '-c', alone], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert p.stdout.split() == ['layers', 'step', 'update', 'inference', 'gpu'], p.stderr

INFERENCE = 'bench inference --quick --model wrn-10-1 --density .3 --repeats 1'.split()

def test_inference(capsys, tmp_path):
    "Every way takes part or is named, in both kinds of numbers, and every sparse line has its ratios"
    words = [*INFERENCE, '--batch', '1,3', '--numbers', 'float32,bfloat16', '--plot', str(tmp_path/'p.png')]
    printed, report = bench(capsys, tmp_path, words)
    assert [r['batch'] for r in report['results']] == [1, 3] and (tmp_path/'p.png').stat().st_size
    for r in report['results']:
        ways = {(o['numbers'], o['way']) for o in r['dense'] + r['qualifying']}
        assert ways >= {(n, w) for n in ('float32', 'bfloat16') for w in ('nchw', 'channels_last')}
        assert ('float32', 'onnxruntime') in ways or any('onnxruntime took no part' in o for o in report['notes'])
        assert [s['numbers'] for s in r['sparse']] == ['float32', 'bfloat16']
        for s in r['sparse']:
            fastest = min(o['ms'] for o in r['dense'])
            assert s['ratio_any'] == pytest.approx(fastest/s['ms']) and s['ratio'] >= s['ratio_any'] - 1e-9
    assert 'wrn-10-1 32², batch 3' in printed and 'uniform 0.3, bfloat16' in printed

def test_inference_of_wrong_outputs(capsys, monkeypatch):
    "Nothing is timed that does not compute the same"
    monkeypatch.setattr('dsb.bench.inference.fold', lambda m: m.eval().apply(lambda o: o.reset_parameters() if hasattr(o, 'reset_parameters') else None))
    with pytest.raises(RuntimeError, match='gives other outputs'): main([*INFERENCE, '--batch', '1', '--numbers', 'float32', '--no_onnx'])

def test_gpu_on_a_processor(capsys, tmp_path):
    "The command of the GPU, whose report has parts of its own"
    words = 'bench gpu --device cpu --quick --layers 3x3:32@4n2 --models none --format both'.split()
    printed, report = bench(capsys, tmp_path, words)
    assert report['steps'] == [] and {'device', 'ceilings', 'triton'} <= set(report['machine'])
    kinds = [(r['format'], r['numbers']) for r in report['layers'][::4]]
    assert kinds == [('nchw', 'tf32'), ('channels_last', 'tf32')]
    for r in report['layers']:
        assert r['dense_ms'] == min(r['dense'].values()) == r['dense'][r['best_dense']] and 'plain' in r['peers']
        assert r['ratio'] == pytest.approx(r['dense_ms']/r['ms'])
        assert r['of_floor'] == pytest.approx(r['floor_ms']/r['ms'])
    assert printed.startswith('CPU, torch ') and printed.count('3x3:32@4n2') >= len(report['layers']) == 8

def test_help(capsys):
    for words in ('bench', 'bench layers --help', 'bench step -h', 'bench update -h', 'bench inference -h', 'bench gpu -h'):
        try: assert main(words.split()) == 0
        except SystemExit as e: assert e.code == 0
        assert 'usage: dsb bench' in capsys.readouterr().out
