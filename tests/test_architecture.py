"""The house rules of the design, checked on syntax trees: layers, cycles, sizes, light import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
MODULES = sorted(p for top in ("alpha_clip", "data_pipeline") for p in (REPO / top).rglob("*.py"))

# Each row may import from the rows above it, and from its own.
LAYERS = [
    ["alpha_clip.rle"],
    ["alpha_clip.jpegs", "alpha_clip.mask_stack"],
    ["alpha_clip.samples"],
    ["alpha_clip.sidecar"],
    ["alpha_clip.regions"],
    [
        "alpha_clip.surgery",
        "alpha_clip.late_alpha",
        "alpha_clip.token_tower",
        "alpha_clip.many_regions",
        "alpha_clip.attention",
        "alpha_clip.attention_masking",
        "alpha_clip.dense",
        "alpha_clip.pooled",
        "alpha_clip.text",
        "alpha_clip.geometry",
        "alpha_clip.pictures",
        "alpha_clip.drops",
        "alpha_clip.sampling",
        "alpha_clip.visualize",
    ],
    ["alpha_clip.reader"],
    ["alpha_clip.streams"],
    ["alpha_clip.transforms", "alpha_clip.layouts", "alpha_clip.batches"],
    ["alpha_clip.datasets"],
    ["alpha_clip.loader"],
    ["alpha_clip.model", "alpha_clip.weights"],
    ["alpha_clip.blocks"],
    ["alpha_clip.lora", "alpha_clip.sharding"],
    ["alpha_clip.checkpoint", "alpha_clip.losses", "alpha_clip.optim"],
    ["alpha_clip.trainable", "alpha_clip.training_checkpoint"],
    ["alpha_clip.architectures"],
    ["alpha_clip.factory"],
    ["alpha_clip.published"],
    ["alpha_clip.phrases"],
    [
        "alpha_clip.data",
        "alpha_clip.evaluation",
        "alpha_clip.export",
        "alpha_clip.region_matching",
        "alpha_clip.checkpoint_io",
        "alpha_clip.last_checkpoint",
        "alpha_clip.late_number",
        "alpha_clip.progress",
        "alpha_clip.throughput",
    ],
    ["alpha_clip.module", "alpha_clip.report", "alpha_clip.embedding"],
    ["alpha_clip.training", "alpha_clip.demo_report"],
    ["alpha_clip.demo", "alpha_clip.cli"],
    ["alpha_clip.__main__"],
]
HEAVY = ("lightning", "webdataset", "transformers", "segment_anything")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, at_top_only: bool = False) -> set[str]:
    """Names of our own modules that a file imports; type-checking imports do not count."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    ours = {module_name(p) for p in MODULES}
    return {name for name in found if name in ours and "." in name}


def layer(name: str) -> int:
    rows = [
        i for i, row in enumerate(LAYERS) if any(name == m or name.startswith(m + ".") for m in row)
    ]
    assert len(rows) == 1, f"{name} has no place in the layers; give it one"
    return rows[0]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_is_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", [p for p in MODULES if "alpha_clip" in p.parts], ids=module_name)
def test_library_imports_downwards(path):
    name = module_name(path)
    for other in imports(path):
        assert not other.startswith("data_pipeline"), f"{name} imports {other}"
        if name != "alpha_clip":
            assert layer(other) <= layer(name), f"{name} imports {other}, which lies above it"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if "data_pipeline" in p.parts], ids=module_name
)
def test_pipeline_knows_only_the_region_schema(path):
    allowed = {"alpha_clip.regions", "alpha_clip.factory", "alpha_clip.visualize"}
    assert {m for m in imports(path) if m.startswith("alpha_clip")} <= allowed


def test_no_import_cycles():
    graph = {module_name(p): imports(p, at_top_only=True) for p in MODULES}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name not in finished:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_functions_are_under_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            length = (code[-1].end_lineno - code[0].lineno + 1) if code else 0
            assert length < 60, f"{node.name} has {length} lines"


def test_no_catch_all_modules():
    assert not [p for p in MODULES if p.stem in ("utils", "misc", "common", "helpers")]


def test_import_is_light():
    code = f"import sys, alpha_clip; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    import alpha_clip

    assert all(hasattr(alpha_clip, name) for name in alpha_clip.__all__)
    assert set(alpha_clip.__all__) == set(alpha_clip._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        alpha_clip.nothing  # noqa: B018
