r"""What counts as the same mathematical answer: pairs that are equal, pairs that are not, and where the answer stands.

Each line of a table reads `reference | answer`, grouped by the notation it is about.
"""

import time

import pytest

from reward import notation
from reward.math_reward import MATH_VERIFY, answers_equal, math_score

EQUAL = r"""
degrees            90 | 90°
degrees            90^\circ | 90°
degrees            90^\circ | 90^{\circ}
degrees            90^\circ | 90 degrees
degrees            90° | 90 \text{ degrees}
degrees            -30 | -30\degree
degrees            \frac{270}{7} | \frac{270}7^\circ
degrees            20 | 20°C
degrees            \pi/6 | \frac{\pi}{6}
roots              \sqrt2 | √2
roots              2\sqrt{3} | 2√3
roots              2\sqrt{3} | √12
roots              \sqrt{15} | √15
roots              \sqrt{x+1} | √(x+1)
roots              \sqrt[3]{2} | ∛2
roots              \sqrt[3]{7} | 7^{1/3}
roots              3\sqrt{2} | \sqrt{18}
unicode            \frac{1}{2} | ½
unicode            1\frac34 | 1¾
unicode            0.75 | ¾
unicode            \frac{3}{4} | 3⁄4
unicode            x^2+1 | x²+1
unicode            10^{-3} | 10⁻³
unicode            x_1 | x₁
unicode            2\pi | 2π
unicode            3 \times 10^8 | 3×10⁸
unicode            x \le 3 | x ≤ 3
unicode            x \ge 3 | x ≥ 3
unicode            3 \pm \sqrt{2} | 3 ± √2
unicode            (-\infty, 2) \cup (3, \infty) | (−∞, 2) ∪ (3, ∞)
unicode            -5 | –5
unicode            12 | １２
currency           18 | 18€
currency           18 | €18
currency           18 | £18
currency           18 | 18\$
currency           18€ | 18
currency           \$18.90 | 18.9
currency           \$1,500 | 1500
currency           18 | 18 \text{ dollars}
currency           18 | \text{€}18
currency           18 | \euro 18
scientific         300000000 | 3e8
scientific         300000000 | 3E8
scientific         3 \times 10^8 | 3e8
scientific         0.00003 | 3e-5
scientific         1e-07 | 0.0000001
scientific         1e-07 | 10^{-7}
scientific         1e-07 | 1 \times 10^{-7}
scientific         1e+22 | 10000000000000000000000
scientific         6.63\times10^{-34} | 6.63e-34
scientific         6.63e-34 | 6.63 \cdot 10^{-34}
scientific         6.63\times10^{-34} | 66.3\times10^{-35}
scientific         (6.63\times10^{-34}, 1) | (6.63e-34, 1)
scientific         -2.5\times10^{3} | -2500
tiny               \frac{1}{2004!} | \frac{2005}{2005!}
tiny               10^{-20}\sqrt{2} | \frac{\sqrt{2}}{10^{20}}
grouping           1000 | 1\,000
grouping           10000 | 10 000
grouping           10000 | 10~000
grouping           1234567 | 1\,234\,567
grouping           1000 | 1{,}000
grouping           1000 | 1\;000
grouping           1000 | 1{\,}000
grouping           10000 | 10 000
grouping           10000 | 10 000
grouping           1234.5 | 1\,234.5
grouping           1000000 | 1 000 000 \text{ people}
repeating          \frac13 | 0.\overline3
repeating          \frac{1}{3} | 0.\overline{3}
repeating          \frac{1}{3} | 0.\bar{3}
repeating          \frac{1}{6} | 0.1\overline{6}
repeating          \frac{4}{33} | 0.\overline{12}
repeating          0.\overline{3} | \frac{1}{3}
repeating          \frac13 | 0.(3)
repeating          \frac13 | 0.\dot{3}
repeating          1 | 0.\overline{9}
repeating          -\frac{13}{6} | -2.1\overline{6}
decimals           \frac13 | 0.333333
decimals           \frac{1}{19} | 0.052632
decimals           \frac{1}{2} | .5
percent            3.5 | 3.5%
percent            3.5\% | 3.5%
percent            3.5\% | 0.035
percent            3.5% | 3.5
percent            50\% | \frac12
percent            0.5 | 50%
percent            50 | 50 percent
percent            12.5\% | \frac{1}{8}
mixed              21\frac{17}{20} | 21 17/20
mixed              21.85 | 21 17/20
mixed              \frac{437}{20} | 21 17/20
mixed              -\frac{3}{2} | -1\frac12
mixed              -1.5 | -1 1/2
mixed              137 \frac{1}{2} | 137.5
ordinals           12 | 12^{\text{th}}
ordinals           12 | 12th
ordinals           12^{th} | 12
ordinals           1 | 1st
ordinals           12 | 12\text{th}
ordinals           12 | 12^\text{th}
ordinals           2 | 2^{\mathrm{nd}}
ordinals           3 | 3^{rd}
options            E | \text{E: 42}
options            42 | \text{E: 42}
options            \text{(E)} | \text{E: 42}
options            \text{(C)} | C
options            C | (C) 5
options            C | C) 5
options            \text{(C)} | \textbf{(C)}\ 12
options            12 | \textbf{(C)}\ 12
options            C | C.
options            \text{E: 42} | E
options            B | \text{(B) Paris}
units              5 | 5\text{ cm}
units              5\text{ cm} | 5\,\mathrm{cm}
units              864 \mbox{ inches}^2 | 864 \text{ square inches}
units              5.4 \text{ cents} | 5.4
units              5\text{ km} | 5 \text{ kilometers}
units              12 | 12 \text{ m/s}
units              12 | 12 km/h
variables          2+i | 2+\mathrm{i}
bases              (5_8, 3) | (5_{8}, 3)
bases              \frac{52_8}{x} | \frac{52_{8}}{x}
units              12 | 12 \text{ apples}
bases              52_8 | 52_{8}
bases              52_8 | 52_{\text{8}}
bases              52_8 | 52
bases              204_5 | (204)_5
lists              1,2,\ldots,n | 1, 2, …, n
lists              1,2,\dots,n | 1,2,...,n
lists              1,-2 | -2, 1
lists              1,2 | 1 \text{ and } 2
lists              3, 5, 7 | 3,5,7
sets               \{1,2\} | \{2, 1\}
sets               [2,7) | \left[2, 7\right)
sets               x \in [-2,7] | [-2,7]
sets               (3, \frac{\pi}{2}) | \left(3,\frac{\pi}{2}\right)
words              \text{Amy} | Amy
words              Amy | \text{amy}
words              \text{even} | \textbf{Even}
words              \text{Monday, Friday} | Friday, Monday
words              \text{no solution} | No solution
words              abc | a \cdot b \cdot c
quantifiers        \forall x, x > 0 | \forall x,\; x>0
closed             1024 | 2^{10}
closed             2^{10} | 1024
closed             0.75 | \frac{3}{4}
closed             15 | \frac{30}{2}
closed             15 | \sqrt{225}
closed             120 | 5!
closed             3\sqrt{2} | 3 \cdot \sqrt{2}
closed             18+2\pi | 2\pi + 18
closed             1+2\sqrt{3} | 2\sqrt3 + 1
closed             6 - 5i | -5i+6
closed             11\sqrt5+11 | 11(\sqrt{5}+1)
closed             2^3 \cdot 3 | 3 \cdot 2^3
closed             2^{100} - 1 | -1 + 2^{100}
closed             3^{10} - 1 | 3^{10}-1
closed             15 | x = 15
scale              2000000 | 2 million
scale              2.5 \text{ million people} | 2,500,000
text               42 | \text{42}
text               42 | $42$
text               42 | \(42\).
text               42 | {42}
text               \frac12 | \mathbf{\frac{1}{2}}
text               \frac12 | \text{1/2}
closed             15 | 14+1=15
closed             15 | 3 \times 5 = 15
whole text         12 | \text{12 cm}
whole text         1:6 | \text{1:6}
whole text         A,B | \text{B, A}
named options      B | \text{Option B}
text of an option  C | C. \text{Paris}
text of an option  \text{Paris} | C. \text{Paris}
other names        \emptyset | \varnothing
other names        \infty | \text{infinity}
programs           2\pi | 2pi
programs           x^2 | x**2
both signs         \frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2} | \frac{-1 \pm \sqrt5}{2}
intervals          (3,\infty) | x > 3
intervals          [-1,3] | -1 \le x \le 3
unknowns           500(1.03)^n | 500(1+0.03)^n
units              25\pi | 25\pi square units
currency           12 | 12¢
"""

