"""Claims about templates from anywhere: they reach no code, and cost little whatever they say."""

from __future__ import annotations

import pytest

from dro_rl.errors import InputError
from dro_rl.prompts import TEMPLATES, load_template
from dro_rl.prompts.sandbox import BoundedEnvironment, Exhausted
from dro_rl.records import Document

DOCUMENTS = [Document("a", "Owls", "An owl.\nIt flies."), Document("b", "", "A heron.")]


@pytest.fixture
def render(tmp_path):
    def render(source: str) -> str:
        path = tmp_path / "mine.jinja"
        path.write_text(source, encoding="utf-8")
        return load_template(str(path)).render("Which bird?", DOCUMENTS, k=2, example="[2] > [1]")

    return render


CODE = {
    "a global's module": "{{ cycler.__init__.__globals__.os.system('echo') }}",
    "a text's class": "{{ question.__class__.__mro__[1].__subclasses__() }}",
    "a document's class": "{{ documents[0].__class__ }}",
    "by item": "{{ question['__class__'] }}",
    "by attribute's name": "{{ documents | map(attribute='__class__') | first }}",
    "by a format string": "{{ '{0.__class__}'.format(question) }}",
    "by a macro": "{% macro m() %}{% endmacro %}{{ m.__init__ }}",
    "by the namespace's class": "{{ namespace.__init__.__globals__ }}",
    "a change of what it is given": "{{ documents.append(1) }}",
    "another file": "{% include '/etc/hostname' %}",
}


@pytest.mark.parametrize("case", CODE)
def test_a_template_reaches_no_code_and_changes_nothing(render, case: str) -> None:
    with pytest.raises(InputError, match=r"a template renders from question") as error:
        render(CODE[case])
    assert len(str(error.value).splitlines()) == 1
    assert len(DOCUMENTS) == 2


NAMESPACE = "{% set n = namespace(x='xx') %}{% for i in range(99) %}"
EXPENSIVE = {
    "a text times a number": "{{ 'x' * 3000000000 }}",
    "a text times a float": "{{ 'x' * 3e9 }}",
    "a list times a number": "{{ [question] * 3000000000 }}",
    "a padded format string": "{{ '%1000000000s' % question }}",
    "a padded format method": "{{ '{:1000000000}'.format(question) }}",
    "a padding method": "{{ question.ljust(1000000000) }}",
    "a padding filter": "{{ question | center(1000000000) }}",
    "an indentation": "{{ question | indent(1000000000, true) }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a power of a power": "{{ ((9 ** 60) ** 60) ** 60 }}",
    "a long range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "many loops in loops": "{% for i in question %}" * 12 + "x" + "{% endfor %}" * 12,
    "loops too deep for Python": "{% for i in range(2) %}" * 40 + "x" + "{% endfor %}" * 40,
    "doubling by ~": NAMESPACE + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": NAMESPACE + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by a block": NAMESPACE + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling by replace": NAMESPACE + "{% set n.x = n.x | replace('x', 'xx') %}{% endfor %}",
    "doubling by a method": NAMESPACE + "{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "doubling by join": NAMESPACE + "{% set n.x = [n.x, n.x] | join(n.x) %}{% endfor %}",
    "lists in lists": NAMESPACE + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "namespaces in namespaces": NAMESPACE + "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x | string }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro that calls itself for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for d in documents recursive %}{{ loop(documents) }}{% endfor %}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a long template": "x" * 300_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", EXPENSIVE)
def test_a_template_that_costs_more_than_a_prompt_is_refused(render, case: str) -> None:
    """Each of these took gigabytes, or for ever."""
    with pytest.raises(InputError, match=r"a template (renders|is valid)") as error:
        render(EXPENSIVE[case])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ documents | map(attribute='title') | select | join(', ') }}", "Owls"),
        ("{% for d in documents if d.title %}{{ loop.index }}/{{ loop.length }} {{ d.title }}{% endfor %}", "1/1 Owls"),
        ("{% for d in documents %}{{ loop.index }}{{ ', ' if not loop.last }}{% endfor %}", "1, 2"),
        ("{% for d in documents %}{{ loop.cycle('a', 'b') }}{% endfor %}", "ab"),
        ("{% for d in documents | reverse %}{{ d.id }}{% endfor %}{{ documents[1:] | length }}", "ba1"),
        ("{{ documents[0].text.splitlines()[1] }} {{ question.split(' ')[0].lower() }}", "It flies. which"),
        ("{{ documents[0].text | indent(2) | replace('owl', 'auk') }}", "An auk.\n  It flies."),
        ("{{ question[:5] ~ '…' ~ (k * 2 + 1) }} {{ 7 % 2 }} {{ 2 ** 10 }} {{ -k }}", "Which…5 1 1024 -2"),
        ("{{ missing is defined }} {{ missing | default('none') }} {{ k > 1 and 'many' }}", "False none many"),
        ("{% set n = namespace(found=0) %}{% for d in documents if 'heron' in d.text %}{% set n.found = loop.index %}"
         "{% endfor %}{{ n.found }}", "1"),
        ("{% macro show(d) %}<{{ d.id }}>{% endmacro %}{{ show(documents[0]) }}", "<a>"),
        ("{% set words = {'en': 'Answer:', 'nl': 'Antwoord:'} %}{{ words['nl'] }} {{ words.en }}", "Antwoord: Answer:"),
        ("{% filter upper %}{{ question }}{% endfilter %}{% raw %}{{ x }}{% endraw %}{# said #}", "WHICH BIRD?{{ x }}"),
        ("{{ question | tojson }} {{ question | truncate(5, true, '', 0) }}", '"Which bird?" Which'),
    ],
)  # fmt: skip
def test_what_prompts_need_is_there(render, source: str, text: str) -> None:
    assert render(source).rstrip() == text


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_the_shipped_templates_render_a_thousand_long_documents(name: str) -> None:
    """The bound grows with what a template is given."""
    documents = [Document(str(i), f"Title {i}", "A sentence of a document. " * 80) for i in range(1000)]
    text = load_template(name).render("Which bird?", documents, k=5, example="[2] > [1]")
    assert all(document.text in text for document in documents[::100])


def test_an_allowance_is_of_one_rendering() -> None:
    """Guards against a bound that is reached by the millionth prompt of a run."""
    environment = BoundedEnvironment()
    template = environment.template("{% for i in range(30000) %}{% endfor %}")
    for _ in range(3):
        assert environment.render(template, 0, {}) == ""
    with pytest.raises(Exhausted):
        environment.render(environment.template("{% for i in range(99999) %}{% endfor %}"), 0, {})
