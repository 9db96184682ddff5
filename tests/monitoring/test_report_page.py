"""The HTML report, in Chromium and as text."""

import json

import browser as browser_lib
import made_runs
import numpy as np
import pytest
from browser import DESK, PHONE, element, set_window
from made_runs import eval_row, train_row

from maskdiff.monitoring import history, report, stage_file, traces
from maskdiff.monitoring.ledger import KINDS, LOST
from maskdiff.monitoring.stage_file import Curve

STEPS = 40
EVALUATIONS = (0, 10, 20, 30, 40)
PROMPT = 'def <b>x</b>('
SAMPLE = '</script><!--<script> & "\u2028🦉'
NAMES = ('masked "<i>1&lt;', 'autoregressive', 'short')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Three runs, with names that need escaping in HTML.

  The first is masked diffusion with a skipped update, a plan and a ledger. The
  second is autoregressive with twice the batch and another tokenizer. The third
  has only its first evaluation.
  """
  folder = tmp_path_factory.mktemp('runs')
  noise = np.random.default_rng(0).normal(scale=0.3, size=(2, STEPS))
  ratios = lambda loss: [('0.1', loss - 1), ('0.5', loss), ('0.9', loss + 1)]
  rows = [[], []]
  for step in range(STEPS + 1):
    loss = 3 + 6 / (1 + step)
    if step:
      masked = train_row(
        step, loss + noise[0, step - 1], ratios=ratios(loss), mfu=0.3
      )
      masked['train/skipped_updates'] = int(step == 7)
      rows[0].append(masked)
      rows[1].append(train_row(step, loss - 1, batch=16))
    if step in EVALUATIONS:
      rows[0].append(eval_row(step, loss, ratios=ratios(loss)))
      rows[1].append(eval_row(step, loss - 1, bits_per_nat=0.4))
      for i in (0, 1):
        text = f'{PROMPT}{SAMPLE} run {i} step {step}'
        rows[i].append({'step': step, 'sample/0': text})
  skipped = {
    **{'time': 7.0, 'event': 'skipped', 'step': 7, 'in_a_row': 1},
    **{'loss_nats_per_token': 99.0, 'grad_norm': 1e4, 'samples': [48, 56]},
    'seconds': {},
  }
  ledger = [
    {'time': 0.0, 'event': 'opened', 'seconds': {}},
    {'time': 1.0, 'event': 'started', 'step': 0, 'seconds': {'init': 1.0}},
    skipped,
    {'time': 9.0, 'step': STEPS, 'seconds': {'step': 6.0, 'compile': 2.0}},
  ]
  same = dict(sample__prompts=(PROMPT,), train__steps=STEPS)
  first = made_runs.write(folder / NAMES[0], rows[0], ledger, **same)
  (first / 'plan.json').write_text(json.dumps(made_runs.plan()))
  second = made_runs.write(
    *(folder / NAMES[1], rows[1], ledger),
    **same,
    train__batch=16,
    objective__name='autoregressive',
  )
  third = made_runs.write(folder / NAMES[2], [eval_row(0, 9.0)], **same)
  return history.read_runs([first, second, third])


@pytest.fixture(scope='module')
def page(runs, tmp_path_factory):
  """The report as a file."""
  path = tmp_path_factory.mktemp('page') / 'report.html'
  path.write_text(report.page(runs, now=0), encoding='utf-8')
  return path


@pytest.fixture(scope='module')
def browser(page, tmp_path_factory):
  """Chromium for all tests of this file."""
  with browser_lib.started(tmp_path_factory.mktemp('profile')) as chromium:
    yield chromium


@pytest.fixture
def opened(browser, page):
  return load(browser, page, DESK)


def load(browser, page, size, scheme='light'):
  from selenium.webdriver.support.ui import WebDriverWait

  set_window(browser, size, scheme)
  browser.get(page.as_uri())
  drawn = lambda b: element(b, 'body').get_attribute('class') == 'drawn'
  WebDriverWait(browser, 60).until(drawn)
  return browser


def lines(browser, panel):
  """Returns the curves of a panel: colour, width, points, coordinates."""
  return browser.execute_script(
    """
    const panel = document.getElementById(arguments[0]);
    const paths = panel.querySelectorAll('.scatterlayer path.js-line');
    return [...paths].map(path => {
      const {stroke, strokeWidth} = getComputedStyle(path);
      const numbers = path.getAttribute('d').match(/[-0-9.e]+/g).map(Number);
      const points = path.getAttribute('d').match(/[ML]|[HV]/g).length;
      return {stroke, width: parseFloat(strokeWidth), points, numbers};
    });
    """,
    panel,
  )


def data(browser, panel, name):
  """Returns an attribute of each visible trace in Plotly, as a list."""
  return browser.execute_script(
    f"""
    return document.querySelector('#{panel} .plot')._fullData
      .filter(t => t.visible === true).map(t => Array.from({name}));
    """
  )


def rgb(colour):
  return f'rgb({", ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})'


# In the browser


def test_curves_are_drawn(opened):
  """Curves have the colours of their runs and pass through all points."""
  heldout = lines(opened, 'heldout')
  assert [x['stroke'] for x in heldout] == [rgb(c) for c in traces.COLOURS[:2]]
  assert [x['points'] for x in heldout] == [len(EVALUATIONS)] * 2
  marks = opened.find_elements('css selector', '#heldout .points path.point')
  assert len(marks) == 2 * len(EVALUATIONS) + 1  # the third run has one
  bars = opened.find_elements('css selector', '#heldout .errorbar path.yerror')
  assert len(bars) == len(marks)
  for panel in ('training', 'grad_norm'):
    drawn = lines(opened, panel)
    assert len(drawn) == 4  # faint and bold
    assert sorted(x['width'] for x in drawn) == [1, 1, 2, 2]
  for panel in ('learning_rate', 'tokens_per_s'):
    assert len(lines(opened, panel)) == 2
  assert len(lines(opened, 'mfu')) == 1
  assert len(lines(opened, 'skipped')) == 1
  assert len(lines(opened, 'by_ratio')) == 1
  assert len(lines(opened, 'training_by_ratio')) == 3
  # Measured by two runs, and planned for one.
  assert len(lines(opened, 'step_s')) == 3


def test_curves_fall_as_the_losses_do(opened):
  """In SVG y grows downwards, so it grows as a loss falls."""
  width = element(opened, '#heldout .plot').size['width']
  # The x axis is tokens; the second run has twice as many.
  for line, share in zip(lines(opened, 'heldout'), (0.4, 0.8), strict=True):
    x, y = line['numbers'][::2], line['numbers'][1::2]
    assert x == sorted(x) and y == sorted(y)
    assert x[-1] - x[0] == pytest.approx(share * width, rel=0.1)


def test_goodput_bars_are_drawn(opened):
  bars = opened.find_elements('css selector', '#goodput .barlayer path')
  widths = [bar.rect['width'] for bar in bars if bar.rect['width'] > 1]
  assert len(widths) == 2 * 3  # init, step and compile of two runs
  assert max(widths) / sum(widths) == pytest.approx(2 / 3 / 2, rel=0.1)
  legend = element(opened, '#goodput .legend').text.split()
  assert legend == ['step', 'init', 'compile']


def test_axes_switch_between_tokens_and_steps_and_between_units(opened, runs):
  # The batch sizes differ, so the page opens with tokens. The tokenizers
  # differ, so it opens with bits per byte.
  assert pressed(opened) == ['tokens', 'bits/byte']
  tokens = data(opened, 'heldout', 't.x')
  assert tokens[0] == [n * 128 for n in EVALUATIONS]
  assert tokens[1] == [n * 256 for n in EVALUATIONS]
  bits = data(opened, 'heldout', 't.y')
  bars = data(opened, 'heldout', 't.error_y.array')
  for name in ('steps', 'nats/token'):
    press(opened, name)
  assert pressed(opened) == ['steps', 'nats/token']
  assert data(opened, 'heldout', 't.x')[:2] == [list(EVALUATIONS)] * 2
  nats = data(opened, 'heldout', 't.y')
  for run, factor in ((0, 0.5), (1, 0.4)):
    loss = history.series(runs[run], 'eval/loss_nats_per_token')[1]
    np.testing.assert_allclose(nats[run], loss, rtol=1e-5)
    np.testing.assert_allclose(bits[run], loss * factor, rtol=1e-5)
    np.testing.assert_allclose(bars[run], 0.1 * factor)
  titles = [
    element(opened, f'#heldout .{axis}title').text for axis in ('x', 'y')
  ]
  assert titles == ['steps', 'nats/token']


def press(browser, name):
  browser.find_element('xpath', f'//button[text()="{name}"]').click()


def pressed(browser):
  found = browser.find_elements('css selector', '.pair [aria-pressed="true"]')
  return [button.text for button in found]


def test_legend_shows_and_hides_a_run_in_all_panels(opened, runs):
  buttons = opened.find_elements('css selector', '#legend button')
  assert [b.text for b in buttons] == [run.name for run in runs]
  keys = opened.execute_script(
    """
    return [...document.querySelectorAll('#legend path')].map(
      path => getComputedStyle(path).stroke);
    """
  )
  assert keys == [rgb(c) for c in traces.COLOURS[:3]]
  buttons[0].click()
  for panel in ('heldout', 'training', 'step_s', 'by_ratio'):
    drawn = {line['stroke'] for line in lines(opened, panel)}
    assert rgb(traces.COLOURS[0]) not in drawn
  buttons[0].click()
  assert len(lines(opened, 'heldout')) == 2


def test_cards_show_the_figures_of_each_run(opened, runs):
  cards = opened.find_elements('css selector', '.run')
  first, second, third = (
    dict(
      [part.text for part in row.find_elements('css selector', 'dt, dd')]
      for row in card.find_elements('css selector', 'dl div')
    )
    for card in cards
  )
  assert first['step'] == '40 of 40 (100%)'
  assert (first['tokens'], second['tokens']) == ('5.12k', '10.2k')
  assert first['parameters'] == '1.23k'
  loss = history.series(runs[0], 'eval/loss_nats_per_token')[1][-1]
  assert first['held-out, nats/token'] == f'{loss:.3f} ± 0.100'
  assert first['held-out, bits/byte'] == f'{loss / 2:.3f} ± 0.050'
  assert first['tokens/s'] == '256' and first['MFU'] == '30.0%'
  assert first['goodput'] == '66.7%' and first['skipped updates'] == '1'
  assert third['step'] == '0 of 40 (0%)' and 'goodput' not in third
  header = element(cards[0], 'pre').get_property('textContent')
  assert header == runs[0].header
  skipped = element(opened, '#skipped pre').get_property('textContent')
  assert 'step 7: update skipped' in skipped


def test_only_the_config_keys_that_differ_are_listed(opened):
  rows = opened.find_elements('css selector', '#differences tbody tr')
  m = 'masked_diffusion'
  assert [row.text.split() for row in rows] == [
    ['objective.name', m, 'autoregressive', m],
    ['train.batch', '8', '16', '8'],
  ]


def test_plan_is_compared_with_the_measurement(opened):
  rows = opened.find_elements('css selector', '#plans tbody tr')
  assert [row.text.split() for row in rows] == [
    ['step,', 's', '0.4', '0.5', '1.25'],
    ['tokens/s', '320', '256', '0.80'],
    ['MFU', '50.0%', '30.0%', '0.60'],
  ]
  planned = data(opened, 'step_s', 't.y')[-1]
  assert planned == [0.4, 0.4]


def test_slider_selects_the_step_of_the_samples(opened):
  """Samples that look like HTML are shown as text."""
  from selenium.webdriver.common.keys import Keys

  def shown():
    found = opened.find_elements('css selector', '.sample')
    return [e.get_property('textContent') for e in found]

  text = lambda i, step: f'{PROMPT}{SAMPLE} run {i} step {step}'
  assert shown() == [text(0, 40), text(1, 40)]
  slider = element(opened, '#slider')
  slider.send_keys(Keys.HOME)
  slider.send_keys(Keys.ARROW_RIGHT)
  assert shown() == [text(0, 10), text(1, 10)]
  assert element(opened, '#at').text == 'step 10'
  prompts = opened.find_elements('css selector', '.sample b')
  assert [b.get_property('textContent') for b in prompts] == [PROMPT] * 2


def test_menu_selects_the_dataset(browser, tmp_path):
  from selenium.webdriver.support.ui import Select

  row = eval_row(2, 8.0) | eval_row(2, 6.0, dataset='web')
  workdir = made_runs.write(tmp_path / 'mixed', [row])
  path = tmp_path / 'page.html'
  path.write_text(report.page(history.read_runs([workdir])), encoding='utf-8')
  load(browser, path, DESK)
  assert data(browser, 'heldout', 't.y') == [[8.0]]
  Select(element(browser, '#heldout select')).select_by_visible_text('web')
  assert data(browser, 'heldout', 't.y') == [[6.0]]
  assert browser.get_log('browser') == []


def test_page_of_a_diverged_run_is_complete(browser, tmp_path):
  """Panels draw the finite values and count the others."""
  nan = float('nan')
  losses = [3.0, nan, 5.0, *[nan] * 9]
  rows = [eval_row(0, 9.0)]
  rows += [train_row(i, x) for i, x in enumerate(losses, 1)]
  rows += [eval_row(12, nan), {'step': 12, 'sample/0': SAMPLE}]
  for row in rows[1:13]:
    row['train/mfu'] = nan
  workdir = made_runs.write(tmp_path / 'diverged', rows)
  panels = ('samples', 'goodput2')  # an id that the page has already
  stage_file.write(
    workdir,
    'toy',
    ('heldout', 'training')
    + tuple(Curve(x, SAMPLE, x, 'train/step_s') for x in panels),
  )
  with open(workdir / 'metrics.jsonl', 'ab') as f:
    f.write(b'\xff\n')
  path = tmp_path / 'page.html'
  path.write_text(report.page([history.read_run(workdir)]), encoding='utf-8')
  load(browser, path, DESK)
  assert browser.get_log('browser') == []
  assert data(browser, 'heldout', 't.y') == [[9.0]]
  assert data(browser, 'training', 't.x') == [[1, 3]]
  titles = browser.find_elements('css selector', '#panels h2')
  titles = [e.get_property('textContent') for e in titles]
  assert titles.count(SAMPLE) == 2 and 'Model FLOPs utilization, %' in titles
  notes = [e.text for e in browser.find_elements('css selector', '.warning')]
  assert notes == [
    f'{workdir}/metrics.jsonl: 1 damaged line is skipped',
    'Not finite, so not drawn: 1 of 2 values of diverged.',
    'Not finite, so not drawn: 10 of 12 values of diverged.',
    'Not finite, so not drawn: 10 of 12 values of diverged.',
    'Not finite, so not drawn: 12 of 12 values of diverged.',
  ]
  sample = element(browser, '#texts .sample')
  assert sample.get_property('textContent') == SAMPLE


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_is_wider_than_the_window(browser, page, size, scheme):
  load(browser, page, size, scheme)
  for summary in browser.find_elements('css selector', 'summary'):
    summary.click()
  sizes = browser.execute_script(
    """
    return [...document.querySelectorAll('.plot svg.main-svg')].map(
      e => e.getBoundingClientRect()).map(r => [r.left, r.right, r.height]);
    """
  )
  assert len(sizes) >= 11
  for left, right, height in sizes:
    assert 0 <= left < right <= size[0] and height > 150
  overflow = browser.execute_script(
    """
    const {scrollWidth, clientWidth} = document.documentElement;
    return scrollWidth - clientWidth;
    """
  )
  assert overflow == 0


def test_page_requests_nothing_and_has_no_errors(opened, page):
  """Counts the requests and errors of all earlier tests of this file."""
  assert opened.get_log('browser') == []
  assert browser_lib.requested_urls(opened, page.as_uri()) == {page.as_uri()}


# As text


def test_every_kind_of_time_has_its_own_colour():
  assert set(traces.TIMES) == {*KINDS, *LOST}
  assert len(set(traces.TIMES.values())) == len(traces.TIMES)


def test_plan_of_another_batch_gives_a_warning(tmp_path):
  workdir = made_runs.write(tmp_path / 'a', [train_row(2, 8.0)])
  given = made_runs.plan(batch=1024, step_s=None, status='does not fit')
  run = history.read_run(workdir, given)
  text = report.page([run])
  assert 'the plan is for batch 1,024, the run has 8' in text
  assert 'the plan has no time: it does not fit' in text


def test_training_loss_that_is_not_the_bound_is_the_training_objective(
  tmp_path,
):
  name = 'train/objective_nats_per_token'
  rows = [{'step': step, name: 8.0} for step in (1, 2)]
  facts = report._losses(
    history.read_run(made_runs.write(tmp_path / 'a', rows))
  )
  assert facts == [('training objective, nats/token', '8.000')]
  rows = [train_row(1, 8.0), train_row(2, 8.0)]
  facts = report._losses(
    history.read_run(made_runs.write(tmp_path / 'b', rows))
  )
  assert facts == [('training, nats/token', '8.000')]


@pytest.mark.parametrize('steps', [(0, 2), (0,)])
def test_average_is_shown_only_beside_the_bound_of_its_step(tmp_path, steps):
  """An average that was turned off ends before the bound of the weights."""
  rows = [eval_row(0, 9.0), eval_row(2, 7.0)]
  for row in rows:
    if row['step'] in steps:
      row['eval/ema_loss_nats_per_token'] = row['step'] + 5.0
  facts = dict(
    report._losses(history.read_run(made_runs.write(tmp_path / 'a', rows)))
  )
  assert facts['held-out, nats/token'] == '7.000 ± 0.100'
  shown = '7.000' if 2 in steps else None
  assert facts.get('held-out, average, nats/token') == shown
