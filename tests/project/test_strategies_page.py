"""The page of all strategies is what the code says."""

from strategies_page import ROOT, page

from tokenprune.registry.discovery import Registry


def test_the_page_is_up_to_date():
    written = (ROOT / "docs" / "strategies" / "all.md").read_text(encoding="utf-8")
    assert written == page(Registry.discover()), "run: python tools/strategies_page.py docs/strategies/all.md"
