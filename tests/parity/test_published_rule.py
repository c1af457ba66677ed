"""Datasets of `prepare --paper-exact` hold the ids of the published code, on every row."""

import json

import pytest
import sentencepiece

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.training.data import batches_of, load_split

EXACT = "paper/exact.gin"
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
CONFIGS = {
    "cqa": "paper_cqa",
    "svamp": "paper_svamp",
    "esnli": "paper_esnli",
    "anli1": "paper_anli",
}


def rows_of(group) -> list[list[list[int]]]:
    """The input and the target ids of each row of a padded group."""
    parts = (
        ("encoder_input_tokens", "encoder_segment_ids"),
        ("decoder_target_tokens", "decoder_segment_ids"),
    )
    found = [
        [ids[there > 0].tolist() for ids, there in zip(group[tokens], group[segments], strict=True)]
        for tokens, segments in parts
    ]
    return list(map(list, zip(*found, strict=True)))


def trained_on(config, split, data_dir) -> list[tuple[list[int], ...]]:
    """The columns of each example of a split, in order, as the model gets them in padded batches."""
    data = load_split(config, split, vocabulary=None, data_dir=data_dir)
    batches = batches_of(config, data, shuffle=False)
    examples = []
    for step in range(batches.num_steps):
        objectives = [rows_of(group) for group in batches(step)]
        for columns in zip(*objectives, strict=True):
            ids = tuple(ids for column in columns for ids in column)
            examples += [ids] if any(ids) else []  # the last batch is filled up
    return examples


def check_ids(rule, source, data_dir, *, arm="step_by_step", fraction=1.0, seed=0):
    """Asserts every column of every row; returns the number of rows of each split."""
    task = f"{CONFIGS[source.name].removeprefix('paper_')}_paper"
    settings = [f"TASK={task}", f"DATA_FRACTION={fraction}", f"SEED={seed}", "PACK=False"]
    config, _ = load_config(CONFIGS[source.name], settings, [EXACT, f"objectives/{arm}.gin"])
    pieces = sentencepiece.SentencePieceProcessor(str(data_dir / task / "spiece.model"))
    counts = {}
    for part, rows in rule.read(source, fraction=fraction, run=seed).items():
        if part == "test" and arm.endswith("llm"):
            continue  # `evaluate` compares with the gold label, which no arm trains on there
        published = [
            rule.columns(
                pieces,
                row,
                model_type="task_prefix" if arm.startswith("step_by_step") else "standard",
                label_type="llm" if part == "train" and arm.endswith("llm") else "gt",
            )
            for row in rows
        ]
        found = trained_on(config, SPLITS[part], data_dir)
        if fraction < 1:  # a share has the order of the whole here; each epoch draws another
            found, published = sorted(found), sorted(published)
        for number, (ours, theirs) in enumerate(zip(found, published, strict=True)):
            assert ours == theirs, (part, number, *map(pieces.decode, (*ours, *theirs)))
        counts[SPLITS[part]] = len(found)
    return counts


@pytest.mark.parametrize(
    "arm", ["step_by_step", "step_by_step_llm", "label_only", "label_only_llm"]
)
@pytest.mark.parametrize("name", ["cqa", "svamp"])
def test_the_first_rows_of_the_papers_files_have_the_published_ids(
    rule, paper_sample, exact_sample, name, arm
):
    counts = check_ids(rule, paper_sample(name), exact_sample, arm=arm)
    assert counts.items() >= {"train": 180, "validation": 20}.items()


def test_a_share_is_drawn_before_validation_is(rule, paper_sample, exact_sample):
    source = paper_sample("svamp")
    counts = check_ids(rule, source, exact_sample, fraction=0.7, seed=3)
    assert counts == {"train": 125, "validation": 14, "test": 200}  # 139 of 200 first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cqa", {"train": 8766, "validation": 975, "test": 1221}),
        ("svamp", {"train": 720, "validation": 80, "test": 200}),
    ],
)
def test_every_row_of_the_papers_files_has_the_published_ids(
    rule, paper_data, tmp_path, name, rows
):
    prepare(name, source=paper_data / name, paper_exact=True, data_dir=tmp_path)
    assert check_ids(rule, paper_data / name, tmp_path) == rows
    del rows["test"]
    assert check_ids(rule, paper_data / name, tmp_path, arm="step_by_step_llm") == rows


