"""The page: self-contained, escaped, a few boxes for a model of many layers, rewritten sites coloured."""

from __future__ import annotations

import html.parser
import re

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_report import sample
from tiny import llama, tokens
from torch import nn

import tilewright as tw
from tilewright.frontend.condense import MAX_BOXES, block_of, condense, condense_pair, merged_name
from tilewright.frontend.layout import GAP_X, layered
from tilewright.frontend.page import GraphPair, KernelSource, fragment, page, page_of
from tilewright.frontend.report import DeclinedSite, KernelReport, MatchedSite, NearMissSite, PassReport, Report
from tilewright.passes import SigmoidAttention, TwoPassSoftmax
from tilewright.passes.site import Site, get_site, set_site

EVIL = "<script>alert(1)</script>\"'&"


class Elements(html.parser.HTMLParser):
    """Tags with their attributes; fails on tags that do not nest."""

    VOID = ("meta", "br", "col", "path", "rect", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-5:], self.getpos())
            self.open.pop()


@pytest.fixture(scope="module")
def language_model():
    pytest.importorskip("transformers")
    kwargs = {"input_ids": tokens(), "use_cache": False}
    passes = [SigmoidAttention(), TwoPassSoftmax(force=True)]
    return tw.compile(llama(layers=12), passes, example_kwargs=kwargs, rest="eager", target="reference")


def test_page_needs_no_network_and_nests(language_model) -> None:
    text = page_of(language_model)
    elements = Elements(text)
    tags = {tag for tag, _ in elements.found}
    assert {"table", "svg", "h1", "style"} <= tags
    assert not tags & {"script", "link", "img", "iframe"}
    links = [value for _, attrs in elements.found for name, value in attrs.items() if name in ("href", "src")]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text


def test_many_layers_are_few_boxes(language_model) -> None:
    text = page_of(language_model)
    assert len(language_model.records[0].lowered.graph.nodes) > 300
    assert text.count("<rect") < 120
    assert "model.layers.{1-11} (11 alike)" in text or "model.layers.{0-11} (12 alike)" in text
    assert len(text) < 200_000


def test_rewritten_and_declined_sites_are_marked(language_model) -> None:
    text = page_of(language_model)
    elements = Elements(text)
    classes = [attrs.get("class") or "" for tag, attrs in elements.found if tag == "g"]
    assert any("pass0" in name for name in classes)
    assert "its normalizer is sigmoid" in text  # the second pass's reason
    untouched = tw.compile(llama(), example_kwargs={"input_ids": tokens(), "use_cache": False}, target="reference")
    assert not any("pass0" in (a.get("class") or "") for t, a in Elements(page_of(untouched)).found if t == "g")


def evil_report() -> Report:
    one = PassReport(EVIL, "exact", {EVIL: EVIL}, [MatchedSite(EVIL, EVIL, EVIL, None, {EVIL: EVIL})])
    one.declined, one.near_misses = [DeclinedSite(EVIL, EVIL, EVIL)], [NearMissSite(EVIL, EVIL, EVIL, EVIL)]
    report = Report([one], model=EVIL, warnings=[EVIL])
    report.kernels = [KernelReport(EVIL, EVIL, EVIL, EVIL, EVIL, "d", {EVIL: EVIL}, EVIL)]
    report.capture.fallback_reason, report.capture.graph_breaks = EVIL, [{"source": EVIL, "reason": EVIL}]
    report.raising.sites, report.raising.declined = [{"site": EVIL, "op": EVIL, "source": EVIL}], one.declined
    report.raising.near_misses = one.near_misses
    return report


def evil_graph() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2)
    y = graph.call_function(torch.ops.aten.relu.default, (x,))
    y.meta["val"] = torch.ones(2)
    set_site(y, Site(EVIL, EVIL, EVIL, "relu"))
    graph.output((y,))
    return torch.fx.GraphModule({}, graph)


def test_everything_is_escaped() -> None:
    graph = evil_graph()
    kernel = KernelSource(EVIL, "triton", EVIL, [EVIL], {EVIL: EVIL})
    for text in (page(evil_report(), [GraphPair(EVIL, graph, graph)], [kernel]), fragment(evil_report())):
        assert "<script" not in text.lower()
        assert "&lt;script&gt;" in text
        Elements(text)


