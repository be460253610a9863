"""The direction of imports: a file imports only from files above it in ORDER."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import made_source
from made_source import SOURCE, called_in, dotted_name

# From the top. A line is one level: a file, a whole room ("data."), or several that do not see
# each other. A room's own files may import one another as long as there is no circle.
ORDER = [
    ["__init__"],
    ["errors", "terminal", "numbers"],
    ["files"],
    ["progress"],
    ["config"],
    ["runtime"],
    ["bundle.strict"],
    ["bundle.tensors"],
    ["bundle.terms", "bundle.licence", "bundle.serials", "bundle.limits"],
    ["bundle.manifest"],
    ["bundle.facts", "bundle.signing", "bundle.verified"],
    ["bundle.revocation", "bundle.rotation"],
    ["bundle.trust"],
    ["bundle.refresh"],
    ["bundle.bundle"],
    ["bundle.release"],
    ["data."],
    ["model.statistics", "model.tiles", "model.cache"],
    ["model.onednn"],
    ["model.blend", "model.gradients", "model.panels", "model.router"],
    ["model.packed", "model.lanes", "model.spans"],
    ["model.private_statistics", "model.transformer"],
    ["model.loss", "model.parallel"],
    ["model.shape", "model.groups"],
    ["model.deltas"],
    ["model.moe"],
    ["model.probabilities", "model.untold_rows"],
    ["model.stock", "model.hidden_statistics"],
    ["model.checkpoint"],
    ["model.assemble"],
    ["train.muon", "train.budget", "train.dp_sgd"],
    ["train.loop"],
    ["train.blocks", "train.protect", "train.rows", "train.at_once", "train.first_router"],
    ["train.anchor", "train.compress"],
    ["train.expert"],
    ["train.shrink", "train.plan", "train.count", "train.launch"],
    ["train.rates"],
    ["train.forecast", "train.measure"],
    ["merge.bounds", "merge.index"],
    ["merge.checks", "merge.rollback", "merge.known", "merge.placing"],
    ["merge.modeling_flexolmo"],  # leaves with a checkpoint, and imports nothing of ours
    ["merge.mixture"],
    ["merge.export", "merge.export_code", "merge.lineage"],
    ["merge.importing"],
    ["inference."],
    ["merge.compare"],  # also as a server computes
    ["merge.certificate"],
    ["merge.prove"],
    ["trace."],
    ["serving."],
    ["evaluation."],
    ["audit."],
    ["report."],
    ["research.corpora."],
    ["research.rivals."],
    ["research.steps."],
    ["research.demo."],
    ["research.study."],
    ["research.tasks."],
    ["cli", "cli."],
    ["__main__"],
]
NETWORK = {
    "socket",
    "ssl",
    "urllib",
    "urllib3",
    "http",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "asyncio",
    "huggingface_hub",
    "datasets",
}
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    """`model.moe` for src/flexolmo/model/moe.py, `model` for its __init__."""
    parts = path.relative_to(SOURCE / "flexolmo").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(p): p for p in sorted((SOURCE / "flexolmo").rglob("*.py"))}


def tree_of(name: str) -> ast.Module:
    """The file of this name, parsed."""
    return made_source.tree_of(FILES[name])


@cache
def imported_by(tree: ast.AST) -> set[str]:
    """Every dotted name imported, anywhere in the file, functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def rooms_imported_by(name: str) -> set[str]:
    """Our own files that `name` imports, as keys of FILES."""
    found = set()
    for dotted in imported_by(tree_of(name)):
        parts = dotted.split(".")
        if parts[0] == "flexolmo":
            candidates = [".".join(parts[1:n]) for n in range(len(parts), 1, -1)]
            found |= {next((c for c in candidates if c in FILES), "__init__")}
    return found - {name}


def room_of(name: str) -> str:
    """`model` for `model.moe`."""
    return name.split(".")[0]


def test_only_the_command_line_imports_research():
    """The product stands without what reproduces papers; benchmarks are outside the package."""
    product = [n for n in FILES if room_of(n) not in ("research", "cli")]
    found = {n: {r for r in rooms_imported_by(n) if room_of(r) == "research"} for n in product}
    assert not {n: research for n, research in found.items() if research}
    assert "research" not in FILES["__init__"].read_text()


def level(name: str) -> int:
    """Where `name` stands in ORDER."""
    for i, entries in enumerate(ORDER):
        if any(name == e or (e.endswith(".") and (name + ".").startswith(e)) for e in entries):
            return i
    raise AssertionError(f"src/flexolmo has a file {name} without a place in ORDER; give it one.")


def is_empty_room(name: str) -> bool:
    """A package's __init__ with nothing but a docstring."""
    return FILES[name].name == "__init__.py" and not imported_by(tree_of(name))