UNEQUAL = r"""
tiny               \frac{1}{2006!} | \frac{1}{2004!}
tiny               \frac{1}{2004!} | 0
tiny               6.63\times10^{-34} | 1.05\times10^{-34}
tiny               1e-07 | 2e-07
tiny               10^{-20} | 10^{-21}
tiny               10^{-20}\sqrt{2} | 10^{-20}\sqrt{3}
tiny               (1e-9, 1) | (2e-9, 1)
tiny               [10^{-9}, 1] | [10^{-8}, 1]
tiny               x = 10^{-9} | x = 10^{-8}
tiny               \{10^{-9}\pi, 2\} | \{10^{-8}\pi, 2\}
tiny               10^{-9}x | 10^{-8}x
tiny               \begin{pmatrix} 10^{-9} \\ 2 \end{pmatrix} | \begin{pmatrix} 10^{-8} \\ 2 \end{pmatrix}
tiny               \begin{pmatrix} 1.5\cdot10^{-9} \\ 2 \end{pmatrix} | \begin{pmatrix} 1.6\cdot10^{-9}\\2 \end{pmatrix}
tiny               0 | 10^{-30}
tiny               0 | 1e-30
question           15 | 4+2+8+1
question           15 | [4+2+8+1]
question           15 | (4+2+8+1)
question           15 | \left(4+2+8+1\right)
question           15 | \{4+2+8+1\}
question           15 | 3 × 5
question           15 | 3 \cdot 5
question           15 | 3·5
question           15 | 30 ÷ 2
question           15 | 20 − 5
question           15 | \text{4+2+8+1}
question           15 | 4+2+8+1 \text{ apples}
question           15 | 3 × 5 \text{ cm}
question           15 | \text{the sum } 4+2+8+1
question           15 | 4+2+8+1 = ?
question           15 | x = 4+2+8+1
question           15 | x = 3 \times 5
question           15 | \$4+2+8+1
question           15 | 15 = 14 + 1
question           15 | \frac{60}{4} + 0
question           15 | 2 \cdot 7.5
question           15 | 2^3 + 7
question           15 | 3!+9
question           \frac34 | \frac12+\frac14
question           \frac34 | \frac{1+2}{4}
question           5 | \sqrt{9+16}
question           6\sqrt5 | 2 \cdot 3 \cdot \sqrt{5}
question           (3,5) | (1+2, 5)
question           3,5 | 1+2, 5
question           15 | \sum_{i=1}^{5} i
question           \frac12 | \int_0^1 x\,dx
question           3 | \log_2 8
question           12\% | 10\% + 2\%
anagrams           \text{Amy} | May
anagrams           Amy | May
anagrams           Amy | \text{May}
anagrams           \text{Amy} | \text{May}
anagrams           \text{even} | neve
anagrams           \text{no} | on
anagrams           \text{Amy, Bob} | May, Bob
anagrams           \text{dog} | \text{god}
anagrams           \text{Amy} | M a y
anagrams           (\text{Amy}, 5) | (May, 5)
anagrams           east | seat
words              \text{odd} | \text{even}
words              \text{true} | \text{false}
words              n \text{ even} | n \text{ odd}
words              5 \text{ pm} | 5 \text{ am}
words              3 \text{ north} | 3 \text{ south}
bases              52_8 | 52_9
bases              52_{8} | 52_{16}
bases              52_8 | 53_8
bases              4210_{5} | 4210_{6}
bases              52_{\text{8}} | 52_{\text{9}}
bases              (204)_5 | (204)_6
lists              1,2,\ldots,n | 1,2,n
lists              1,2,\ldots,n | 1,2
lists              1,2,\ldots,n | 1,2,\ldots,m
lists              1,2,3 | 1,2,\ldots,3
lists              1,2,\dots,n | 1,3,...,n
lists              1,2 | 1
lists              1 | 1,2
lists              1 | \(1\) or \(2\)
lists              1 | $1$, $2$
lists              2 | 1 \text{ or } 2
quantifiers        \forall x, x > 0 | \exists x, x > 0
quantifiers        \forall x \in \mathbb{R} | x \in \mathbb{R}
quantifiers        x > 0 \text{ for all } x | x > 0 \text{ for some } x
quantifiers        x > 0 \;\forall x | x > 0
quantifiers        \neg p | p
quantifiers        \exists x | x
modulo             3 \pmod 7 | 3 \pmod 5
primes             f'(x) | f(x)
intervals          [2,7) | (2,7]
intervals          [2,7) | [2,7]
intervals          (2,7) | [2,7]
intervals          [2,7) | [2,8)
sets               \{1,2\} | \{1,3\}
sets               (1,2) | (2,1)
sets               \{1,2\} | [1,2]
relations          x > 3 | x < 3
relations          x > 3 | x \ge 3
relations          x \ne 3 | x = 3
relations          x = 5 | y = 5
degrees            90° | 60°
degrees            90^\circ | 9
roots              \sqrt2 | √3
roots              \sqrt[3]{2} | √2
unicode            \frac12 | ⅓
unicode            x^2 | x³
unicode            12 | 1²
currency           18 | 19€
currency           18€ | \$18
scientific         3e8 | 3e7
scientific         3e8 | 38
grouping           10000 | 10 00
grouping           1000 | 1\,00
grouping           10000 | 1 0000
repeating          \frac13 | 0.\overline{6}
repeating          \frac13 | 0.3
repeating          0.\overline{12} | 0.1\overline{2}
percent            3.5\% | 35%
percent            50\% | 5000\%
percent            0.5 | 0.5\%1
mixed              21\frac{17}{20} | 21 \cdot \frac{17}{20}
mixed              1\frac12 | 11/2
mixed              \frac{17}{10} | 21 17/20
ordinals           12 | 13th
ordinals           12 | 1^{2\text{th}}
options            C | (D) 5
options            C | \text{E: 42}
options            42 | \text{E: 43}
options            C | \text{C or D}
options            C | C, D
options            C | (C) or (D)
options            A | (A), (B), (C)
variables          2x+3h | 2x+3
variables          5x + 3t | 5x + 3
variables          2xy | 2
variables          5m | 5g
variables          3a/b | 3
variables          3\mathbf{i}+2\mathbf{j} | 3\mathbf{i}+2\mathbf{k}
variables          2+\mathrm{i} | 2
scale              2 \text{ million} | 2
scale              2 \text{ million} | 2 billion
scale              3 \text{ thousand} | 3
units              5\text{ cm} | 5\text{ m}
units              5\text{ kg} | 5 \text{ g}
units              5\text{ hours} | 5 \text{ min}
units              5\text{ cm} | 6\text{ cm}
closed             2^{10} | 1023
closed             \frac{3}{4} | \frac{3}{5}
closed             3\sqrt{2} | 3\sqrt{3}
closed             120 | 6!
points             1100 | (1,100)
ratios             1:2:3 | 1:3:2
moduli             x \equiv 3 \pmod{7} | x \equiv 3 \pmod{5}
units over units   5 km/h | 5 m/s
changed numbers    5 | 5 squared
changed numbers    5 | 5 \text{ or more}
no unknowns        15 | 4+2+8+1+0x
intervals          [3,\infty) | x > 3
text of an option  \text{Paris} | C. \text{London}
both signs         \frac{1+\sqrt5}{2} | \frac{1 \pm \sqrt5}{2}
"""


