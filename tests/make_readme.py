"Render nbs/index.ipynb as README.md, with the gallery of the tutorial which_mix: python tests/make_readme.py"
import base64, re
from pathlib import Path
from execnb.nbio import read_nb

root = Path(__file__).resolve().parents[1]

def output(o, stem):
    "One output of a cell as markdown, and the picture it needs"
    data = o.get('data', {})
    text = lambda v: ''.join(v).rstrip()
    if 'image/png' in data: return f'![](nbs/images/{stem}.png)', base64.b64decode(text(data['image/png']))
    if 'text/markdown' in data: return text(data['text/markdown']), None
    if o.get('name')=='stderr': return '', None
    plain = text(o.get('text', data.get('text/plain', '')))
    return (f'```\n{plain}\n```' if plain else ''), None

def render(nb):
    "Markdown of a notebook and its pictures, `(str, {name: bytes})`"
    parts,pics = [],{}
    for i,c in enumerate(nb.cells):
        src,flags = c.source.strip(),re.findall(r'^#\| *(.+)$', c.source, re.M)
        if c.cell_type=='markdown': parts.append(re.sub(r'\]\((?=images/|[\w/]+\.ipynb)', '](nbs/', src))
        if c.cell_type!='code' or 'hide' in flags: continue
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        shell = src.startswith('!')
        if src and 'echo: false' not in flags:
            parts.append(f'```bash\n{src[1:].strip()}\n```' if shell else f'```python\n{src}\n```')
        for j,o in enumerate(c.get('outputs', [])):
            md,png = output(o, f'index_{c.id}_{j}')
            parts += [md] if md else []
            if png: pics[f'index_{c.id}_{j}.png'] = png
    return '\n\n'.join(parts)+'\n', pics

def gallery():
    "The first picture of the tutorial which_mix: every mix on the same two photographs"
    outputs = [o for c in read_nb(root/'nbs/tutorials/which_mix.ipynb').cells for o in c.get('outputs', [])]
    pngs = [o['data']['image/png'] for o in outputs if 'image/png' in o.get('data', {})]
    return base64.b64decode(''.join(pngs[0]))

if __name__=='__main__':
    text,pics = render(read_nb(root/'nbs/index.ipynb'))
    (root/'README.md').write_text(text, encoding='utf-8')
    images = root/'nbs/images'
    images.mkdir(exist_ok=True)
    for p in images.glob('index_*.png'): p.unlink()
    for name,png in dict(pics, **{'gallery.png': gallery()}).items(): (images/name).write_bytes(png)
