"""The site of the docs builds without warnings and needs no network.

`mkdocs build --strict` fails on a broken link, a page outside the navigation,
and a docstring whose arguments differ from those of the function.
"""

import ast
import functools
import html.parser
import http.server
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import threading

import browser as browser_lib
import pytest
from browser import DESK, PHONE, element, set_window

pytestmark = pytest.mark.slow  # builds the site
ROOT = pathlib.Path(__file__).parents[2]
SHOWN = (
  'index',
  'from_laptop_to_pod',
  'how_to/add_an_objective',
  'api/data',
)
# Elements that fetch something, and the attribute with its address.
FETCHES = {'script': 'src', 'img': 'src', 'link': 'href', 'iframe': 'src'}


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """Returns the directory of the site, built with warnings as errors."""
  if not importlib.util.find_spec('mkdocs'):
    pytest.skip('no mkdocs here: pip install -r requirements-docs.txt')
  folder = tmp_path_factory.mktemp('site')
  result = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', str(folder)],
    cwd=ROOT,
    env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert 'WARNING' not in result.stderr
  return folder


class Fetched(html.parser.HTMLParser):
  """Addresses that a page fetches, and its ids."""

  def __init__(self, text):
    super().__init__()
    self.urls, self.ids = [], set()
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.ids.add(attributes.get('id'))
    if attributes.get('rel') not in ('canonical', 'prev', 'next'):
      self.urls.append(attributes.get(FETCHES.get(tag)))


def test_every_document_is_a_page(site):
  documents = [p.relative_to(ROOT / 'docs') for p in ROOT.glob('docs/**/*.md')]
  assert len(documents) > 15
  for document in documents:
    assert (site / document.with_suffix('.html')).exists(), document


def test_no_page_fetches_from_other_hosts(site):
  pages = list(site.rglob('*.html'))
  for page in pages:
    urls = filter(None, Fetched(page.read_text()).urls)
    assert not [u for u in urls if re.match(r'(\w+:)?//', u)], page
  styles = [p.read_text() for p in site.rglob('*.css')]
  assert styles and not re.search(
    r'(@import|url\()\s*["\']?(\w+:)?//', '\n'.join(styles)
  )


def test_api_pages_list_arguments_and_errors(site):
  """All sections of docstrings are on a page of the API."""
  named = re.findall(
    r'^::: (\S+)',
    '\n'.join(p.read_text() for p in ROOT.glob('docs/api/*.md')),
    re.M,
  )
  assert len(named) == len(set(named)) > 40
  text = {p: p.read_text() for p in site.glob('api/*.html')}
  together = '\n'.join(text.values())
  ids = set().union(*(Fetched(page).ids for page in text.values()))
  titles = dict(Args='Parameters', Returns='Returns', Raises='Raises')
  written = dict.fromkeys(titles, 0)
  for name in named:
    source = (ROOT / f'{name.replace(".", "/")}.py').read_text()
    docs = {
      f'{name}.{f.name}': ast.get_docstring(f)
      for f in ast.parse(source).body
      if isinstance(f, ast.FunctionDef) and f.name[0] != '_'
    }
    assert {name, *(f for f, doc in docs.items() if doc)} <= ids
    for section in titles:
      written[section] += sum(
        f'\n{section}:\n' in (doc or '') for doc in docs.values()
      )
  for section, title in titles.items():
    shown = together.count(f'<span class="doc-section-title">{title}:</span>')
    assert shown >= written[section] > 50, section


@pytest.fixture(scope='module')
def address(site):
  """Address at which the site is served."""

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
      pass

  handler = functools.partial(Handler, directory=str(site))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(address, tmp_path_factory):
  with browser_lib.started(tmp_path_factory.mktemp('profile')) as chromium:
    yield chromium


@pytest.mark.parametrize('page', SHOWN)
def test_page_fits_phone_and_desktop_and_uses_no_other_host(
  browser, address, page
):
  """Commands wrap; wider elements scroll by themselves."""
  for size in (PHONE, DESK):
    set_window(browser, size)
    browser.get(f'{address}/{page}.html')
    assert (
      browser.execute_script('return document.documentElement.scrollWidth')
      <= size[0]
    )
    assert element(browser, 'h1').text
    assert browser.execute_script(
      "return [...document.querySelectorAll('.language-bash code')]"
      '.every(e => e.scrollWidth <= e.clientWidth)'
    )
  urls = [url for _, url in browser_lib.requests(browser)]
  urls = [url for url in urls if url.startswith('http')]
  assert urls and all(url.startswith(f'{address}/') for url in urls)
  assert not browser.get_log('browser')
