""""""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "tools" / "lint_hot.py"


@pytest.fixture(scope="module")
def lint_hot():
    spec = importlib.util.spec_from_file_location("lint_hot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lint_hot"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lint_hot"]


PLANTED = [
    ("n = x.sum().item()", "host-copy"),
    ("y = x.cpu()", "host-copy"),
    ("y = x.to('cpu')", "host-copy"),
    ("y = x.to(device='cpu')", "host-copy"),
    ("y = x.tolist()", "host-copy"),
    ("y = x.numpy()", "host-copy"),
    ("i = x.nonzero()", "data-shape"),
    ("i = torch.nonzero(x)", "data-shape"),
    ("y = torch.masked_select(x, m)", "data-shape"),
    ("i = torch.where(x > 0)", "data-shape"),
    ("y = x[x > 0]", "mask-index"),
    ("y = x[mask]", "mask-index"),
    ("y = x[:, ~keep_mask]", "mask-index"),
    ("y = x[left_mask & right]", "mask-index"),
    ("x[self.mask] = 0", "mask-index"),
    ("y = torch.tensor([1, 2], device=x.device)", "tensor-upload"),
    ("y = torch.as_tensor(ids, device=x.device)", "tensor-upload"),
    ("y = bool(x.any())", "scalar"),
    ("y = int(x.sum())", "scalar"),
    ("y = float(torch.max(x))", "scalar"),
    ("y = int(x.sum() - 1)", "scalar"),
    ("if x.sum() > 0: pass", "scalar"),
    ("y = [t for t in x if t.any()]", "scalar"),
    ("y = 1 if x.any() else 2", "scalar"),
    ("while not x.all(): pass", "scalar"),
    ("assert flag and x.any()", "scalar"),
    ("print(x)", "print"),
    ("def f(:", "syntax"),
]


@pytest.mark.parametrize(("source", "rule"), PLANTED, ids=[source for source, _ in PLANTED])
def test_every_rule_catches_its_fault(lint_hot, source, rule):
    assert [finding.rule for finding in lint_hot.lint(source, "hot.py")] == [rule]


@pytest.mark.parametrize(
    "source",
    [
        "y = torch.where(x > 0, x, 0)",
        "y = x.where(x > 0, 0)",
        "i = x.topk(k).indices.sort().values",
        "y = x[:, :k]",
        "y = x[ids]",
        "y = mask[..., :k]",
        "y = arrays['mask']",
        "y = torch.tensor([1, 2])",
        "y = x.to(device)",
        "n = int(x.shape[1])",
        "n = max(len(a), len(b))",
        "if any(flags): pass",
        "if np.linalg.norm(move) < 0.4: pass",
        "speed = float(np.abs(move).max())",
        "for name, value in table.items(): pass",
        "text = 'x.item()  # cold:'",
    ],
)
def test_clean_code_passes(lint_hot, source):
    assert lint_hot.lint(source, "hot.py") == []


def test_a_reason_exempts_its_line_only(lint_hot):
    source = "a = x.item()  # cold: once, when the plan is bound\nb = x.item()\n"
    assert [finding.line for finding in lint_hot.lint(source, "hot.py")] == [2]


def test_a_reason_on_either_end_of_a_long_expression_exempts_it(lint_hot):
    assert lint_hot.lint("a = torch.tensor(  # cold: at bind\n    [1],\n    device=d,\n)\n", "hot.py") == []
    assert lint_hot.lint("a = torch.tensor(\n    [1],\n    device=d,\n)  # cold: at bind\n", "hot.py") == []


def test_a_reason_on_the_def_line_exempts_the_function_and_no_more(lint_hot):
    source = (
        "def setup(\n"
        "    x,\n"
        "):  # cold: runs when a pipeline is bound\n"
        "    def inner():\n"
        "        return x.item()\n"
        "    return x.tolist(), inner\n"
        "def act(x):\n"
        "    return x.cpu()\n"
    )
    assert [finding.line for finding in lint_hot.lint(source, "hot.py")] == [8]


@pytest.mark.parametrize("comment", ["# cold", "# cold:", "#cold:  "])
def test_an_exemption_without_a_reason_is_a_finding_and_exempts_nothing(lint_hot, comment):
    assert {finding.rule for finding in lint_hot.lint(f"a = x.item()  {comment}", "hot.py")} == {
        "cold-reason",
        "host-copy",
    }


def test_command_line_reports_place_rule_and_remedy(lint_hot, tmp_path, capsys):
    (tmp_path / "hot.py").write_text("def act(x):\n    return x.item()\n")
    (tmp_path / "clean.py").write_text("y = 1\n")
    assert lint_hot.main([str(tmp_path)]) == 1
    report = capsys.readouterr().out
    assert report.startswith(f"{tmp_path / 'hot.py'}:2:12 host-copy: ")
    assert "keep the value on the device" in report
    assert len(report.splitlines()) == 1
    assert lint_hot.main([str(tmp_path / "clean.py")]) == 0


def test_a_path_that_cannot_be_read_is_an_error_not_a_pass(lint_hot, tmp_path, capsys):
    assert lint_hot.main([str(tmp_path / "absent.py")]) == 2
    assert "absent.py" in capsys.readouterr().err


def test_the_list_of_hot_files_cannot_go_stale(lint_hot, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenprune/model/decoder\.py"):
        lint_hot.hot_files(tmp_path)


def test_hot_files_cover_nested_plugins_and_leave_package_files_out(lint_hot, tmp_path):
    names = [pattern for pattern in lint_hot.HOT_FILES if "*" not in pattern]
    plugins = "plugins/tokenprune_plugins"
    for name in [*names, f"{plugins}/__init__.py", f"{plugins}/fastv.py", f"{plugins}/deep/static.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {str(path.relative_to(tmp_path)) for path in lint_hot.hot_files(tmp_path)}
    assert found == {*names, f"{plugins}/fastv.py", f"{plugins}/deep/static.py"}
