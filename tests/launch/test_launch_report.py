"""launch/report.py as a command."""

import os
from pathlib import Path

import forked
import made_runs
import pytest
from made_runs import eval_row, train_row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workdir(tmp_path):
  return made_runs.write(
    tmp_path / 'run', [eval_row(0, 9.0), train_row(2, 8.0)]
  )


def launch(*args):
  return forked.run(
    ['launch/report.py', *map(str, args)],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )


def test_the_report_is_written_to_the_first_directory_or_to_out(workdir):
  result = launch(workdir)
  assert result.returncode == 0, result.stderr
  page = workdir / 'report.html'
  assert result.stdout.strip() == str(page)
  text = page.read_text()
  assert text.startswith('<!doctype html>') and text.rstrip().endswith(
    '</html>'
  )
  assert 'src=' not in text.split('<script')[0]
  other = workdir.parent / 'other.html'
  assert launch(workdir, '--out', other).returncode == 0
  assert other.exists() and not list(workdir.parent.glob('*.part'))


def test_out_follows_a_link_and_the_default_replaces_it(workdir):
  target = workdir.parent / 'target.html'
  for link, out in (
    (workdir.parent / 'link.html', True),
    (workdir / 'report.html', False),  # perhaps planted
  ):
    target.write_text('old')
    link.symlink_to(target)
    assert launch(workdir, *(['--out', link] if out else [])).returncode == 0
    assert link.is_symlink() == out
    assert (target.read_text() == 'old') != out


def test_a_device_named_by_out_is_written_and_not_replaced(workdir):
  link = workdir.parent / 'null'
  link.symlink_to('/dev/null')
  assert launch(workdir, '--out', link).returncode == 0
  assert link.is_symlink()


@pytest.mark.slow
def test_user_errors_are_one_line(workdir):
  empty = made_runs.write(workdir.parent / 'empty', [])
  for args, says in (
    ([], 'give one or more work directories'),
    ([workdir.parent / 'none'], 'there is no work directory'),
    ([empty], 'has no rows of metrics'),
    ([workdir, workdir], 'have the same name'),
    ([workdir, '--out', workdir / 'none' / 'x.html'], '--out: cannot write'),
    ([workdir, '--plan', workdir / 'none.json'], 'cannot read the plan'),
    ([workdir, '--ouh=x'], "unknown flag --ouh; did you mean 'out'?"),
  ):
    result = launch(*args)
    assert result.returncode == 2
    assert says in result.stderr and result.stdout == ''
    assert len(result.stderr.strip().splitlines()) == 1


def test_damaged_lines_are_counted_in_one_line_per_file(workdir):
  """A planted link is replaced, not followed."""
  private = workdir.parent / 'private'
  private.write_text('text')
  (workdir / 'report.html').symlink_to(private)
  with open(workdir / 'metrics.jsonl', 'ab') as f:
    f.write(b'\xff\n3\n{"step": 4}\n{"step": 6, "tr')
  (workdir / 'ledger.jsonl').write_bytes(b'{"time": NaN}\n')
  result = launch(workdir)
  assert result.returncode == 0
  assert result.stdout.strip() == str(workdir / 'report.html')
  assert result.stderr.splitlines() == [
    f'warning: {workdir}/metrics.jsonl: 2 damaged lines are skipped',
    f'warning: {workdir}/ledger.jsonl: 1 damaged line is skipped',
  ]
  assert private.read_text() == 'text'
  assert not (workdir / 'report.html').is_symlink()
