"""The page that replays denoising, in Chromium and as text."""

import html.parser
import json
import time

import browser as browser_lib
import matplotlib
import numpy as np
import pytest
from browser import DESK, PHONE, element, set_window

from maskdiff.sampling import replay
from maskdiff.sampling.recording import Recording, canvas_after, num_steps

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
def recordings(tokenizer):
  """Returns Recordings of two texts, filled block by block.

  The bytes of the owl are committed in different steps. The given tokens of the
  first text include a mask and an id that the tokenizer does not have. Its
  slots include a character without its last byte, and eos; the last slots are
  filled after an eos. The second text is short and complete early.
  """
  owl = tokenizer.encode('🦉')
  assert len(owl) >= 4
  given = [
    *(tokenizer.bos_id, tokenizer.mask_id, tokenizer.vocab_size + 5),
    *tokenizer.encode(GIVEN),
  ]
  slots = [*tokenizer.encode(ANSWER), *owl[:-1], 10, *[tokenizer.eos_id] * 4]
  rows = [(given, slots), ([], tokenizer.encode('x = 1'))]
  random = np.random.default_rng(3)
  found = []
  for before, after in rows:
    fill = np.arange(len(before) + len(after)) >= len(before)
    steps = np.zeros(len(fill), int)
    for start in range(0, len(after), SETTINGS['block_length']):
      block = np.arange(
        start, min(start + SETTINGS['block_length'], len(after))
      )
      order = random.permutation(len(block)) // 2  # two slots per step
      steps[len(before) + block] = 1 + start // 2 + order
    confidence = random.uniform(size=len(fill)).astype(np.float32)
    confidence[~fill] = np.nan
    found.append(Recording(np.array(before + after), fill, steps, confidence))
  found[0].steps[-3:] = found[0].steps.max()
  found[0].confidence[-3:] = np.nan
  return found


@pytest.fixture(scope='module')
def page(recordings, tokenizer, tmp_path_factory):
  """Returns the path of the page."""
  path = tmp_path_factory.mktemp('page') / 'replay.html'
  titles = ['first "text"', 'second']
  path.write_text(replay.page(recordings, tokenizer, titles, SETTINGS))
  return path


@pytest.fixture(scope='module')
def browser(page, tmp_path_factory):
  """Returns Chromium, started once; the last tests read its log."""
  with browser_lib.started(tmp_path_factory.mktemp('profile')) as chromium:
    yield chromium


@pytest.fixture
def opened(browser, page):
  set_window(browser, DESK)
  browser.get(page.as_uri())
  return browser


def shown(browser):
  """Returns the texts as the page shows them."""
  script = (
    "return [...document.querySelectorAll('.text')].map(e => e.textContent)"
  )
  return browser.execute_script(script)


def at(browser):
  return int(element(browser, '#slider').get_property('value'))


def texts(recordings, tokenizer, step):
  """Returns the texts after a step, from the meaning of `steps`."""
  canvases = [
    np.where(r.fill & (r.steps > step), tokenizer.mask_id, r.tokens)
    for r in recordings
  ]
  return [tokenizer.decode(row) for row in canvases]


def last_step(recordings):
  return max(r.steps.max() for r in recordings)


def spans(browser, row):
  """Returns class names and colours of the tokens of a text."""
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
  """Returns 'rgb(r, g, b)' as three numbers in [0, 1]."""
  return np.array([int(x) for x in color[4:-1].split(',')]) / 255


def luminance(color):
  """Returns the relative luminance of WCAG 2."""
  linear = np.where(
    color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4
  )
  return linear @ [0.2126, 0.7152, 0.0722]


# In the browser


def test_text_at_every_step_is_the_canvas(opened, recordings, tokenizer):
  """Keys move the slider to the end and back to the start."""
  from selenium.webdriver.common.keys import Keys

  slider, last = element(opened, '#slider'), last_step(recordings)
  for step in range(last + 1):
    assert at(opened) == step
    assert shown(opened) == texts(recordings, tokenizer, step)
    label = element(opened, '#step').text
    assert label == f'step {step} of {last}'
    slider.send_keys(Keys.ARROW_RIGHT)
  slider.send_keys(Keys.HOME)
  assert shown(opened) == texts(recordings, tokenizer, 0)


def test_pointer_moves_the_slider(opened, recordings, tokenizer):
  element(opened, '#slider').click()  # at its middle
  step = at(opened)
  assert 0 < step < last_step(recordings)
  assert shown(opened) == texts(recordings, tokenizer, step)


def test_buttons_and_keys_step_and_play(opened, recordings, tokenizer):
  from selenium.webdriver.common.action_chains import ActionChains
  from selenium.webdriver.common.keys import Keys

  last = last_step(recordings)
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
  assert shown(opened) == texts(recordings, tokenizer, last)


def until(true, seconds=30):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_confidence_colours_are_readable(opened, recordings, scheme):
  """Colours are matplotlib's viridis; lightness rises with confidence."""
  set_window(opened, DESK, scheme)
  opened.execute_script('show(last)')
  committed = []
  for row, r in enumerate(recordings):
    for span, confidence in zip(spans(opened, row), r.confidence, strict=True):
      assert ('committed' in span['names']) == (not np.isnan(confidence))
      if 'committed' in span['names']:
        committed.append((confidence, rgb(span['back']), rgb(span['ink'])))
  assert len(committed) > 20
  viridis = matplotlib.colormaps['viridis']
  for confidence, back, ink in committed:
    np.testing.assert_allclose(back, viridis(confidence)[:3], atol=0.07)
    dark, light = sorted([luminance(back), luminance(ink)])
    assert (light + 0.05) / (dark + 0.05) >= 4.5
  levels = [
    luminance(back) for _, back, _ in sorted(committed, key=lambda c: c[0])
  ]
  assert (np.diff(levels) > -1e-3).all()


