"""The page that replays a denoising, in Chromium and as text."""

import html.parser
import json
import time

import browser as browser_lib
import matplotlib
import numpy as np
import pytest
from browser import DESK, PHONE, element, set_window

from maskdiff.sampling import replay
from maskdiff.sampling.replay import Recording

GIVEN = 'say("</script><!--<script>")\n'
ANSWER = '<b>\'&amp;"\\u003c\u2028\n🦉 owls\n'  # the owl is four byte tokens
SETTINGS = {
  'steps': 12,
  'block_length': 8,
  'temperature': 0.5,
  'confidence': 'probability',
  'eos': '</script>',
}


@pytest.fixture(scope='module')
def recording(tokenizer):
  """Two texts, filled block by block in an order that breaks up the owl.

  The first has a mask among what is given, an id that the tokenizer does not
  know, a letter of which one byte is missing, and eos; its last slots are given
  up. The second is short, and filled early.
  """
  owl = tokenizer.encode('🦉')
  assert len(owl) >= 4
  given = [
    *(tokenizer.bos_id, tokenizer.mask_id, tokenizer.vocab_size + 5),
    *tokenizer.encode(GIVEN),
  ]
  slots = [*tokenizer.encode(ANSWER), *owl[:-1], 10, *[tokenizer.eos_id] * 4]
  rows = [(given, slots), ([], tokenizer.encode('x = 1'))]
  length = len(given) + len(slots)
  random = np.random.default_rng(3)
  canvas = np.zeros((2, length), np.int32)
  fill, valid = np.zeros((2, length), bool), np.zeros((2, length), bool)
  final = canvas.copy()
  came = np.zeros((2, length), int)
  for row, (before, after) in enumerate(rows):
    end = len(before) + len(after)
    final[row, :end] = before + after
    fill[row, len(before) : end] = True
    valid[row, :end] = True
    for start in range(0, len(after), SETTINGS['block_length']):
      block = np.arange(
        start, min(start + SETTINGS['block_length'], len(after))
      )
      order = random.permutation(len(block)) // 2  # two at each step
      came[row, len(before) + block] = 1 + start // 2 + order
  canvases, sures = [], []
  ended = np.zeros((2, length), bool)
  ended[0, length - 3 :] = True
  came[0, length - 3 :] = came[0].max()
  sure = random.uniform(size=(2, length)).astype(np.float32)
  for step in range(came.max() + 1):
    masked = fill & (came > step)
    canvases.append(np.where(masked, tokenizer.mask_id, final))
    new = fill & (came == step) & ~ended
    sures.append(np.where(new, sure, np.nan))
  return Recording(np.stack(canvases), np.stack(sures), fill, valid)


@pytest.fixture(scope='module')
def page(recording, tokenizer, tmp_path_factory):
  """The page as a file."""
  path = tmp_path_factory.mktemp('page') / 'replay.html'
  titles = ['first "text"', 'second']
  path.write_text(replay.page(recording, tokenizer, titles, SETTINGS))
  return path


@pytest.fixture(scope='module')
def browser(page, tmp_path_factory):
  """Chromium with the page, and all that it said since."""
  with browser_lib.started(tmp_path_factory.mktemp('profile')) as chromium:
    yield chromium


@pytest.fixture
def opened(browser, page):
  set_window(browser, DESK)
  browser.get(page.as_uri())
  return browser


def shown(browser):
  """The texts, as they stand in the page."""
  script = (
    "return [...document.querySelectorAll('.text')].map(e => e.textContent)"
  )
  return browser.execute_script(script)


def at(browser):
  return int(element(browser, '#slider').get_property('value'))


def texts(recording, tokenizer, step):
  rows = zip(recording.canvases[step], recording.valid, strict=True)
  return [tokenizer.decode(row[there]) for row, there in rows]


def spans(browser, row):
  """Class, colours and place of the tokens of a text."""
  return browser.execute_script(
    """
    const text = document.querySelectorAll('.text')[arguments[0]];
    return [...text.querySelectorAll('.t')].map(e => {
      const {backgroundColor, color} = getComputedStyle(e);
      return {names: [...e.classList], back: backgroundColor, ink: color};
    });
    """,
    row,
  )


def rgb(color):
  """From 'rgb(r, g, b)' to shares."""
  return np.array([int(x) for x in color[4:-1].split(',')]) / 255


def luminance(color):
  """Relative luminance of WCAG 2."""
  linear = np.where(
    color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4
  )
  return linear @ [0.2126, 0.7152, 0.0722]


# In the browser


