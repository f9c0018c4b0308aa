"""Small files that people really have, rebuilt from public bug reports with made-up rows: each becomes what its
author meant, or a sentence that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from training.data.formats import Format
from training.plan.catalog import STARTER_FOLDER
from training.report.report import report
from training.text.encode import EncodingOptions, examples
from training.text.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "cases"
SETTINGS = EncodingOptions(512)


class Case(NamedTuple):
    shape: str
    rows: int = 12
    trained: int = 154  # tokens with the starter's tokenizer: those of the twelve answers and their ends
    findings: dict[str, int] = {}  # count by code
    words: str = ""  # in the verdict
    unused: str = ""
    ready: bool = True


def refused(shape: str, rows: int, trained: int, findings: dict[str, int], words: str) -> Case:
    return Case(shape, rows, trained, findings, words, ready=False)


CLEAN = "12 rows, no problems found."
CASES: dict[str, Case] = {
    "01b_excel_utf16le_tab.csv": Case("completion", trained=156, words=CLEAN),
    "01c_excel_sep_line.csv": Case("completion", trained=156, words=CLEAN),
    "03_sharegpt_system_field.jsonl": Case("sharegpt", words=CLEAN),
    "03b_sharegpt_function.jsonl": Case("sharegpt", trained=718, words=CLEAN),
    "04_consecutive_assistant.jsonl": Case("chat", trained=274, words=CLEAN),
    "04b_assistant_first.jsonl": Case("chat", trained=262, words=CLEAN),
    "05b_toolcalls_emptystring.jsonl": Case(
        "chat", trained=648, findings={"unused_field": 1, "same_answer": 1}, unused="parallel_tool_calls"
    ),
    "05e_tools_only_toplevel.jsonl": Case("chat", words=CLEAN),
    "07_weights.jsonl": Case("chat", words=CLEAN),
    "07c_weight_all_zero.jsonl": refused(
        "chat",
        12,
        0,
        {"nothing_to_train": 12},
        "No row has an answer to learn from. Add answers to the rows.",
    ),
    "07d_axolotl_train_flag.jsonl": Case("chat", words=CLEAN),
    "08b_parts_image.jsonl": refused(
        "chat", 0, 0, {"bad_row": 12}, "a part of type image_url. Only text can be trained on here."
    ),
    "10b_long_prompt.jsonl": Case(
        "completion", trained=0, findings={"truncated": 12, "answer_cut": 12}, words="Every answer is cut off"
    ),
    "12b_h2o_empty_answer.csv": Case("completion", trained=12, findings={"empty_answer": 12}),
    "13b_text_label.csv": Case("completion", trained=24, words=CLEAN),
    "15_nan.csv": Case("instruction", findings={"written_empty": 6}),
    "19c_nested_messages.parquet": Case("chat", findings={"unused_field": 1}, unused="when (12 rows)"),
    "19g_null_answer.parquet": refused(
        "completion",
        8,
        106,
        {"bad_row": 4, "few": 1},
        "'completion' is empty (null), not text. Fill it in, or drop",
    ),
    "19h_binary_prompt.parquet": refused(
        "completion", 0, 0, {"bad_row": 12}, "'prompt' is binary data, not text. The column has bytes."
    ),
    "19m_csv_python_repr.csv": refused(
        "chat", 0, 0, {"bad_row": 12}, "a Python list in single quotes, not JSON. Write the column with json."
    ),
    "21b_alpaca_system_history.json": Case("instruction", words=CLEAN),
    "23_dpo.jsonl": Case("preference", words=CLEAN),
    "23b_trl_conv_prompt_completion.jsonl": Case("completion", words=CLEAN),
    "26_reasoning.jsonl": Case(
        "chat", findings={"unused_field": 1}, unused="messages[].reasoning_content (12 rows)"
    ),
    "27_message_names.jsonl": Case("chat", findings={"unused_field": 1}, unused="messages[].name (12 rows)"),
    "28_mixed_kinds.jsonl": refused(
        "completion", 6, 79, {"bad_row": 6, "few": 1}, "Use one kind of example per file."
    ),
    "29_dolly.jsonl": Case("instruction", findings={"unused_field": 1}, unused="category (12 rows)"),
    "29d_system_user_assistant.jsonl": Case("instruction", words=CLEAN),
    "29h_segments.jsonl": Case("segments", words=CLEAN),
    "30_null_completion.jsonl": refused(
        "completion", 9, 115, {"bad_row": 3, "few": 1}, "'completion' is empty (null), not text."
    ),
    "30d_dict_completion.jsonl": refused(
        "completion",
        0,
        0,
        {"bad_row": 12},
        "'completion' is an object, not text. Write the text itself, or choose",
    ),
    "30h_none_strings.jsonl": Case("completion", trained=72, findings={"written_empty": 8}),
    "30i_excel_unicode_text.txt": Case("completion", words=CLEAN),
    "30o_text_suffix_label.csv": refused(
        "",
        0,
        0,
        {"bad_row": 1},
        "its columns are named 'id', 'review', 'sentiment', and none is a known name.",
    ),
    "32_alpaca_for_samples.json": Case("instruction", words=CLEAN),
    "33_documents.zip": Case("text", trained=168, words=CLEAN),
}


@pytest.fixture(scope="module")
def starter() -> Tokenizer:
    return Tokenizer.load(STARTER_FOLDER)


def test_every_file_has_its_case() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_report_says_what_becomes_of_the_file(name: str, starter: Tokenizer) -> None:
    case, result = CASES[name], report(FOLDER / name, starter, SETTINGS)
    agrees(case, result)
    if result["ready"]:  # and the trainer sees the same
        chosen = Format.of(result["format"])
        trained = list(examples(FOLDER / name, starter, SETTINGS, chosen, lambda bad: None))
        assert len(trained) == result["examples"]
        assert sum(example.length for example in trained) == result["tokens"]
        assert sum(example.trained for example in trained) == result["trained_tokens"]


def agrees(case: Case, result: dict[str, Any]) -> None:
    read = (result["format"]["shape"], result["rows"], result["trained_tokens"], result["ready"])
    assert read == (case.shape, case.rows, case.trained, case.ready)
    assert {finding["code"]: finding["count"] for finding in result["findings"]} == case.findings
    assert case.words in result["verdict"]
    assert not result["ready"] or not result["error"]
    details = {finding["code"]: finding["details"] for finding in result["findings"]}
    assert case.unused in " ".join(details.get("unused_field", []))


def test_the_command_line_says_the_same_of_all_files() -> None:
    """In one process: starting one for each would take a minute."""
    program = (
        "import sys; from training.__main__ import main\n"
        "for path in sys.argv[2:]: main(['check', path, '--tokenizer', sys.argv[1], '--sequence-length', '512'])"
    )
    paths = [str(FOLDER / name) for name in CASES]
    done = subprocess.run(
        [sys.executable, "-c", program, str(STARTER_FOLDER), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if '"t": "report"' in line]
    assert len(results) == len(CASES)
    for case, result in zip(CASES.values(), results, strict=True):
        agrees(case, result)


def test_the_message_of_a_cut_answer_says_that_it_was_cut(starter: Tokenizer) -> None:
    result = report(FOLDER / "10b_long_prompt.jsonl", starter, SETTINGS)
    assert "the prompts alone fill the 512 tokens" in result["refusal"]
    longer = report(FOLDER / "10b_long_prompt.jsonl", starter, EncodingOptions(4096))
    assert (longer["trained_tokens"], longer["findings"], longer.get("refusal")) == (150, [], None)