def test_notebook_fragment() -> None:
    text = sample()._repr_html_()
    assert text.lstrip().startswith("<style>") and "<html" not in text
    assert "model.layers.{0-29}.self_attn/attention" in text and "fit in cache" in text
    assert text.count("<tr>") < 90
    Elements(text)


def test_empty_report_is_a_page() -> None:
    Elements(page(Report()))
    Elements(fragment(Report()))


def test_kernel_sources_are_highlighted() -> None:
    text = page(
        Report(), kernels=[KernelSource("softmax-1", "triton", "def launch(x):\n    return x\n", ["2 x a"], {})]
    )
    assert '<span class="k">def</span>' in text
    cpp = page(Report(), kernels=[KernelSource("softmax-1", "cpp", "int main() { return 0; }\n", [], {})])
    assert '<span class="kt">int</span>' in cpp


# Condensing.


class Stack(nn.Module):
    def __init__(self, depth: int = 5, odd: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.odd = odd

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x).relu() if index != self.odd else block(x).tanh()
        return x


def raised(model, *args):
    return tw.compile(model.eval(), example_inputs=args, rest="eager", target="reference").records[0].raised


def test_different_blocks_stay_apart() -> None:
    names = [merged_name(new.members) for _, new in condense_pair(None, raised(Stack(odd=2), torch.ones(2, 4)))]
    assert names[0] == "inputs"
    assert "blocks.{0-1,3-4}" in names or {"blocks.{0-1}", "blocks.{3-4}"} <= set(names)
    assert "blocks.2" in names


def test_marks_keep_blocks_apart() -> None:
    graph = raised(Stack(), torch.ones(2, 4))
    sites = sorted(site.id for node in graph.graph.nodes if (site := get_site(node)) is not None)
    pairs = condense_pair(graph, graph, lambda site: "pass" if site == sites[1] else "")
    assert sorted(new.count for _, new in pairs if new.key.startswith("blocks")) == [1, 4]


def test_edges_run_forward_and_boxes_are_bounded(language_model) -> None:
    for segment in condense(language_model.records[0].lowered):
        dag = nx.DiGraph(segment.edges)
        assert nx.is_directed_acyclic_graph(dag)
        assert len(segment.boxes) <= MAX_BOXES + 10
        ids = {box.id for box in segment.boxes}
        assert len(ids) == len(segment.boxes) and set(dag) <= ids


def test_every_canonical_site_is_drawn(language_model) -> None:
    record = language_model.records[0]
    drawn = {site for segment in condense(record.lowered) for site in segment.sites}
    assert {site.id for site in record.sites} <= drawn


@pytest.mark.parametrize(
    ("path", "block"),
    [("model.layers.3.mlp", "model.layers.3"), ("layer.0", "layer.0"), ("0.1.conv", "0"), ("a.b", ""), ("conv2d", "")],
)
def test_block_of(path, block) -> None:
    assert block_of(path) == block


# Layout.


@given(
    st.integers(1, 14).flatmap(
        lambda n: st.tuples(
            st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=30, unique=True)
        )
    )
)
def test_layout(drawn) -> None:
    count, pairs = drawn
    edges = sorted({(min(p), max(p)) for p in pairs if p[0] != p[1]})
    sizes = {node: (40.0 + 7 * (node % 5), 20.0) for node in range(count)}
    picture = layered(sizes, edges)
    for a, b in edges:
        assert picture.positions[a].y < picture.positions[b].y
        ys = [point.y for point in picture.routes[a, b]]
        assert ys == sorted(ys)
    for a in sizes:
        place = picture.positions[a]
        assert -1e-6 <= place.x - sizes[a][0] / 2 and place.x + sizes[a][0] / 2 <= picture.width + 1e-6
        for b in sizes:
            if a < b and picture.positions[b].y == place.y:
                apart = abs(picture.positions[b].x - place.x)
                assert apart >= (sizes[a][0] + sizes[b][0]) / 2 + GAP_X - 1e-6


def test_layout_of_a_chain_is_straight() -> None:
    picture = layered({0: (50, 20), 1: (80, 20), 2: (30, 20)}, [(0, 1), (1, 2)])
    assert len({round(place.x, 3) for place in picture.positions.values()}) == 1


def test_layout_of_nothing() -> None:
    assert layered({}, []).height == 0
