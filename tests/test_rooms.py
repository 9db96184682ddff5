"""The layout of the package: rooms, imports, and the size of files."""

import ast
import collections
import functools
import graphlib
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'maskdiff'
# A room imports only from rooms in the lines above its own.
ROOMS = (
  ('errors',),
  ('files',),
  ('config',),
  ('data', 'distributed'),
  ('checkpoints',),
  ('model',),
  ('objectives',),
  ('interop',),
  ('monitoring',),
  ('sampling',),
  ('likelihood',),
  ('training',),
  ('evals',),
  ('posttraining',),
  ('rl',),
  ('planner',),
  ('library',),
  ('serving',),
)
LEVEL = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
MAX_MODULES_AT_THE_TOP = 3
MAX_BODY_LINES = 80
MAX_FILE_LINES = 400
# Data: tables of weight names.
LONG_FILES = {'maskdiff/interop/families.py'}
OBJECTIVES = {'autoregressive', 'masked_diffusion'}
# The table of objectives; data; config, which does not import JAX.
NAMES_OBJECTIVES = {
  'maskdiff/objectives/table.py',
  'maskdiff/interop/families.py',
}


@functools.cache
def parsed(path):
  return ast.parse(path.read_text())


def relative(path):
  return path.relative_to(ROOT).as_posix()


def modules():
  """Returns {dotted name: path} of every module of the package."""
  found = {}
  for path in PACKAGE.rglob('*.py'):
    parts = path.relative_to(ROOT).with_suffix('').parts
    if parts[-1] == '__init__':
      parts = parts[:-1]
    found['.'.join(parts)] = path
  return found


MODULES = modules()
FILES = sorted([*PACKAGE.rglob('*.py'), *(ROOT / 'launch').rglob('*.py')])


def imports(path):
  """Returns the modules of the package that a file imports anywhere."""
  names = set()
  for node in ast.walk(parsed(path)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{relative(path)}: relative import'
      names.add(node.module)
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names & MODULES.keys() - {'maskdiff'}


def room(module):
  return module.split('.')[1]


def test_every_folder_and_module_has_a_level():
  names = {room(module) for module in MODULES if module != 'maskdiff'}
  assert names <= LEVEL.keys()


def test_few_modules_stand_at_the_top():
  assert len(list(PACKAGE.glob('*.py'))) <= MAX_MODULES_AT_THE_TOP


def test_imports_between_rooms_point_down():
  up = [
    f'{module} imports {other}'
    for module, path in MODULES.items()
    if module != 'maskdiff'
    for other in imports(path)
    if room(other) != room(module) and LEVEL[room(other)] >= LEVEL[room(module)]
  ]
  assert not up, '\n'.join(sorted(up))


def test_imports_have_no_cycle():
  graph = {}
  for module, path in MODULES.items():
    others = imports(path)
    # The __init__ of config imports its modules, and importing one of them
    # also names the package. This is not a cycle.
    graph[module] = {o for o in others if not module.startswith(o + '.')}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize('folder', sorted(LEVEL.keys() - {'errors', 'config'}))
def test_init_of_a_room_is_one_docstring(folder):
  body = parsed(PACKAGE / folder / '__init__.py').body
  assert len(body) == 1
  assert isinstance(body[0], ast.Expr)
  assert isinstance(body[0].value.value, str)


def test_no_file_is_long():
  lines = {relative(path): len(path.read_text().splitlines()) for path in FILES}
  long = {name for name in lines if lines[name] > MAX_FILE_LINES}
  assert long <= LONG_FILES


def body_lines(function):
  """Returns the lines of a function without its head and its docstring."""
  body = function.body
  if ast.get_docstring(function) is not None:
    body = body[1:]
  if not body:
    return 0
  return function.end_lineno - body[0].lineno + 1


def test_no_function_is_long():
  long = {
    f'{relative(path)}:{node.name}': body_lines(node)
    for path in FILES
    for node in ast.walk(parsed(path))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    and body_lines(node) > MAX_BODY_LINES
    and not _declares_keys(path, node)
  }
  assert not long


def _declares_keys(path, function):
  """Returns whether a function only lists config keys."""
  simple = (ast.Assign, ast.Return, ast.Expr, ast.Import, ast.ImportFrom)
  return room_of_file(path) == 'config' and all(
    isinstance(statement, simple) for statement in function.body
  )


def room_of_file(path):
  return path.relative_to(ROOT).parts[1]


def test_no_file_compares_the_name_of_an_objective():
  found = [
    f'{relative(path)}:{node.lineno}: {ast.unparse(node)}'
    for path in FILES
    if relative(path) not in NAMES_OBJECTIVES and room_of_file(path) != 'config'
    for node in ast.walk(parsed(path))
    if isinstance(node, ast.Compare | ast.Match)
    and OBJECTIVES
    & {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
  ]
  assert not found, '\n'.join(found)


def test_rooms_are_listed_in_pyproject():
  """A folder that is not listed is missing from the installed package."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  rooms = [f'maskdiff.{p.parent.name}' for p in PACKAGE.glob('*/__init__.py')]
  packages = project['tool']['setuptools']['packages']
  assert packages == ['maskdiff', *sorted(rooms)]


def test_names_of_test_files_are_unique():
  """Pytest imports files by name: two of one name stop the collection."""
  names = collections.Counter(
    path.name for path in (ROOT / 'tests').rglob('*.py')
  )
  assert [n for n in names if names[n] > 1 and n != 'conftest.py'] == []
