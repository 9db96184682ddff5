"""Chromium without a head, for tests that look at a page."""

import contextlib
import json
import shutil

import pytest

# As root there is no sandbox; the rest keeps Chromium from asking the network
# for things of its own.
FLAGS = (
  '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
  '--disable-background-networking --disable-component-update --disable-sync'
).split()
CHROMIUMS = ('chromium', 'chromium-browser', 'google-chrome')
PHONE, DESK = (390, 844), (1280, 900)


@contextlib.contextmanager
def started(profile):
  """A Chromium with this directory for its profile; skips without one."""
  binary = next(filter(None, map(shutil.which, CHROMIUMS)), None)
  driver = shutil.which('chromedriver')
  if not binary or not driver:
    pytest.skip(
      'no chromium and chromedriver here: on Debian, '
      'apt-get install chromium chromium-driver'
    )
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = binary
  for flag in FLAGS:
    options.add_argument(flag)
  options.add_argument(f'--user-data-dir={profile}')
  logs = {'performance': 'ALL', 'browser': 'ALL'}
  options.set_capability('goog:loggingPrefs', logs)
  chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
  yield chromium
  chromium.quit()


def look(browser, size, scheme='light'):
  """Sets the width and height of the window, and light or dark."""
  width, height = size
  metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
  features = [dict(name='prefers-color-scheme', value=scheme)]
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=features))


def element(browser, name):
  return browser.find_element('css selector', name)


def beyond(browser):
  """Pixels that the page is wider than the window, and its rightmost one."""
  return browser.execute_script(
    """
    const all = [...document.querySelectorAll('body, body *')];
    const right = Math.max(...all.map(e => e.getBoundingClientRect().right));
    const {scrollWidth, clientWidth} = document.documentElement;
    return [scrollWidth - clientWidth, right];
    """
  )


def requests(browser):
  """What was asked for since the log was last read: pairs of the address of the
  page that asked, and of what it asked for."""
  messages = [
    json.loads(entry['message'])['message']
    for entry in browser.get_log('performance')
  ]
  return [
    (m['params']['documentURL'], m['params']['request']['url'])
    for m in messages
    if m['method'] == 'Network.requestWillBeSent'
  ]


def asked(browser, uri):
  """Addresses that a page has asked for since its log was last read; data that
  it brings along itself has none."""
  return {
    url
    for page, url in requests(browser)
    if page == uri and not url.startswith('data:')
  }