def pairs(table: str) -> list:
    """The lines of a table as pytest's parameters."""
    rows = []
    for line in table.strip().split("\n"):
        kind, rest = line[:19].strip(), line[19:]
        reference, answer = rest.split(" | ")
        rows.append(pytest.param(reference, answer, id=f"{kind}: {rest}"))
    return rows


@pytest.mark.parametrize(("reference", "answer"), pairs(EQUAL))
def test_equal(reference, answer):
    assert answers_equal(answer, reference)


@pytest.mark.parametrize(("reference", "answer"), pairs(UNEQUAL))
def test_unequal(reference, answer):
    assert not answers_equal(answer, reference)


@pytest.mark.parametrize(
    ("response", "reference", "correct"),
    [
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "2,1", True),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "2", False),
        (r"$x=\boxed{3}$ and $y=\boxed{5}$", "5", True),
        (r"It is $\boxed 5$.", "5", True),
        (r"It is \fbox{5}.", "5", True),
        (r"It is \boxed{5}. I put it in \boxed{}.", "5", True),
        (r"<think>Perhaps \boxed{15}.</think> It is \boxed{16}.", "15", False),
        (r"<think>Perhaps \boxed{15}.</think> It is \boxed{16}.", "16", True),
        (r"<think>Perhaps \boxed{15}.</think> It is 16.", "15", False),
    ],
)
def test_where_the_answer_stands(response, reference, correct):
    assert math_score(response, reference).correct is correct


def test_numbers_need_no_worker():
    MATH_VERIFY.worker.close()
    for row in pairs(EQUAL):
        reference, answer = row.values
        if row.id.split(":")[0] in ("repeating", "grouping", "mixed", "percent", "ordinals", "scales", "decimals"):
            assert answers_equal(answer, reference)
    assert MATH_VERIFY.worker.process is None


def test_a_reference_that_json_writes_in_scientific_form():
    assert answers_equal("0.0000001", str(1e-7)) and answers_equal(r"10^{22}", str(1e22))
    assert not answers_equal("0.0000002", str(1e-7))


@pytest.mark.parametrize(
    "answer",
    ["\n" * 40_000, " " * 999 + "1", "\\," * 499, "1 " * 499, "(" * 999, "^" * 999, "\\text{" * 160, "9" * 1000,
     "1 000" * 199, "\\frac" * 199, "a" * 999, "1e" * 499, "'" * 999, "{" * 999, "x{\\,}" * 199],
)  # fmt: skip
def test_notation_takes_linear_time(answer):
    start = time.process_time()
    notation.plain.__wrapped__(answer[:1000])
    notation.contradict(answer[:1000], answer[:1000])
    assert time.process_time() - start < 0.1
