"""Who may know whom, read from the sources."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for top in ("lq_plugin", "kernels/lq_kernels", "recipes")
    for path in (ROOT / top).rglob("*.py")
    if not path.is_relative_to(ROOT / "lq_plugin" / "recipes") and not path.is_relative_to(ROOT / "lq_plugin" / "conf")
)
# What a plain loop uses: neither these nor anything that they import may know Lightning.
WITHOUT_LIGHTNING = ("lq_plugin.conversion", "lq_plugin.layers", "lq_plugin.formats", "lq_plugin.optim", "lq_kernels")
# A layer and those below it, none of which may know those above.
LAYERS = (
    "lq_plugin.recipes",
    "lq_plugin.plugin",
    "lq_plugin.conversion",
    "lq_plugin.layers",
    "lq_plugin.formats",
    "lq_kernels",
)


def module_name(path: Path) -> str:
    """lq_plugin.formats.int8; what lies in recipes/ is imported as lq_plugin.recipes."""
    parts = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT).with_suffix("").parts
    return ".".join(("lq_plugin", *parts) if parts[0] == "recipes" else parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names of all imported modules, also those imported inside of functions; "." for a relative import."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.append("." if node.level else node.module or "")
    return tuple(names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offenders(allowed) -> list[str]:
    """module -> imported, for each import that is not allowed(module, imported)."""
    return [f"{module_name(p)} -> {name}" for p in SOURCES for name in imports(p) if not allowed(module_name(p), name)]


def test_the_sources_are_found():
    names = {module_name(path) for path in SOURCES}
    assert {"lq_kernels", "lq_plugin.plugin", "lq_plugin.recipes.train"} <= names


def test_kernels_import_torch_triton_and_the_standard_library_only():
    known = {"torch", "triton", "lq_kernels", *sys.stdlib_module_names}
    assert not offenders(lambda module, name: not within(module, "lq_kernels") or name.split(".")[0] in known)


def test_a_plain_loop_can_use_layers_and_optimizers_without_lightning():
    known = {module_name(path): {name for name in imports(path) if name != "."} for path in SOURCES}
    reached = {module for module in known if any(within(module, package) for package in WITHOUT_LIGHTNING)}
    while new := {name for module in reached for name in known[module] if name in known} - reached:
        reached |= new
    assert not [f"{module} -> {name}" for module in reached for name in known[module] if within(name, "lightning")]


@pytest.mark.parametrize(("above", "below"), [(a, b) for i, a in enumerate(LAYERS) for b in LAYERS[i + 1 :]])
def test_no_layer_knows_those_above(above, below):
    assert not offenders(lambda module, name: not (within(module, below) and within(name, above)))


def test_the_optimizers_know_the_kernels_and_the_structure_of_models_only():
    def allowed(module: str, name: str) -> bool:
        ours = within(name, "lq_plugin") or within(name, "lq_kernels")
        return (
            not (within(module, "lq_plugin.optim") and ours)
            or within(name, "lq_plugin.optim")
            or within(name, "lq_kernels")
            or name == "lq_plugin.structure"
        )

    assert not offenders(allowed)


def test_recipes_are_imported_by_one_name():
    """As `recipes.x` or relatively each class would exist twice."""
    assert not offenders(lambda module, name: not within(name, "recipes") and name != ".")


def test_libraries_do_not_read_the_environment():
    reading = [
        f"{module_name(path)}:{node.lineno}"
        for path in SOURCES
        if not within(module_name(path), "lq_plugin.recipes")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not reading


def test_no_package_shadows_hugging_faces_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
