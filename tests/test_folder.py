"Files are written whole or not at all; weights say what network they are for, and which classes it knows"
import os, stat
import pytest, torch
from advmix.folder import Run, save_model
from advmix.generator import AdAutoMixGenerator
from advmix.models import get_model
from advmix.weights import from_pretrained

spec = dict(arch='convnet_s', n_classes=3, c_in=1, size=8)

def test_weights_round_trip_with_their_classes(tmp_path):
    net = get_model(**spec).eval()
    save_model(net, tmp_path/'m.safetensors', vocab=['a','b','c'], **spec)
    got,vocab = from_pretrained(tmp_path/'m.safetensors', vocab=True)
    x = torch.rand(4,1,8,8)
    assert list(vocab)==['a','b','c'] and torch.equal(got(x), net(x)) and not got.training

def test_files_are_readable_as_umask_says(tmp_path):
    old = os.umask(0o022)
    try: Run.write_file(tmp_path/'a.txt', 'text')
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path/'a.txt').stat().st_mode)==0o644 and (tmp_path/'a.txt').read_text()=='text'
    assert [p.name for p in tmp_path.iterdir()]==['a.txt']

def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json'): Run(tmp_path)

def test_what_further_processes_leave_is_cleared_away_and_nothing_else(tmp_path):
    "AutoAttack's state is one file for each process"
    from advmix.config import Config
    r = Run(tmp_path/'r', Config())
    mine = {'autoattack-mine.pth', 'autoattacks.pth', 'autoattack_ema-1.txt'}
    for force in (False, True):
        r.folder.mkdir(exist_ok=True)
        for name in mine|{'autoattack-1.pth', 'autoattack_ema-12.pth', 'checkpoint.pth'}: (r.folder/name).write_text('')
        if force: r._delete()
        else: r.tidy()
        assert {p.name for p in r.folder.iterdir()}==mine

def test_what_was_trained_beside_the_network_comes_back(tmp_path):
    net,gen = get_model(**spec).eval(),AdAutoMixGenerator(32, n_mix=2)
    path = tmp_path/'m.safetensors'
    save_model(net, path, beside=dict(generator=gen.state_dict(), student=net.state_dict()), about=dict(generator=dict(n_mix=2)), **spec)
    got = from_pretrained(path)
    assert got.vocab is None and got.about==dict(generator=dict(n_mix=2)) and set(got.beside)=={'generator','student'}
    for k,v in gen.state_dict().items(): assert torch.equal(got.beside['generator'][k], v)
    same = AdAutoMixGenerator.from_pretrained(path)
    for a,b in zip(same.parameters(), gen.parameters()): assert torch.equal(a, b) and a.requires_grad
    assert same.n_mix==(2,) and AdAutoMixGenerator.from_pretrained(path, n_mix=3).n_mix==(3,)   # what is said here wins
