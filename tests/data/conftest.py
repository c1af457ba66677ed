"""Tiny sources in the paper's layout."""

import json

import pytest

CQA = [
    # (question, choices, answer, teacher text)
    ("Where do ducks swim?", ["zoo", "pond", "barn"], "pond",
     "Ducks like water. So the answer is (b) pond.\n\nQ: Where? A: So the answer is (a) zoo."),
    ("Where is hay?", ["zoo", "pond", "barn"], "barn", "Hay is dry. So the answer is (c) Barn."),
    ("Where are apes?", ["zoo", "pond", "zoo"], "zoo", "Apes are shown. So the answer is (c) zoo."),
    ("Where is mud?", ["zoo", "pond", "barn"], "pond", "Mud is wet and"),
]  # fmt: skip
SVAMP = [
    ("6 eggs in 2 bowls. How many in each?", "( 6.0 / 2.0 )", "Each has 6 / 2. The answer is (6 / 2).\n\nQ:"),
    ("2 bags of 3, 4 times?", "( ( 2.0 * 3.0 ) * 4.0 )", "So 24. The answer is (2 * 3) * 4."),
    ("5 and 2?", "( 5.0 + 2.0 )", "Some more. The answer is (some + 2)."),
]  # fmt: skip


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_cqa(folder, *, repeats=1, splits=("train", "test")):
    """Writes `repeats` copies of the rows above; the teacher's texts in files of five."""
    for split in splits:
        rows, texts = [], []
        for _ in range(repeats):
            for question, choices, answer, text in CQA:
                rows.append(
                    {"id": f"{split}-{len(rows)}", "question": question, "choices": choices}
                    | {"answer": answer, "abstractive_explanation": "not read"}
                )
                texts.append(text)
        write_lines(folder / f"cqa_{split}.json", rows)
        write_texts(folder, split, texts)
    return folder


def write_texts(folder, split, texts, size=5):
    (folder / "llm").mkdir(exist_ok=True)
    for i in range(0, len(texts), size):
        (folder / "llm" / f"{split}_CoT_{i // size}.json").write_text(
            json.dumps(texts[i : i + size], indent=0)
        )


@pytest.fixture
def cqa_source(tmp_path):
    return write_cqa(tmp_path / "cqa", repeats=3)


@pytest.fixture
def svamp_source(tmp_path):
    folder = tmp_path / "svamp"
    for split in ("train", "test"):
        write_lines(
            folder / f"svamp_{split}.json", [{"input": q, "label": y} for q, y, _ in SVAMP * 4]
        )
        write_texts(folder, split, [text for *_, text in SVAMP * 4])
    return folder