def test_the_text_at_every_step_is_the_canvas(opened, recording, tokenizer):
  """Stepped through with the slider's own keys, and back to the start."""
  from selenium.webdriver.common.keys import Keys

  slider, last = element(opened, '#slider'), len(recording.canvases) - 1
  for step in range(last + 1):
    assert at(opened) == step
    assert shown(opened) == texts(recording, tokenizer, step)
    label = element(opened, '#step').text
    assert label == f'step {step} of {last}'
    slider.send_keys(Keys.ARROW_RIGHT)
  slider.send_keys(Keys.HOME)
  assert shown(opened) == texts(recording, tokenizer, 0)


def test_the_slider_is_moved_with_the_pointer(opened, recording, tokenizer):
  element(opened, '#slider').click()  # in its middle
  step = at(opened)
  assert 0 < step < len(recording.canvases) - 1
  assert shown(opened) == texts(recording, tokenizer, step)


def test_buttons_and_keys_step_and_play(opened, recording, tokenizer):
  from selenium.webdriver.common.action_chains import ActionChains
  from selenium.webdriver.common.keys import Keys

  last = len(recording.canvases) - 1
  press = lambda key: ActionChains(opened).send_keys(key).perform()
  for _ in range(3):
    element(opened, '#forward').click()
  element(opened, '#back').click()
  assert at(opened) == 2
  press(Keys.ARROW_LEFT)
  assert at(opened) == 1
  press(Keys.END)
  assert at(opened) == last
  element(opened, '#play').click()  # from the start again
  assert element(opened, '#play').get_attribute('aria-label') == 'Pause'
  until(lambda: 1 <= at(opened) < last)
  element(opened, '#play').click()
  paused = at(opened)
  time.sleep(1)
  assert at(opened) == paused < last
  opened.execute_script('document.activeElement.blur()')
  press(' ')
  until(lambda: at(opened) == last)
  assert element(opened, '#play').get_attribute('aria-label') == 'Play'
  assert shown(opened) == texts(recording, tokenizer, last)


def until(true, seconds=30):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_confidence_is_told_by_colours_that_can_be_read(
  opened, recording, scheme
):
  """Matplotlib's viridis, whose lightness rises with confidence."""
  set_window(opened, DESK, scheme)
  opened.execute_script('show(last)')
  sure = np.fmax.reduce(recording.sure, axis=0)
  kept = []
  for row, there in enumerate(recording.valid):
    expected = sure[row, there]
    for span, confidence in zip(spans(opened, row), expected, strict=True):
      assert ('kept' in span['names']) == (not np.isnan(confidence))
      if 'kept' in span['names']:
        kept.append((confidence, rgb(span['back']), rgb(span['ink'])))
  assert len(kept) > 20
  viridis = matplotlib.colormaps['viridis']
  for confidence, back, ink in kept:
    np.testing.assert_allclose(back, viridis(confidence)[:3], atol=0.07)
    dark, light = sorted([luminance(back), luminance(ink)])
    assert (light + 0.05) / (dark + 0.05) >= 4.5
  levels = [luminance(back) for _, back, _ in sorted(kept, key=lambda k: k[0])]
  assert (np.diff(levels) > -1e-3).all()


def test_masks_given_text_and_what_is_new_look_different(opened, recording):
  opened.execute_script('show(3)')
  steps, backs = replay.steps(recording), {}
  for row, there in enumerate(recording.valid):
    found = spans(opened, row)
    for span, step, slot in zip(
      found, steps[row, there], recording.fill[row, there], strict=True
    ):
      assert ('given' in span['names']) == (not slot)
      assert ('masked' in span['names']) == (step > 3)
      assert ('new' in span['names']) == (step == 3)
      backs |= dict.fromkeys(span['names'], span['back'])
  looks = [backs[name] for name in ('given', 'masked', 'kept')]
  assert len(set(looks)) == 3 and looks[0] == 'rgba(0, 0, 0, 0)'


