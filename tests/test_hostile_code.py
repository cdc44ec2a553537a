"""What the packages' code never does: unpickle, evaluate text, or start a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "eplb_core").rglob("*.py"), *(ROOT / "eplb_torch").rglob("*.py")])
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput")}
OBJECTS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"}
UNSAFE = {"unsafe_load", "full_load", "UnsafeLoader", "FullLoader"}


def offences(tree: ast.AST) -> list[str]:
    """What a module's code must not do, each as `line: what`."""
    return [f"{node.lineno}: {what}" for node in ast.walk(tree) for what in _offences(node)]


def _offences(node: ast.AST):
    if isinstance(node, ast.Import):
        yield from (f"import {a.name}" for a in node.names if a.name.partition(".")[0] in MODULES)
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
        yield f"from {node.module} import"
    if isinstance(node, ast.Name) and node.id in BUILTINS:
        yield node.id
    if isinstance(node, ast.Attribute):
        yield from (f".{node.attr}" for _ in (1,) if node.attr in UNSAFE | OBJECTS)
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in SHELLS:
            yield f"{node.value.id}.{node.attr}"
    if isinstance(node, ast.Call):
        yield from _call_offences(node)


def _call_offences(call: ast.Call):
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for name in ("shell", "allow_pickle", "trust_remote_code"):
        if name in given and not (isinstance(given[name], ast.Constant) and given[name].value is False):
            yield f"{name}={ast.unparse(given[name])}"
    called = ast.unparse(call.func)
    if called in ("torch.load", "load_file") or called.endswith(".torch.load"):
        safe = given.get("weights_only")
        if not (isinstance(safe, ast.Constant) and safe.value is True):
            yield "torch.load without weights_only=True"
    if called in ("np.load", "numpy.load", "np.fromfile", "np.memmap"):
        yield f"{called}, which trusts a header"
    if called == "yaml.load" and "Loader" not in given:
        yield "yaml.load without a loader"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_code_comes_from_data(path):
    found = offences(ast.parse(path.read_text()))
    if "demo" in path.parts:  # its ranks are processes of one program, and torch pickles what they tell each other
        found = [what for what in found if what.partition(".")[2] not in OBJECTS]
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import shelve",
        "eval(text)",
        "exec(text)",
        "run = eval",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "dist.broadcast_object_list(objects)",
    ],
)
def test_each_of_these_would_be_found(code):
    assert offences(ast.parse(code))


def test_what_is_harmless_is_not_found():
    code = "torch.load(file, weights_only=True)\nnp.lib.format.write_array(f, a, allow_pickle=False)\nmodel.eval()"
    assert not offences(ast.parse(code))