def test_masked_given_and_new_tokens_look_different(opened, recordings):
  opened.execute_script('show(3)')
  backs = {}
  for row, r in enumerate(recordings):
    found = spans(opened, row)
    for span, step, slot in zip(found, r.steps, r.fill, strict=True):
      assert ('given' in span['names']) == (not slot)
      assert ('masked' in span['names']) == (step > 3)
      assert ('new' in span['names']) == (step == 3)
      backs |= dict.fromkeys(span['names'], span['back'])
  looks = [backs[name] for name in ('given', 'masked', 'committed')]
  assert len(set(looks)) == 3 and looks[0] == 'rgba(0, 0, 0, 0)'


def test_block_edges_are_at_block_starts(opened, recordings):
  size = SETTINGS['block_length']
  found = opened.execute_script(
    """
    return [...document.querySelectorAll('.text')].map(text =>
      [...text.querySelectorAll('.edge')].map(edge =>
        [Number(edge.dataset.block), Number(edge.nextSibling.dataset.at)]));
    """
  )
  (slots,) = np.nonzero(recordings[0].fill)
  blocks = range(-(-len(slots) // size))
  assert found[0] == [[b + 1, slots[b * size]] for b in blocks]
  assert found[1] == []  # a single block


def test_tooltip_names_token_step_and_confidence(opened, recordings, tokenizer):
  from selenium.webdriver.common.action_chains import ActionChains

  tokens, _, steps, confidence = recordings[0]

  def tooltip(position):
    span = f'.t[data-text="0"][data-at="{position}"]'
    # The pointer must enter the token from outside.
    pointer = ActionChains(opened).move_to_element(element(opened, 'h1'))
    pointer.move_to_element(element(opened, span)).perform()
    return element(opened, '#tip').text

  (slots,) = np.nonzero(recordings[0].fill)
  slot = next(i for i in slots if steps[i] > 1)
  assert 'masked slot of block' in tooltip(slot)
  assert str(tokens[slot]) not in tooltip(slot)
  opened.execute_script('show(last)')
  tip = tooltip(slot)
  assert tip.startswith(json.dumps(tokenizer.decode(tokens[[slot]])))
  assert f'token {tokens[slot]}, position {slot}' in tip
  assert f'committed in step {steps[slot]}' in tip
  assert f'confidence {confidence[slot]:.3f}' in tip
  assert tooltip(slots[-1]).startswith('<eos>')
  assert 'not predicted' in tooltip(slots[-1])
  assert tooltip(0).startswith('<bos>') and 'given' in tooltip(0)
  owl = tokenizer.encode('🦉')
  (byte,) = [i for i in slots if tokens[i] == owl[-1]]
  assert tooltip(byte).startswith('byte 89')  # F0 9F A6 89


@pytest.mark.parametrize('size', [PHONE, DESK], ids=['phone', 'desk'])
def test_page_fits_the_window(opened, size):
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


def test_page_fetches_nothing_and_logs_no_errors(opened, page):
  """The log also covers the actions of the tests above."""
  opened.execute_script('show(last)')
  assert opened.get_log('browser') == []
  assert browser_lib.requested_urls(opened, page.as_uri()) == {page.as_uri()}


def test_content_policy_refuses_fetches(opened):
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
  """Collects the contents of the scripts of a page."""

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


def test_texts_cannot_inject_html(page):
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


def test_canvas_after_a_step_has_the_slots_filled_until_then(recordings):
  for r in recordings:
    for step in range(num_steps(r) + 2):
      masked = canvas_after(r, step, -1) == -1
      np.testing.assert_array_equal(masked, r.fill & (r.steps > step))
      assert (canvas_after(r, step, -1) == r.tokens)[~masked].all()
    assert not masked.any()


def test_confidence_that_is_not_finite_leaves_the_page_strict(tokenizer):
  fill, steps = np.ones(3, bool), np.array([1, 2, 3])
  r = Recording(
    np.array([7, 8, 9]), fill, steps, np.array([0.5, -np.inf, np.inf])
  )
  parser = Scripts()
  parser.feed(replay.page([r], tokenizer, ['a'], SETTINGS))
  (text,) = json.loads(parser.found[0], parse_constant=pytest.fail)['texts']
  assert text['confidence'] == [0.5, None, None]


def test_slot_without_a_token_is_masked_at_every_step(tokenizer):
  """Also if its row is replayed beside another one."""
  nan, mask = np.nan, tokenizer.mask_id
  fill, confidence = np.array([False, True, True]), np.array([nan, 0.5, nan])
  r = Recording(
    np.array([7, mask, mask]), fill, np.array([0, 1, 0]), confidence
  )
  assert canvas_after(r, 1, mask).tolist() == [7, mask, mask]
  text = replay.page([r], tokenizer, ['a'], SETTINGS)
  parser = Scripts()
  parser.feed(text)
  data = json.loads(parser.found[0])
  assert (data['steps'], data['texts'][0]['steps']) == (1, [0, 1, 2])
