"""Answers found in texts with reasoning, and compared by value."""

import time

import pytest

from maskdiff.rl import arithmetic, extraction, maths

REASONED = 'First 3 * 4 = 12.\nThen 12 - 5 = 7,\nso it is done.\n'


@pytest.mark.parametrize(
  'text, found',
  [
    (f'<reasoning>\n{REASONED}</reasoning>\n<answer>\n7\n</answer>\n', '7'),
    ('<answer>1</answer> no, <answer>2\n</answer> then 9', '2'),
    ('<answer>1</answer> and <answer>2', '1'),
    (REASONED + '<answer></answer>', ''),
    (REASONED + r'So \boxed{\frac{1}{2}} and #### 8', r'\frac{1}{2}'),
    (r'\boxed{1}, and \fbox{ \{2\} } 9', r'\{2\}'),
    (REASONED + '#### 1\nor\n#### 7 \nsurely', '7'),
    (REASONED + '####', ''),
    (REASONED + 'The answer is: **$7$**.\nI checked it 3 times', '$7$'),
    ('The answer is 7. I counted 3.', '7'),
    (REASONED + 'It costs -1,234.50 coins.', '-1,234.50'),
    (REASONED + 'It is 10-3', '3'),
    ('in all 3/4', '3/4'),
    ('1, 2, 30,', '30'),
    (r'\boxed{1', '1'),
    ('nothing', None),
    ('', None),
  ],
)
def test_answer_is_found_after_reasoning(text, found):
  assert extraction.extract(text) == found


def test_rules_are_chosen():
  text = r'<answer>1</answer> \boxed{2} #### 3'
  assert extraction.extract(text, ('boxed', 'tags')) == '2'
  assert extraction.extract('the answer is 4', ('hashes',)) is None


@pytest.mark.parametrize(
  'text, answer',
  [
    ('1/2', '0.5'),
    (r'\dfrac12', '.5'),
    ('3.0', '3'),
    (r'2\sqrt{3}', r'\sqrt{12}'),
    ('sqrt(16)', '4'),
    ('8^{1/3}', '2'),
    ('2^-1', '1/2'),
    ('(x+1)^2', 'x^2+2x+1'),
    (r'\frac{1}{x}+\frac{1}{y}', '(x+y)/(xy)'),
    ('-x^2', '-(x^2)'),
    ('i^2', '-1'),
    ('1,000', '1000'),
    (r'\$1{,}000', '1000'),
    (r'50\%', '50'),
    (r'90^\circ', '90'),
    ('42 apples.', '42'),
    ('10', r'10\text{ cm}'),
    ('x = 5', '5'),
    (r'-1\frac{1}{2}', '-1 1/2'),
    ('−3', '$-3$'),
    (r'\left(3, \frac{\pi}{2}\right)', '(3,pi/2)'),
    (r'\{1,2\}', r'\{2,1\}'),
    ('1, 2', '1,2'),
    ('YES', 'yes'),
    (r'\text{(C)}', '(C)'),
  ],
)
def test_equivalent_answers(text, answer):
  assert maths.equivalent(text, answer)
  assert maths.equivalent(answer, text)


@pytest.mark.parametrize(
  'text, answer',
  [
    ('', ''),
    ('', '0'),
    ('3.14159', 'pi'),
    ('0.333', '1/3'),
    ('10^50', '10^50+1'),
    ('2x', '2'),
    ('x', 'y'),
    ('42 or 43', '42'),
    ('1 2', '12'),
    ('1,2', '12'),
    ('(1,2)', '(2,1)'),
    ('(1,2)', '[1,2]'),
    (r'\{1,1\}', r'\{1,2\}'),
    ('10 cm', '10 kg'),
    ('monday', 'dynamo'),
    ('1/0', '1'),
    ('2(3', '6'),
    ('__import__("os")', '1'),
  ],
)
def test_different_answers(text, answer):
  assert not maths.equivalent(text, answer)
  assert not maths.equivalent(answer, text)


HOSTILE = (
  '9^9^9^9',
  '(1+1/7)^1000',
  '9' * 300,
  '9' * 10**6,
  '(' * 299,
  '-' * 299 + '1',
  r'\frac' * 60,
  r'\{1,' * 49 + r'\}' * 49,
  r'\{' + ','.join(['x^2'] * 55) + r'\}',
  '7^300/' * 40 + '3',
)


@pytest.mark.parametrize('text', HOSTILE, ids=lambda text: text[:12])
def test_comparison_of_any_text_is_quick(text):
  started = time.process_time()
  assert not maths.equivalent(text, '1')
  maths.equivalent(text, text.replace('x', 'y').replace('7', '5'))
  assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
  'piece', ['1,', '1,111', '-', '####', '<answer>', r'\boxed{', 'answer is ']
)
def test_extraction_takes_linear_time(piece):
  started = time.process_time()
  extraction.extract(piece * 50_000)
  assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
  'expression, basic, python',
  [
    ('03*(5+7)', 36, None),
    ('1/3*3', 1, 1.0),
    ('2**3', None, 8),
    ('7//2', None, 3),
    ('-3+5', None, 2),
    ('.5 +\t.5', 1, 1.0),
    ('1/0', None, None),
    ('3(5)', None, None),
    ('()', None, None),
    ('1,2', None, None),
    ('9**9**9', None, None),
    ('(' * 299 + '1' + ')' * 299, None, None),
    ('1+' * 600 + '1', None, None),
    ('', None, None),
  ],
  ids=range(14),
)
def test_value_of_an_expression(expression, basic, python):
  assert arithmetic.value(expression) == basic
  assert arithmetic.value(expression, arithmetic.PYTHON, False) == python
