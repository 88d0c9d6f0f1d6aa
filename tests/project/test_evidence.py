"""The evidence page says what the result files say."""

from evidence_page import ROOT, filled

from tokenprune.evaluation.results_file import read_results

PAGE = ROOT / "docs" / "evidence.md"
RESULTS = sorted((ROOT / "docs" / "evidence").glob("*.jsonl"))


def test_every_table_is_what_report_prints():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page
    assert all(f"<!-- report docs/evidence/{path.name}" in page for path in RESULTS)


def test_results_are_of_the_shipped_weights():
    from tokenprune.evaluation.fingerprint import fingerprint
    from tokenprune.registry.discovery import Registry

    shipped = Registry.discover().backbone_factory("openvla-oft").describe("mini", None, {}).weights
    assert RESULTS
    for path in RESULTS:
        assert read_results(path).settings["weights"] == fingerprint(shipped)