LONG = "a man eats and " * 400
# premise, hypothesis, label, the teacher's text
ESNLI = [
    ("A dog runs.", "An animal runs.", 0, "A dog is one.\nAnswer: entailment\n\nPremise: A cat"),
    ("A dog runs. ", "  A dog  hunts.", 1, "It may only play. Answer: Neutral."),
    ("A man eats.", "A man sits.", 1, "He may stand. Answer: neutral Answer: entailment"),
    ("A man eats.", "A man drinks.", 2, "He may drink. Answer:contradiction"),  # no space: no label
    ("A man eats.", "He is old.", 1, "We cannot know.\n\nPremise: A man.\nAnswer: neutral"),
    ("A man eats.", "Nobody eats.", 2, "Answer: contradiction"),
    ("A man eats.", "He is full.", 1, "  "),
    ("A man", "eats.", 0, ""),
    (LONG, "A man eats.", 0, f"{LONG} Answer: entailment"),  # both are truncated
]
ANLI = [
    (
        "Ann was born in 1950.",
        "Ann is young.",
        2,
        "She is 70. So the answer is contradiction.\n\nPremise: B",
    ),
    (
        "Ann was born in 1950.",
        "Ann lives.",
        1,
        "It is not said. So the answer is neutral",
    ),  # neutra
    ("Ann was born in 1950. ", "Ann was born.", 0, "So the answer is entailment."),
    ("Ann paints.", " Ann is rich.", 1, "So the answer is neutral. So the answer is neutral."),
    ("Ann paints.", "Ann sings.", 1, "It is not said. So the answer is"),
    ("Ann paints.", "Ann never paints.", 2, "She does paint, so"),
    ("Ann paints.", "Ann is.", 0, "Premise: Bob is. So the answer is entailment."),
    ("Ann paints.", LONG, 1, f"  {LONG}\nSo the answer is\n neutral.\n"),
]


@pytest.mark.parametrize(
    ("prefix", "name", "rows"),
    [pytest.param("esnli", "esnli", ESNLI, marks=pytest.mark.slow), ("anli1", "anli", ANLI)],
)
def test_hand_made_rows_of_inference_have_the_published_ids(rule, tmp_path, prefix, name, rows):
    source = tmp_path / prefix
    (source / "llm").mkdir(parents=True)
    for split, count in (("train", len(rows)), ("valid", 3), ("test", 2)):
        fields = [
            {"uid": f"u{i}", "premise": p, "hypothesis": h, "label": label, "reason": ""}
            for i, (p, h, label, _) in enumerate(rows[:count])
        ]
        (source / f"{prefix}_{split}.json").write_text("\n".join(map(json.dumps, fields)) + "\n")
        texts = [text for *_, text in rows[:count]]
        (source / "llm" / f"{split}_CoT_0.json").write_text(json.dumps(texts))
    prepare(name, source=source, paper_exact=True, data_dir=tmp_path / "data")
    for arm in ("step_by_step", "step_by_step_llm", "label_only"):
        counts = check_ids(rule, source, tmp_path / "data", arm=arm)
        assert counts.items() >= {"train": len(rows), "validation": 3}.items()


def test_the_rule_reads_texts_as_the_published_code_does(rule):
    """By hand, from `_parse_llm_output` of each loader."""
    read = {
        "cqa": rule.cqa_teacher,
        "svamp": rule.svamp_teacher,
        "esnli": rule.esnli_teacher,
        "anli": rule.anli_teacher,
    }
    for name, text, rationale, label in [
        ("cqa", "Wet. So the answer is (b) pond..\n\nQ: Who", "Wet.", "pond."),
        ("cqa", " Wet. So the answer is (a) lake or (d) pond.", " Wet.", "lake or"),
        ("cqa", "So the answer is pond.", "", " "),
        ("svamp", "Half. The answer is (84 / 2) - (3).\n(4)", "Half.", "(84 / 2) - (3)"),
        ("svamp", "The answer is 3. The answer is (4).", " ", " "),
        ("svamp", "Half. The answer is 42.", "Half.", " "),
        ("esnli", "It is. Answer: yes Answer: no", "It is.", "yes"),
        ("esnli", "It is.\n\nPremise: A. Answer: no", "It is.\n\nPremise: A.", "no"),
        ("anli", "It is. So the answer is neutral", "It is.", "neutra"),
        ("anli", "It is.", "", ""),
    ]:
        assert read[name](text) == (rationale, label)


@pytest.mark.slow
def test_three_steps_have_the_published_losses(loop, rule, paper_sample, exact_sample, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: no reference loop to compare with")
    # 20 times the paper's rate: at 5e-5 three steps hardly move a loss
    settings = ["TASK=svamp_paper", "BATCH_SIZE=60", "TRAIN_STEPS=3", "LEARNING_RATE=1e-3"]
    settings += ["train.dropout_rate=0.0"]
    config, _ = load_config("paper_svamp", settings, [EXACT])
    assert config.optimizer.eps_before_correction  # as torch's side, which the config chooses
    setting = loop.make_setting(config, exact_sample, tmp_path)
    rows = rule.read(paper_sample("svamp"))["train"]
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "spiece.model"))
    drawn = [setting.batches.examples(step).indices for step in range(3)]
    assert len({i for step in drawn for i in step}) == len(rows) == 180
    assert any(row.rationale == rule.UNREAD for row in rows)

    def published(_, step):
        columns = zip(*(rule.columns(pieces, rows[i]) for i in drawn[step]), strict=True)
        inputs, labels, explained, rationales = map(loop.padded, columns)
        return [(inputs, labels), (explained, rationales)]

    ours, theirs = loop.train_with_ours(setting), loop.train_with_torch(setting, published)
    assert (theirs.losses[-1] < 0.995 * theirs.losses[0]).all()
    # measured 5.5e-7; with epsilon after the bias correction 1.3e-5
    assert loop.curve_gaps(ours, theirs).max() < 3e-6
    # measured 2.6e-5; with epsilon after the bias correction 7e-2
    for name, gap in loop.parameter_gaps(ours, theirs, loop.start_params(setting)).items():
        assert gap["of_the_way"] < 2e-4, (name, gap)
