"""The report: one file with everything in it, safe to open, readable without pictures."""

import base64
from html.parser import HTMLParser

import numpy as np
import pytest

from eplb_core import Topology
from eplb_core.advise import advise
from eplb_core.advise.advice import explain
from eplb_core.costs import Costs, Links
from eplb_core.report import report
from eplb_core.simulate.configuration import grid
from eplb_core.simulate.replay import gain
from eplb_core.simulate.sweep import sweep

pytest.importorskip("matplotlib")

TOPOLOGY = Topology(ep_size=4, slots_per_rank=3)
COSTS = Costs(bytes_per_expert=1_500_000, scale=50.0, links=Links(latency=0.0))
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects the tags, texts and pictures of a page, and whether its tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def load():
    rng = np.random.default_rng(0)
    return rng.poisson(np.exp(rng.normal(size=(3, 10))) * 500, (16, 3, 10))


@pytest.fixture(scope="module")
def replays(load):
    return sweep(load, grid(TOPOLOGY, policy=["static", "greedy", "incremental"]), costs=COSTS)


@pytest.fixture(scope="module")
def page(load, replays):
    return report(load, replays, title="A <b>trace</b>", facts={"Model": 'x "&" <y>'})


def test_the_page_is_well_formed_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.open == []
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    sources = [value for _, name, value in parsed.attributes if name in ("src", "href", "srcset", "action")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page
    assert "@import" not in page


def test_pictures_are_pngs_with_a_text_for_those_who_cannot_see_them(page):
    parsed = Page(page)
    for source in (value for tag, name, value in parsed.attributes if (tag, name) == ("img", "src")):
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG\r\n")
    texts = [value for tag, name, value in parsed.attributes if (tag, name) == ("img", "alt")]
    assert len(texts) == 5
    assert all(len(text) > 40 for text in texts)


def test_what_others_wrote_is_escaped(page):
    parsed = Page(page)
    assert "b" not in parsed.tags
    assert "A <b>trace</b>" in parsed.text
    assert 'x "&" <y>' in parsed.text


def test_the_table_holds_the_figures(page, replays):
    text = Page(page).text
    for replay in replays:
        row = text.index(replay.configuration.label)
        assert f"{replay.mean_balancedness:.3f}" in text[row : row + 6]
        assert f"{replay.moved_experts:,}" in text[row : row + 10]
    last = text.index(replays[2].configuration.label)
    assert f"{gain(replays[2], replays[0]).share:+.1%}" in text[last : last + 20]
    assert "16 windows, 3 layers, 10 experts" in text
    assert "4, 3 slots each, 2 redundant experts" in text
    assert "1.5 MB" in text


def test_advice_comes_first(load, replays):
    advice = advise(load, 4, costs=COSTS, policies=["greedy"])
    page = report(load, replays, title="t", advice=advice)
    text = Page(page).text
    assert explain(advice) in text
    assert text.index(explain(advice)) < text.index("What each policy does")
    assert ('class="advice"' in page) is advice.recommend
    refused = advise(load[:4], 4, costs=COSTS)
    assert 'class="advice no"' in report(load, replays, title="t", advice=refused)


def test_the_same_replays_make_the_same_page(load, replays, page):
    assert report(load, replays, title="A <b>trace</b>", facts={"Model": 'x "&" <y>'}) == page


def test_a_report_of_static_placements_has_no_transfers(load, replays):
    page = report(load, replays[:1], title="t")
    assert "Transfers of one plan" not in page
    assert page.count("<img") == 4
