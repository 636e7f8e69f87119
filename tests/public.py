"Every public object of the library, for tests that run in a process of their own"
import importlib, pkgutil

def public():
    "Module, name and object of each callable that a module exports"
    import advmix
    for m in pkgutil.iter_modules(advmix.__path__):
        if m.name.startswith('_'): continue
        mod = importlib.import_module('advmix.'+m.name)
        for name in mod.__all__:
            if callable(getattr(mod, name)): yield mod,name,getattr(mod, name)