def test_a_file_imports_only_from_above():
    wrong = []
    for name in FILES:
        if is_empty_room(name):
            continue
        own = level(name)
        one_room = any((name + ".").startswith(e) for e in ORDER[own] if e.endswith("."))
        for other in rooms_imported_by(name) - {"__init__"}:
            if not (level(other) < own or (level(other) == own and one_room)):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_only_the_package_itself_imports_by_a_name_made_at_run_time():
    """It hands out its interface on first use; anywhere else, that would escape these checks."""
    for name in FILES:
        dynamic = called_in(FILES[name]).keys() & {
            "importlib.import_module",
            "import_module",
            "__import__",
        }
        assert not dynamic or name == "__init__", f"{name}: {dynamic}"


def test_vllm_and_what_is_made_for_it_are_never_imported():
    """They live in another environment, and run in another process."""
    assert not [name for name in FILES if uses(name, {"vllm", "flexolmo_vllm"})]


def test_there_is_no_circle():
    graph = {name: rooms_imported_by(name) for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def uses(name: str, forbidden: set[str]) -> set[str]:
    return {dotted for dotted in imported_by(tree_of(name)) if dotted.split(".")[0] in forbidden}


def test_data_uses_no_network_library():
    assert not [name for name in FILES if room_of(name) == "data" and uses(name, NETWORK)]


def test_data_runs_no_other_program():
    """But for `workers`, whose processes are this very program, and `slurm`, which runs those of
    Slurm where a user asks for it; without a shell."""
    allowed = {"data.workers": {"multiprocessing"}, "data.slurm": {"subprocess"}}
    for name in (n for n in FILES if room_of(n) == "data"):
        found = {d.split(".")[0] for d in uses(name, {"subprocess", "multiprocessing", "pty"})}
        assert found <= allowed.get(name, set()), name
        shells = ("os.system", "os.popen", "os.exec", "os.spawn")
        assert not [c for c in called_in(FILES[name]) if c.startswith(shells)], name


def test_slurm_runs_programs_of_slurm_alone_without_a_shell():
    calls = [ast.unparse(n) for n in ast.walk(tree_of("data.slurm")) if isinstance(n, ast.Call)]
    (run,) = [call for call in calls if call.startswith("subprocess.run(")]
    assert run.startswith("subprocess.run([program, *arguments],") and "shell" not in run
    asked = {call.split(",")[0] for call in calls if call.startswith("_ask(")}
    assert asked == {"_ask('sbatch'", "_ask('squeue'", "_ask('scancel'"}


def unpickling_in(tree: ast.Module) -> list[str]:
    """Lines that could read a pickle, other than imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted_name(node) == "torch.load":
            found.append(f"{node.lineno}: torch.load")
        if isinstance(node, ast.Call) and dotted_name(node.func) in ("np.load", "numpy.load"):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if options.get("allow_pickle") != "False":
                found.append(f"{node.lineno}: a pickle in an array")
    return found


def test_nothing_is_ever_unpickled():
    assert not [name for name in FILES if uses(name, UNPICKLING)]
    assert not [name for name in FILES if "torch.load" in imported_by(tree_of(name))]
    found = {name: unpickling_in(tree_of(name)) for name in FILES}
    assert not {name: lines for name, lines in found.items() if lines}


def test_bundles_data_and_policy_come_without_torch():
    """Asked of Python itself, so that nothing they import brings it along either."""
    names = [n for n in FILES if room_of(n) in ("bundle", "data", "trace")]
    names += [n for n in FILES if room_of(n) == "serving"]
    names += [f"inference.{n}" for n in ("policy", "sampling", "engine", "admission")]
    names += [f"inference.{n}" for n in ("opening", "messages", "apart")]
    code = (
        "import sys\n"
        + "".join(f"import flexolmo.{n}\n" for n in names)
        + ("sys.exit('torch came along' if 'torch' in sys.modules else 0)")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_these_checks_can_fail():
    tree = ast.parse("def f():\n    import torch.nn as nn\n    from urllib import request\n")
    assert imported_by(tree) == {"torch.nn", "urllib.request"}
    unsafe = "import torch, numpy as np\ntorch.load(x)\nnp.load(x)\nnp.load(x, allow_pickle=False)"
    found = sorted(unpickling_in(ast.parse(unsafe)))
    assert found == ["2: torch.load", "3: a pickle in an array"]
    assert rooms_imported_by("train.expert") >= {"train.loop", "bundle.bundle", "model.moe"}
    assert level("train.expert") > level("train.loop") > level("model.moe") > level("data.batches")
    with pytest.raises(AssertionError, match="without a place"):
        level("utils")
