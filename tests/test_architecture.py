"""The rooms of the package keep to their duties: what docs/architecture.md says, holds."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_iaf"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top; rooms on one floor don't import each other.
FLOORS = [
    {"_progress", "_validation"},
    {"importance", "distributions"},
    {"models"},
    {"compiler"},
    {"nn"},
    {"solvers"},
    {"flows"},
    {"elbo", "guides"},
    {"diagnostics"},
    {"training"},
    {"_registration"},
    {"__init__", "__main__"},
]
FLOOR = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 470

# Classes of flows/ that are neither a guide nor a flow.
DISTRIBUTIONS = {"Posterior"}

# Private names of PyTorch and Pyro that several rooms read or override.
THEIRS = {"_pyro_name", "_validate_sample"}


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def absolute_imports(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []


def imports_of(path):
    """What a file imports of the package: rooms, and names."""
    place = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = place[: len(place) - node.level]
            module = [*base, *(node.module or "").split(".")] if node.module else [*base]
            for alias in node.names:
                target = [*module, alias.name]
                yield target[0], target[-1]
        elif any(name.split(".")[0] == "pyro_iaf" for name in absolute_imports(node)):
            raise AssertionError(f"{path}: imports within the package are relative")


def upward(path, imports):
    """The imports of a file that don't lead down."""
    room = room_of(path)
    return [(other, n) for other, n in imports if other != room and FLOOR[other] >= FLOOR[room]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_lead_down_and_to_public_names(path):
    room, found = room_of(path), list(imports_of(path))
    assert not upward(path, found), "import from rooms below alone, or move what is imported down"
    private = [n for other, n in found if other != room and n.startswith("_")]
    assert not private, "what another room needs has a public name"


def private_names(room):
    """The private methods and attributes that classes of a room have."""
    found = set()
    for path in FILES:
        if room_of(path) == room:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
                    found.add(node.attr)
                elif isinstance(node, ast.Assign | ast.AnnAssign):  # of a class or a module
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return {n for n in found - THEIRS if n.startswith("_") and not n.startswith("__")}


PRIVATE = {room: private_names(room) for room in FLOOR}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_attributes_stay_in_their_room(path):
    room = room_of(path)
    of_others = set().union(*(names for other, names in PRIVATE.items() if other != room))
    used = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    strange = used & (of_others - PRIVATE[room])
    assert not strange, "what another room needs is a public method"


def test_an_import_that_leads_up_is_found():
    made = PACKAGE / "nn" / "made.py"
    assert upward(made, [("flows", "Flow"), ("_validation", "warn")]) == [("flows", "Flow")]
    assert upward(PACKAGE / "elbo" / "stl.py", [("guides", "AutoIAF")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES, "split it where its idea splits"


def classes(*rooms):
    """The classes of these rooms by name, but for protocols, which ask for methods."""
    trees = (ast.parse(p.read_text()) for r in rooms for p in (PACKAGE / r).glob("*.py"))
    found = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    found = [n for n in found if "Protocol" not in map(ast.unparse, n.bases)]
    return {n.name for n in found} - DISTRIBUTIONS


def asked_by_type(tree, names):
    """Where code asks whether a thing is of one of these classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
            "isinstance",
            "issubclass",
        }:
            asked = ast.walk(node.args[1])
        elif isinstance(node, ast.Compare) and any(
            (isinstance(part, ast.Call) and getattr(part.func, "id", "") == "type")
            or getattr(part, "attr", "") == "__class__"
            for part in [node.left, *node.comparators]
        ):
            asked = ast.walk(node)
        elif isinstance(node, ast.MatchClass):
            asked = ast.walk(node.cls)
        else:
            continue
        for part in asked:
            name = getattr(part, "id", getattr(part, "attr", ""))
            if name in names:
                yield node.lineno, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_asks_for_the_class_of_a_guide_or_flow(path):
    others = classes("guides", "flows") if room_of(path) not in ("guides", "flows") else set()
    asked = list(asked_by_type(ast.parse(path.read_text()), others))
    assert not asked, "ask whether it has the method, and add the method where it is missing"


def test_a_question_for_a_class_is_found():
    lines = "type(guide) is AutoIAF", "isinstance(part, (int, sinh_arcsinh.LocScale))"
    lines += "part.__class__ is SinglePass", "match guide:\n  case AutoIAF(): ..."
    asked = asked_by_type(ast.parse("\n".join(lines)), classes("guides", "flows"))
    assert sorted(asked) == [(1, "AutoIAF"), (2, "LocScale"), (3, "SinglePass"), (5, "AutoIAF")]


def test_the_page_lists_the_rooms():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in FILES:
        room = room_of(path)
        assert re.search(rf"`{room}(/|\.py)?`", text), room


def test_the_files_that_the_page_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    assert len(named) >= 12
    assert all((ROOT / name).exists() or (PACKAGE / name).exists() for name in named)