def test_blocks_begin_where_they_are_shown_to(opened, recording):
  size = SETTINGS['block_length']
  found = opened.execute_script(
    """
    return [...document.querySelectorAll('.text')].map(text =>
      [...text.querySelectorAll('.edge')].map(edge =>
        [Number(edge.dataset.block), Number(edge.nextSibling.dataset.at)]));
    """
  )
  (slots,) = np.nonzero(recording.fill[0])
  blocks = range(-(-len(slots) // size))
  assert found[0] == [[b + 1, slots[b * size]] for b in blocks]
  assert found[1] == []  # it has a single one


def test_a_token_says_what_it_is_and_when_it_came(opened, recording, tokenizer):
  from selenium.webdriver.common.action_chains import ActionChains

  steps = replay.steps(recording)[0]

  def told(position):
    span = f'.t[data-text="0"][data-at="{position}"]'
    # From elsewhere, so that it is entered.
    there = ActionChains(opened).move_to_element(element(opened, 'h1'))
    there.move_to_element(element(opened, span)).perform()
    return element(opened, '#tip').text

  (slots,) = np.nonzero(recording.fill[0])
  slot = next(i for i in slots if steps[i] > 1)
  assert 'masked slot of block' in told(slot)
  assert str(recording.canvases[-1, 0, slot]) not in told(slot)
  opened.execute_script('show(last)')
  kept = told(slot)
  assert kept.startswith(
    json.dumps(tokenizer.decode(recording.canvases[-1, 0, [slot]]))
  )
  assert f'token {recording.canvases[-1, 0, slot]}, position {slot}' in kept
  assert f'kept at step {steps[slot]}' in kept
  assert f'confidence {recording.sure[steps[slot], 0, slot]:.3f}' in kept
  assert told(slots[-1]).startswith('<eos>')
  assert 'not predicted' in told(slots[-1])
  assert told(0).startswith('<bos>') and 'given' in told(0)
  owl = tokenizer.encode('🦉')
  (byte,) = [i for i in slots if recording.canvases[-1, 0, i] == owl[-1]]
  assert told(byte).startswith('byte 89')  # F0 9F A6 89


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
def test_nothing_is_wider_than_the_window(opened, size):
  set_window(opened, size)
  element(opened, 'summary').click()
  for step in (0, 5, 'last'):
    opened.execute_script(f'show({step})')
    overflow, right = browser_lib.overflow(opened)
    assert overflow == 0 and right <= size[0] + 1
  player = element(opened, '#player').rect
  assert player['y'] + player['height'] <= size[1] + 1


def test_settings_are_listed(opened):
  element(opened, 'summary').click()
  rows = [e.text for e in opened.find_elements('css selector', 'dl div')]
  assert rows == [f'{key}\n{value}' for key, value in SETTINGS.items()]


def test_the_page_asks_for_nothing_and_has_no_errors(opened, page):
  """After all that the tests before this one did with it."""
  opened.execute_script('show(last)')
  assert opened.get_log('browser') == []
  assert browser_lib.requested_urls(opened, page.as_uri()) == {page.as_uri()}


def test_the_page_may_not_ask_for_anything(opened):
  """Not even if it wanted to."""
  answer = opened.execute_async_script(
    """
    const done = arguments[0];
    fetch('http://127.0.0.1:9/').then(
      () => done('fetched'), error => done(String(error)));
    """
  )
  assert 'TypeError' in answer
  refused = [e['message'] for e in opened.get_log('browser')]
  assert any('Content Security Policy' in message for message in refused)


# As text


class Scripts(html.parser.HTMLParser):
  """The contents of the scripts of a page."""

  def __init__(self):
    super().__init__()
    self.found, self.inside = [], False

  def handle_starttag(self, tag, attributes):
    if tag == 'script':
      self.found.append('')
    self.inside = tag == 'script'

  def handle_endtag(self, tag):
    self.inside = False

  def handle_data(self, data):
    if self.inside:
      self.found[-1] += data


def test_no_text_can_leave_its_place_in_the_page(page, recording, tokenizer):
  text = page.read_text('ascii')
  parser = Scripts()
  parser.feed(text)
  data, _ = parser.found
  assert '<' not in data
  first = json.loads(data)['texts'][0]
  pieces = [
    piece if isinstance(piece, str) else ''.join(map(chr, piece))
    for piece in first['pieces']
    if not isinstance(piece, dict)
  ]
  joined = ''.join(pieces)
  assert GIVEN in joined and ANSWER[:-9] in joined
  assert first['title'] == 'first "text"'


def test_slots_know_the_step_at_which_they_were_filled(recording):
  steps = replay.steps(recording)
  for step, canvas in enumerate(recording.canvases):
    masked = recording.fill & (steps > step)
    np.testing.assert_array_equal(
      canvas, np.where(masked, canvas, recording.canvases[-1])
    )
    assert len(np.unique(canvas[masked])) <= 1
  assert (steps[~recording.fill] == 0).all()


def test_a_mask_that_is_predicted_counts_as_filled():
  """It looks on the canvas as if nothing had come."""
  canvases = np.full((3, 1, 2), 4)
  sure = np.full((3, 1, 2), np.nan)
  sure[1, 0, 1] = 0.5
  both = np.ones((1, 2), bool)
  steps = replay.steps(Recording(canvases, sure, both, both))
  assert steps.tolist() == [[3, 1]]  # the first slot is masked to the end
