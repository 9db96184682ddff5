"""Headless Chromium for tests of HTML pages."""

import contextlib
import json
import shutil

import pytest

# Root needs --no-sandbox; the other flags stop Chromium's own network requests.
FLAGS = (
  '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
  '--disable-background-networking --disable-component-update --disable-sync'
).split()
CHROMIUMS = ('chromium', 'chromium-browser', 'google-chrome')
PHONE, DESK = (390, 844), (1280, 900)


@contextlib.contextmanager
def started(profile):
  """Starts Chromium with a profile directory; skips the test without one."""
  binary = next(filter(None, map(shutil.which, CHROMIUMS)), None)
  driver = shutil.which('chromedriver')
  if not binary or not driver:
    pytest.skip(
      'chromium and chromedriver are not installed: on Debian, '
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


def set_window(browser, size, scheme='light'):
  """Sets the size of the window, and the light or dark scheme."""
  width, height = size
  metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
  features = [dict(name='prefers-color-scheme', value=scheme)]
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=features))


def element(browser, name):
  """Returns the first element that matches a CSS selector."""
  return browser.find_element('css selector', name)


def overflow(browser):
  """Returns the overflow of the page in pixels, and its rightmost pixel."""
  return browser.execute_script(
    """
    const all = [...document.querySelectorAll('body, body *')];
    const right = Math.max(...all.map(e => e.getBoundingClientRect().right));
    const {scrollWidth, clientWidth} = document.documentElement;
    return [scrollWidth - clientWidth, right];
    """
  )


def requests(browser):
  """Returns (address of the page, requested address) of all requests since the
  last call."""
  messages = [
    json.loads(entry['message'])['message']
    for entry in browser.get_log('performance')
  ]
  return [
    (m['params']['documentURL'], m['params']['request']['url'])
    for m in messages
    if m['method'] == 'Network.requestWillBeSent'
  ]


def requested_urls(browser, uri):
  """Returns the addresses that a page requested since the last call, without
  data: URLs."""
  return {
    url
    for page, url in requests(browser)
    if page == uri and not url.startswith('data:')
  }
