"Files are written whole or not at all; weights say what network they are for, and which classes it knows"
import os, stat
import pytest, torch
from advmix.folder import Run, load_model, save_model
from advmix.models import get_model

spec = dict(arch='convnet_s', n_classes=3, c_in=1, size=8)

def test_weights_round_trip_with_their_classes(tmp_path):
    net = get_model(**spec).eval()
    save_model(net, tmp_path/'m.safetensors', vocab=['a','b','c'], **spec)
    got,vocab = load_model(tmp_path/'m.safetensors', vocab=True)
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
