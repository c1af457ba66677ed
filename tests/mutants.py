"""Plants the bugs listed below, one at a time, and reports which of them the tests catch.

    python tests/mutants.py [--only B1,B2] [--part 2/4] [--jobs 2] [--list]
    make mutants MUTANTS_FLAGS="--part 1/4"

A mutant replaces one text of one file. It is planted in a copy of the repository, never in the
working tree, and its tests run there up to the first failure. The same tests run on the code as it
is first, since a test that fails anyway catches nothing.

Exit status: 0 when the tests caught every mutant. 1 when a mutant survives, its text is not found
exactly once (rewrite `old` and `new`: the code has moved) or its tests do not run.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One planted bug: `old` is in `file` exactly once, and one of `tests` fails with `new`."""

    id: str
    what: str  # what the planted bug does
    file: str
    old: str
    new: str
    tests: list[str]  # paths or node ids; the fastest one that fails, first


GEMMA_PARITY = [
    "tests/models/test_parity.py::"
    "test_states_logits_loss_and_gradients_equal_those_of_transformers[t5gemma]"
]
GEMMA_GREEDY = [
    "tests/models/test_parity.py::"
    "test_greedy_answers_to_forty_inputs_equal_those_of_generate[t5gemma]"
]

MUTANTS = [
    Mutant(
        id="D1",
        what="a rationale is cut at the next question only where a line starts with it",
        file="stepdistill_jax/data/rationale.py",
        old="own, found, _ = text.partition(next_question)",
        new='own, found, _ = text.partition("\\n" + next_question)',
        tests=["tests/data/test_rationale.py::test_each_way_of_failing_to_choose_has_a_name"],
    ),
    Mutant(
        id="D2",
        what="an answer's letter wins over the text after it",
        file="stepdistill_jax/data/rationale.py",
        old="repaired=by_letter if by_letter in by_text or not by_text else by_text[0],",
        new='repaired=by_letter or (by_text[0] if by_text else ""),',
        tests=["tests/data/test_rationale.py::test_each_way_of_failing_to_choose_has_a_name"],
    ),
    Mutant(
        id="D3",
        what="an e-SNLI label ends at the next premise only where a paragraph starts with it",
        file="stepdistill_jax/data/nli_rationale.py",
        old='answer_text, next_pair, _ = after.partition("Premise")',
        new='answer_text, next_pair, _ = after.partition("\\n\\nPremise")',
        tests=["tests/data/test_nli.py::test_each_way_of_failing_on_esnli_has_a_name"],
    ),
    Mutant(
        id="D4",
        what="teacher files are read in the order of their names (_10 before _2)",
        file="stepdistill_jax/data/corpora/paper_layout.py",
        old='    beyond = set((source / "llm").glob',
        new=('    files.sort(key=lambda p: p.name)\n    beyond = set((source / "llm").glob'),
        tests=[
            "tests/data/test_paper_layout.py::test_teacher_files_are_read_in_the_order_of_their_numbers"
        ],
    ),
    Mutant(
        id="D5",
        what="the second part of a published split is rounded down",
        file="stepdistill_jax/data/published_split.py",
        old="test = math.ceil(test_size * rows)",
        new="test = math.floor(test_size * rows)",
        tests=["tests/data/test_published.py::test_a_split_is_that_of_hugging_face_datasets"],
    ),
    Mutant(
        id="D6",
        what="a blank rationale of the published files is no target",
        file="stepdistill_jax/tasks/prepared_rows.py",
        old="targets if target or blank else []",
        new="targets if target.strip() else []",
        tests=[
            "tests/tasks/test_published_rows.py::test_the_ids_of_a_pair_have_an_end_of_sequence_between_two_texts"
        ],
    ),
    Mutant(
        id="D7",
        what="a share of the published files is drawn of the train split, after validation",
        file="stepdistill_jax/tasks/prepared_rows.py",
        old="mask = np.isin(prepared, shares[splits.index(self.split)])",
        new="mask = np.isin(np.arange(len(prepared)), shares[splits.index(self.split)])",
        tests=[
            "tests/tasks/test_published_rows.py::test_a_share_is_drawn_of_all_rows_before_validation"
        ],
    ),
    Mutant(
        id="D8",
        what="a template that training never sees is in test, too",
        file="stepdistill_jax/data/corpora/gsm_symbolic.py",
        old="if (k in held_out) == (split == UNSEEN)}",
        new='if (k in held_out) == (split == UNSEEN) or split == "test"}',
        tests=[
            "tests/data/test_gsm_symbolic.py::test_templates_of_unseen_are_in_no_other_split_and_no_question_stands_twice"
        ],
    ),
    Mutant(
        id="D9",
        what="more rows of gsm_symbolic's train change the rows of its other splits",
        file="stepdistill_jax/data/corpora/gsm_symbolic.py",
        old='f"{seed} {split}", seen)',
        new='f"{seed} {split} {rows}", seen)',
        tests=[
            "tests/data/test_gsm_symbolic.py::test_rows_and_seed_say_all_and_more_rows_change_no_other_split"
        ],
    ),
    Mutant(
        id="D10",
        what="train has questions of gsm_symbolic's test with other names",
        file="stepdistill_jax/data/corpora/gsm_symbolic.py",
        old="split_of_numbers(number, question) == split",
        new="split_of_numbers(number, question) in (split, 'test')",
        tests=[
            "tests/data/test_gsm_symbolic.py::test_no_two_splits_have_one_template_with_the_same_numbers"
        ],
    ),
    Mutant(
        id="D11",
        what="an input of a Gemma never begins with bos",
        file="stepdistill_jax/data/vocabulary.py",
        old="ids = [self.bos_id] if self.add_bos_token else []",
        new="ids: list[int] = []",
        tests=[
            "tests/data/test_vocabulary.py::test_a_gemma_frames_inputs_as_its_tokenizer_config_says"
        ],
    ),
    Mutant(
        id="D12",
        what="a truncated input ends with eos where the whole one does not",
        file="stepdistill_jax/data/vocabulary.py",
        old="EOS_ID if ids[-1] == EOS_ID else ids[length - 1]]",
        new="EOS_ID]",
        tests=[
            "tests/data/test_vocabulary.py::test_a_truncated_input_keeps_the_eos_that_it_ends_with"
        ],
    ),
    Mutant(
        id="D13",
        what="token stores of two framings are taken for one",
        file="stepdistill_jax/data/vocabulary.py",
        old="if self.framing == T5_FRAMING:\n            return found",
        new="if found:\n            return found",
        tests=[
            "tests/data/test_vocabulary.py::test_tokens_of_one_framing_are_not_taken_for_those_of_another"
        ],
    ),
    Mutant(
        id="IN12",
        what="`predict` asks with both texts of an input as one",
        file="stepdistill_jax/inference/prompting.py",
        old="texts = [text, input_pair] if input_pair else [text]",
        new='texts = [f"{text} {input_pair}"] if input_pair else [text]',
        tests=[
            "tests/tasks/test_published_rows.py::test_the_ids_of_a_pair_have_an_end_of_sequence_between_two_texts"
        ],
    ),
    Mutant(
        id="ST12",
        what="epsilon before the correction is corrected by the step's number, one too few",
        file="stepdistill_jax/training/optimizer.py",
        old="corrected = eps / jnp.sqrt(1 - b2 ** (state.count + 1))",
        new="corrected = eps / jnp.sqrt(1 - b2 ** jnp.maximum(state.count, 1))",
        tests=[
            "tests/training/test_optimizer.py::test_eps_before_the_correction_takes_the_step_of_transformers_adamw"
        ],
    ),
    Mutant(
        id="A1",
        what="subtraction is right-associative",
        file="stepdistill_jax/data/arithmetic.py",
        old='value = value + self._product() if self._take() == "+" else value - self._product()',
        new='value = value + self._product() if self._take() == "+" else value - self.sum()',
        tests=["tests/data/test_arithmetic.py::test_precedence_and_signs"],
    ),
    Mutant(
        id="S1",
        what="the p of the paired bootstrap is one-sided",
        file="stepdistill_jax/experiments/stats.py",
        old="min(1.0, 2 * (fewest + 1) / (len(differences) + 1))",
        new="min(1.0, (fewest + 1) / (len(differences) + 1))",
        tests=["tests/experiments/test_stats.py::test_p_of_a_difference_is_two_sided"],
    ),
    Mutant(
        id="S2",
        what="the interval of the paired bootstrap covers 90% instead of 95%",
        file="stepdistill_jax/experiments/stats.py",
        old="np.quantile(differences, [0.025, 0.975])",
        new="np.quantile(differences, [0.05, 0.95])",
        tests=[
            "tests/experiments/test_stats.py::test_a_difference_of_two_models_has_the_width_that_its_variance_says"
        ],
    ),
    Mutant(
        id="S3",
        what="p_holm is not corrected",
        file="stepdistill_jax/experiments/comparison.py",
        old="corrected = holm([t.p for t in found])",
        new="corrected = [t.p for t in found]",
        tests=[
            "tests/experiments/test_comparison.py::test_p_is_corrected_for_all_tests_of_a_comparison"
        ],
    ),
    Mutant(
        id="S4",
        what="each run of the bootstrap draws its own rows (unpaired)",
        file="stepdistill_jax/experiments/stats.py",
        old="        found.append(counts.astype(np.float32) @ answers / rows)",
        new=(
            "        own = [counts[rng.permutation(len(counts))].astype(np.float32) for _ in right]\n"
            "        found.append(np.stack([c @ a / rows for c, a in zip(own, answers.T)], 1))"
        ),
        tests=["tests/experiments/test_stats.py::test_rows_are_drawn_for_both_arms_together"],
    ),
    Mutant(
        id="S5",
        what="`surely` looks at the high end of the interval",
        file="stepdistill_jax/experiments/comparison.py",
        old="if found is None or found[0] <= 0:",
        new="if found is None or found[1] <= 0:",
        tests=[
            "tests/experiments/test_comparison.py::test_an_arm_is_surely_better_where_its_whole_interval_is_above_0"
        ],
    ),
    Mutant(
        id="S6",
        what="runs that answered different rows are compared",
        file="stepdistill_jax/experiments/comparison.py",
        old="group = groups[run.gold_key, tuple(setting.items())]",
        new="group = groups[run.task, tuple(setting.items())]",
        tests=[
            "tests/experiments/test_comparison.py::test_runs_are_compared_where_they_answered_the_same_rows"
        ],
    ),
    Mutant(
        id="T1",
        what="retry-after-ms is taken for seconds",
        file="stepdistill_jax/teacher/client.py",
        old='("retry-after-ms", 1e-3)',
        new='("retry-after-ms", 1.0)',
        tests=["tests/teacher/test_client.py::test_retry_after_is_seconds_milliseconds_or_a_date"],
    ),
    Mutant(
        id="T2",
        what="Retry-After delays one request, not all",
        file="stepdistill_jax/teacher/client.py",
        old=(
            "            self._open_at = max(self._open_at, time.monotonic() + wait)\n        return SentAgain"
        ),
        new=("            pass\n        return SentAgain"),
        tests=["tests/teacher/test_client.py::test_retry_after_is_obeyed_by_all_requests"],
    ),
    Mutant(
        id="T3",
        what="the key is not hidden in a finish_reason",
        file="stepdistill_jax/teacher/client.py",
        old="reason = self.hide(reason)[:100]",
        new="reason = reason[:100]",
        tests=["tests/test_security.py::test_a_key_appears_in_no_file_and_no_line[reason]"],
    ),
    Mutant(
        id="T4",
        what="a message is truncated before the key is hidden",
        file="stepdistill_jax/teacher/client.py",
        old='message = self.hide(" ".join(str(message or error.message).split()))[:300]',
        new='message = self.hide(" ".join(str(message or error.message).split())[:300])',
        tests=[
            "tests/teacher/test_client.py::test_a_refusals_message_hides_the_key_before_it_is_cut"
        ],
    ),
    Mutant(
        id="T5",
        what="requests under way are not reserved in the budget",
        file="stepdistill_jax/teacher/budget.py",
        old="        answers += sum(c for _, c in self._open.values())\n",
        new="",
        tests=[
            "tests/teacher/test_budget.py::test_a_request_waits_while_one_under_way_might_use_up_the_cap"
        ],
    ),
    Mutant(
        id="T6",
        what="the budget does not learn the tokens per character",
        file="stepdistill_jax/teacher/budget.py",
        old="        self._tokens_per_character = max(self._tokens_per_character, ratio)\n",
        new="        del ratio\n",
        tests=[
            "tests/teacher/test_budget.py::test_the_prompt_estimate_learns_from_what_the_server_counts"
        ],
    ),
    Mutant(
        id="T7",
        what="an answer does not reset the failures in a row",
        file="stepdistill_jax/teacher/run.py",
        old=("        self.counts.requests += 1\n        self._failures = 0\n"),
        new="        self.counts.requests += 1\n",
        tests=[
            "tests/teacher/test_client.py::test_failures_with_answers_between_them_do_not_stop_the_run"
        ],
    ),
    Mutant(
        id="T8",
        what="rows of an earlier run stay in OUTPUT.partial",
        file="stepdistill_jax/runtime/streams.py",
        old="        self._open().truncate(0)\n",
        new="        self._open()\n",
        tests=[
            "tests/teacher/test_annotate.py::test_a_cap_in_tokens_is_not_crossed_and_the_next_run_goes_on"
        ],
    ),
    Mutant(
        id="T9",
        what="a server error (5xx) ignores Retry-After",
        file="stepdistill_jax/teacher/client.py",
        old="        wait = retry_after(error.response.headers)\n",
        new="        wait = retry_after(error.response.headers) if status == 429 else None\n",
        tests=["tests/teacher/test_client.py::test_retry_after_is_obeyed_by_all_requests"],
    ),
    Mutant(
        id="T10",
        what="the last label wins a tie",
        file="stepdistill_jax/teacher/vote.py",
        old="label, votes = max(counts, key=lambda entry: entry[1])",
        new="label, votes = max(reversed(counts), key=lambda entry: entry[1])",
        tests=[
            "tests/teacher/test_vote.py::test_the_vote_goes_to_the_commonest_label_and_a_tie_to_the_first"
        ],
    ),
    Mutant(
        id="T11",
        what="the rationale is the first answer's, whatever its label",
        file="stepdistill_jax/teacher/vote.py",
        old="rationale = next(r.rationale for r in usable if matches(r.label, label))",
        new="rationale = usable[0].rationale",
        tests=[
            "tests/teacher/test_vote.py::test_the_rationale_is_the_first_that_argues_for_the_voted_label"
        ],
    ),
    Mutant(
        id="F1",
        what="a file is not synced before its rename",
        file="stepdistill_jax/runtime/files.py",
        old="    os.fsync(file.fileno())\n    os.replace(partial, path)",
        new="    os.replace(partial, path)",
        tests=["tests/runtime/test_overwriting.py::test_a_file_is_on_disk_before_it_gets_its_name"],
    ),
    Mutant(
        id="F2",
        what="atomic_write writes in place",
        file="stepdistill_jax/runtime/files.py",
        old=("    partial = partial_of(path)\n    partial.parent.mkdir"),
        new=("    partial = path\n    partial.parent.mkdir"),
        tests=[
            "tests/formats/test_hf.py::test_a_write_that_went_wrong_is_seen_and_leaves_nothing_to_trust"
        ],
    ),
    Mutant(
        id="F3",
        what="a key that appears twice is accepted",
        file="stepdistill_jax/runtime/files.py",
        old="if len(found) < len(pairs):",
        new="if len(found) < 0:",
        tests=["tests/faults/test_bad_data.py::test_json_lines_of_the_corpus"],
    ),
    Mutant(
        id="F4",
        what="the output of predict is renamed without fsync",
        file="stepdistill_jax/runtime/streams.py",
        old="            publish(self._file, self.partial, self.path)",
        new="            os.replace(self.partial, self.path)",
        tests=[
            "tests/runtime/test_streams.py::test_rows_are_on_disk_before_the_output_gets_its_name"
        ],
    ),
    Mutant(
        id="C1",
        what="restore does not verify an older step",
        file="stepdistill_jax/runtime/checkpoints/manager.py",
        old="if step != self._verified:",
        new="if step is None:",
        tests=[
            "tests/faults/test_checkpoints.py::test_an_older_step_is_read_before_it_is_restored"
        ],
    ),
    Mutant(
        id="C2",
        what="of equal accuracies the higher label loss is best",
        file="stepdistill_jax/runtime/checkpoints/manager.py",
        old='metrics.get("rank") or (metrics["label_accuracy"], -metrics["label_loss"])',
        new='metrics.get("rank") or (metrics["label_accuracy"], metrics["label_loss"])',
        tests=["tests/runtime/checkpoints/test_manager.py::test_the_better_step_is_chosen_by"],
    ),
    Mutant(
        id="C7",
        what="the best step of a run without validation is its first",
        file="stepdistill_jax/runtime/checkpoints/manager.py",
        old="return (False, 0.0, 0.0, step)",
        new="return (False, 0.0, 0.0, -step)",
        tests=["tests/runtime/checkpoints/test_manager.py::test_the_better_step_is_chosen_by"],
    ),
    Mutant(
        id="C3",
        what="the best step is not kept",
        file="stepdistill_jax/runtime/checkpoints/manager.py",
        old="return {*steps[-KEPT_LATEST:], max(steps, key=lambda s: rank(self._metrics[s]))}",
        new="return {*steps[-KEPT_LATEST - 1 :]}",
        tests=[
            "tests/runtime/checkpoints/test_manager.py::test_the_newest_two_and_the_best_are_kept"
        ],
    ),
    Mutant(
        id="C4",
        what="the manifest compares sizes alone",
        file="stepdistill_jax/runtime/checkpoints/manifest.py",
        old="        if found[name] != wanted[name][1]:",
        new="        if len(found[name]) != len(wanted[name][1]):",
        tests=[
            "tests/faults/test_checkpoints.py::test_any_flipped_bit_is_found_and_its_file_named"
        ],
    ),
    Mutant(
        id="C6",
        what="a better validated step between two checkpoints is not saved",
        file="stepdistill_jax/training/supervisor.py",
        old="        if better or stopping or last or step",
        new="        if stopping or last or step",
        tests=[
            "tests/training/test_supervisor.py::test_a_better_validated_step_is_saved_between_two_checkpoints"
        ],
    ),
    Mutant(
        id="TS1",
        what="a store's fingerprint leaves out the names of the objectives",
        file="stepdistill_jax/tasks/token_store.py",
        old="return digest([list(objectives), digest_each(sha256, folder, names)])",
        new="return digest([len(objectives), digest_each(sha256, folder, names)])",
        tests=[
            "tests/tasks/test_token_store.py::test_the_fingerprint_follows_the_names_and_the_order_of_the_objectives"
        ],
    ),
    Mutant(
        id="TS2",
        what="a store's fingerprint leaves out the names of its files (the order of columns)",
        file="stepdistill_jax/tasks/token_store.py",
        old="return digest([list(objectives), digest_each(sha256, folder, names)])",
        new="return digest([list(objectives), sorted(digest_each(sha256, folder, names).values())])",
        tests=[
            "tests/tasks/test_token_store.py::test_the_fingerprint_follows_the_names_and_the_order_of_the_objectives"
        ],
    ),
    Mutant(
        id="TS3",
        what="the bytes of a store are not compared when it is opened",
        file="stepdistill_jax/tasks/token_store.py",
        old="same = old or _sampled(directory, manifest) == manifest[SAMPLED]",
        new="same = old or bool(_sampled(directory, manifest))",
        tests=["tests/tasks/test_token_store.py::test_a_damaged_store_is_no_store"],
    ),
    Mutant(
        id="TS4",
        what="`inspect --verify` compares no more bytes than opening a store does",
        file="stepdistill_jax/tasks/token_store.py",
        old="if same and (old or every_byte):",
        new="if same and old:",
        tests=["tests/tasks/test_token_store.py::test_verifying_a_store_reads_every_byte"],
    ),
    Mutant(
        id="SQ1",
        what="a registered SeqIO task keeps the rows whose target is empty",
        file="stepdistill_jax/tasks/registry.py",
        old="            empty_absent_targets,\n            drop_absent_rows,",
        new="            empty_absent_targets,",
        tests=[
            "tests/tasks/test_prepared_tasks.py::test_the_fast_reader_has_the_tokens_of_the_registered_tasks"
        ],
    ),
    Mutant(
        id="SQ2",
        what="the mixture of a dataset zips its tasks without their absent rows",
        file="stepdistill_jax/tasks/preprocessors.py",
        old="get_task_dataset(with_absent_rows(task), *args",
        new="get_task_dataset(task, *args",
        tests=["tests/tasks/test_prepared_tasks.py::test_the_mixture_pairs_the_rows_of_an_example"],
    ),
    Mutant(
        id="SQ3",
        what="the folder that a user's module registers goes before the command's",
        file="stepdistill_jax/tasks/lookup.py",
        old="task in registered and ours is None",
        new="task in registered",
        tests=[
            "tests/tasks/test_prepared_tasks.py::test_the_commands_folder_goes_before_the_one_that_a_module_registers"
        ],
    ),
    Mutant(
        id="SQ4",
        what="a dataset that is prepared again keeps TFDS's number of rows of before",
        file="stepdistill_jax/tasks/prepared_tasks.py",
        old='    forget_tfds(f"',
        new='    str(f"',
        tests=[
            "tests/tasks/test_prepared_tasks.py::test_registering_again_keeps_what_has_not_changed"
        ],
    ),
    Mutant(
        id="SQ5",
        what="a rationale task is registered with splits in which no row has a rationale",
        file="stepdistill_jax/tasks/prepared_tasks.py",
        old="return any(json.loads(row).get(field) for row in rows if named in row)",
        new="return True",
        tests=["tests/tasks/test_prepared_tasks.py::test_each_dataset_is_two_tasks_and_a_mixture"],
    ),
    Mutant(
        id="SQ6",
        what="a TFDS dataset that is not on disk is downloaded",
        file="stepdistill_jax/tasks/sources.py",
        old="if loader._get_builder(split).is_prepared():",
        new="if loader._get_builder(split):",
        tests=[
            "tests/faults/test_bad_tasks.py::test_a_tfds_dataset_that_is_not_downloaded_is_one_line_of_each_command"
        ],
    ),
    Mutant(
        id="SQ7",
        what="SeqIO's readers give an input of a Gemma no bos",
        file="stepdistill_jax/tasks/preprocessors.py",
        old="            if framing.add_bos_token:\n",
        new="            if framing.add_bos_token and framing.bos_id < 0:\n",
        tests=["tests/tasks/test_prepared_tasks.py::test_inputs_are_framed_as_the_vocabulary_says"],
    ),
    Mutant(
        id="IW1",
        what="a rule of INIT_RULES decides names that only begin as it says",
        file="stepdistill_jax/training/initial_weights.py",
        old="if match := re.fullmatch(pattern, name):",
        new="if match := re.match(pattern, name):",
        tests=[
            "tests/training/test_initial_weights.py::test_a_rule_that_does_not_apply_is_refused"
        ],
    ),
    Mutant(
        id="IW2",
        what="the last rule of INIT_RULES that matches decides, not the first",
        file="stepdistill_jax/training/initial_weights.py",
        old="                sources[name] = _expanded(match, replacement)\n                break\n",
        new="                sources[name] = _expanded(match, replacement)\n",
        tests=["tests/training/test_initial_weights.py::test_rules_load_rename_and_leave_out"],
    ),
    Mutant(
        id="B1",
        what="evaluation drops its last, smaller batch",
        file="stepdistill_jax/batches/batch.py",
        old="return -(-self.num_examples // self.batch_size)",
        new="return max(1, self.num_examples // self.batch_size)",
        tests=["tests/batches/test_batch.py::test_evaluation_reads_each_example_once_in_order"],
    ),
    Mutant(
        id="B2",
        what="the first decoder input of a segment is the token before it",
        file="stepdistill_jax/batches/packing.py",
        old="    previous[np.cumsum(lengths) - lengths] = 0  # each segment starts with 0\n",
        new="",
        tests=["tests/batches/test_batch.py::test_the_batch_of_the_docstring"],
    ),
    Mutant(
        id="B3",
        what="a truncated row loses its end of sequence",
        file="stepdistill_jax/batches/sampler.py",
        old="    if cut.any():",
        new="    if cut.all() and not cut.size:",
        tests=["tests/batches/test_batch.py::test_no_token_is_lost_or_doubled"],
    ),
    Mutant(
        id="B4",
        what="every epoch has the same permutation",
        file="stepdistill_jax/batches/sampler.py",
        old="np.random.default_rng((self.seed, store, 1, epoch))",
        new="np.random.default_rng((self.seed, store, 1, 0))",
        tests=["tests/batches/test_batch.py::test_epochs_and_seeds_have_orders_of_their_own"],
    ),
    Mutant(
        id="B5",
        what="the examples that a data_fraction keeps do not depend on the seed",
        file="stepdistill_jax/batches/sampler.py",
        old="np.random.default_rng((seed, store, 0)).permutation(len(examples))",
        new="np.random.default_rng((0, store, 0)).permutation(len(examples))",
        tests=[
            "tests/batches/test_batch.py::test_the_seed_decides_which_examples_a_fraction_keeps"
        ],
    ),
    Mutant(
        id="B6",
        what="loss_mean = 'example' divides by the length before truncation",
        file="stepdistill_jax/batches/sampler.py",
        old="first, shares = targets.rows.starts, targets.lengths",
        new="first, shares = targets.rows.starts, targets.rows.lengths",
        tests=["tests/training/test_loss_mean.py::test_the_tokens_of_a_target_share_its_weight"],
    ),
    Mutant(
        id="B7",
        what="segments of one packed row overlap by one input token",
        file="stepdistill_jax/batches/packing.py",
        old="start = (capacity[0] - room[0], capacity[1] - room[1])",
        new="start = (max(capacity[0] - room[0] - 1, 0), capacity[1] - room[1])",
        tests=["tests/batches/test_packing.py::test_first_fit_docstring"],
    ),
    Mutant(
        id="B8",
        what="the cost of packed rows leaves out the empty rows of a step",
        file="stepdistill_jax/batches/row_lengths.py",
        old="rows = float(np.mean([packed.rounded(count) for count in probes]))",
        new="rows = float(np.mean(probes))",
        tests=[
            "tests/batches/test_row_lengths.py::test_rows_that_devices_share_out_are_shorter_where_they_would_be_empty"
        ],
    ),
    Mutant(
        id="B9",
        what="a device whose rows begin inside a block gets the block's first ones",
        file="stepdistill_jax/models/sharding.py",
        old="own = place_of[first // size] * size + first % size",
        new="own = place_of[first // size] * size",
        tests=["tests/batches/test_batch.py::test_devices_get_their_rows_of_the_whole_batch"],
    ),
    Mutant(
        id="B10",
        what="a batch has the rows of its emptiest shard",
        file="stepdistill_jax/batches/host.py",
        old="counts[..., :1].max(0)",
        new="counts[..., :1].min(0)",
        tests=[
            "tests/batches/test_host.py::test_the_rows_of_a_step_are_those_that_its_fullest_shard_needs"
        ],
    ),
    Mutant(
        id="B11",
        what="with pairs an example's second target overwrites its first",
        file="stepdistill_jax/batches/packing.py",
        old="offset[order] = before - before[np.searchsorted(of[order], of[order])]",
        new="offset[order] = 0",
        tests=["tests/batches/test_batch.py::test_no_token_is_lost_or_doubled"],
    ),
    Mutant(
        id="B12",
        what="a pair's number may be larger than the places for pairs",
        file="stepdistill_jax/batches/packing.py",
        old="    key = start[first] + (count == 1) * (start.max(initial=0) + 1)\n",
        new="    key = start[first]\n",
        tests=["tests/batches/test_batch.py::test_the_example_ids_of_the_docstring"],
    ),
    Mutant(
        id="TR2",
        what="the mutual-information loss moves the label, too",
        file="stepdistill_jax/training/mutual_information.py",
        old="jax.lax.stop_gradient(reduced(1))",
        new="reduced(1)",
        tests=[
            "tests/training/test_mutual_information.py::test_an_example_without_a_rationale_adds_nothing"
        ],
    ),
    Mutant(
        id="TR3",
        what="a run with a paired loss packs targets apart",
        file="stepdistill_jax/training/data.py",
        old="pairs=data.split == TRAIN and config.pairs,",
        new="pairs=False,",
        tests=[
            "tests/training/test_mutual_information.py::test_only_batches_of_train_and_of_a_run_with_pairs_are_packed_by_example"
        ],
    ),
    Mutant(
        id="TR4",
        what="a run takes a chip's kernel without a trial",
        file="stepdistill_jax/training/run.py",
        old="model = settle_attention(model, mesh, batches.lengths)",
        new="model = dataclasses.replace(model, attention='pallas')",
        tests=[
            "tests/training/test_attention_choice.py::test_a_run_settles_its_attention_for_the_lengths_of_its_rows"
        ],
    ),
    Mutant(
        id="TR5",
        what="a new T5Gemma starts with Gemma's bos, whatever its vocabulary has",
        file="stepdistill_jax/training/run.py",
        old='"vocab_size": data.vocab_size, "bos_id": data.vocabulary.framing.bos_id',
        new='"vocab_size": data.vocab_size',
        tests=[
            "tests/training/test_t5gemma.py::test_a_new_model_starts_with_the_bos_of_its_vocabulary"
        ],
    ),
    Mutant(
        id="TR1",
        what="a resume chooses its packed rows again",
        file="stepdistill_jax/training/run.py",
        old="    if config.pack and (workdir / RUN).is_file():\n        # older versions did not choose",
        new="    if not workdir.name:\n        # older versions did not choose",
        tests=[
            "tests/training/test_row_lengths.py::test_a_resume_on_another_layout_has_the_rows_of_the_run"
        ],
    ),
    Mutant(
        id="L1",
        what="one mean over the tokens of all objectives",
        file="stepdistill_jax/training/loss.py",
        old="return jnp.where(counts > 0, objective_weights / jnp.maximum(counts, 1e-9), 0.0)",
        new="return jnp.where(counts > 0, objective_weights / jnp.maximum(counts.sum(), 1e-9), 0.0)",
        tests=["tests/training/test_loss.py::test_the_scale_divides_a_weight_by_its_count"],
    ),
    Mutant(
        id="L2",
        what="step_by_step weighs (1, 0.5)",
        file="stepdistill_jax/data/objectives.py",
        old=("def step_by_step(\n    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5"),
        new=("def step_by_step(\n    label_weight: Weight = 1.0, rationale_weight: Weight = 0.5"),
        tests=[
            "tests/data/test_objectives.py::test_an_arm_has_a_part_with_its_own_weights[step_by_step]"
        ],
    ),
    Mutant(
        id="L3",
        what="the gradient of a token's target ignores the token's share",
        file="stepdistill_jax/training/cross_entropy.py",
        old="jnp.where(is_target, share[:, None], 0.0)",
        new="jnp.where(is_target, jnp.sign(share)[:, None], 0.0)",
        tests=[
            "tests/training/test_cross_entropy.py::test_any_chunk_gives_the_plain_losss_values_and_gradients"
        ],
    ),
    Mutant(
        id="ST1",
        what="all slices of a step share one dropout key",
        file="stepdistill_jax/training/step.py",
        old="rng = jax.random.fold_in(step_rng, index)",
        new="rng = step_rng",
        tests=[
            "tests/training/test_step.py::test_equal_rows_in_two_slices_meet_different_dropout_masks"
        ],
    ),
    Mutant(
        id="ST3",
        what="a gradient that is not finite is applied where the loss is finite",
        file="stepdistill_jax/training/step.py",
        old="finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)",
        new="finite = jnp.isfinite(loss)",
        tests=[
            "tests/training/test_step.py::test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is"
        ],
    ),
    Mutant(
        id="ST4",
        what="skipped steps delay the learning rate",
        file="stepdistill_jax/training/step.py",
        old="tx.update(grads, _scheduled_at(state.opt_state, state.step), trained)",
        new="tx.update(grads, state.opt_state, trained)",
        tests=[
            "tests/faults/test_numbers.py::test_a_bad_step_changes_nothing_is_counted_and_names_its_examples"
        ],
    ),
    Mutant(
        id="ST5",
        what="gradients are clipped after the update rule",
        file="stepdistill_jax/training/optimizer.py",
        old="return optax.chain(_clip_by_global_norm(o.clip_norm), rule)",
        new="return optax.chain(rule, _clip_by_global_norm(o.clip_norm))",
        tests=["tests/training/test_optimizer.py::test_adamw_takes_the_step_that_its_paper_says"],
    ),
    Mutant(
        id="ST6",
        what="Adafactor is not scaled by the parameter, and its decay is 0.99",
        file="stepdistill_jax/training/optimizer.py",
        old=("            decay_rate=0.8,\n            multiply_by_parameter_scale=True,"),
        new=("            decay_rate=0.99,\n            multiply_by_parameter_scale=False,"),
        tests=[
            "tests/training/test_optimizer.py::test_adafactor_takes_the_step_that_its_paper_says"
        ],
    ),
    Mutant(
        id="ST9",
        what="a run whose learning rate ends with it gets more steps",
        file="stepdistill_jax/training/provenance.py",
        old='if shape in FALLING and rate.get("train_steps") is None:',
        new='if shape == "cosine" and rate.get("train_steps") is None:',
        tests=[
            "tests/training/test_provenance.py::test_steps_are_added_where_no_rate_depends_on_their_number"
        ],
    ),
    Mutant(
        id="ST10",
        what="no device is spared a part of the state of a user's update rule",
        file="stepdistill_jax/training/state.py",
        old="if found := known.get(path[-length:]):",
        new="if found := known.get(path[:length]):",
        tests=[
            "tests/training/test_optimizer_function.py::test_the_state_is_cut_like_the_parameters"
        ],
    ),
    Mutant(
        id="ST11",
        what="skipped steps delay the rates that optax injects into a rule",
        file="stepdistill_jax/training/step.py",
        old='return getattr(x, "_fields", None) == ("count",)',
        new="return isinstance(x, optax.ScaleByScheduleState)",
        tests=[
            "tests/training/test_optimizer_function.py::test_a_skipped_step_leaves_any_state_and_does_not_delay_the_schedule"
        ],
    ),
    Mutant(
        id="ST8",
        what="dropout uses the key of the initialisation",
        file="stepdistill_jax/training/state.py",
        old="rng = jax.random.fold_in(key, 1)",
        new="rng = jax.random.fold_in(key, 0)",
        tests=["tests/training/test_step.py::test_the_key_of_dropout_has_drawn_no_parameter"],
    ),
    Mutant(
        id="EV1",
        what="validation leaves out its last batch",
        file="stepdistill_jax/training/validation.py",
        old="on_this_host(self.batches, 0, self.batches.num_steps, self.mesh)",
        new="on_this_host(self.batches, 0, max(1, self.batches.num_steps - 1), self.mesh)",
        tests=[
            "tests/training/test_evaluate.py::test_losses_are_means_over_all_tokens_of_the_split"
        ],
    ),
    Mutant(
        id="EV2",
        what="`unfinished` is the share that finished",
        file="stepdistill_jax/training/validation.py",
        old='{"unfinished": float(np.mean(~found.finished))}',
        new='{"unfinished": float(np.mean(found.finished))}',
        tests=[
            "tests/training/test_evaluate.py::test_unfinished_is_the_share_of_answers_that_do_not_end_within_max_decode_len"
        ],
    ),
    Mutant(
        id="EV3",
        what="the validation loss is a mean of batch means",
        file="stepdistill_jax/training/validation.py",
        old="            totals += np.array([sums.loss, sums.correct, sums.count], np.float64)\n",
        new=(
            "            share = np.array([sums.loss, sums.correct, sums.count], np.float64)\n"
            "            totals += share / np.maximum(share[2], 1e-9)\n"
        ),
        tests=[
            "tests/training/test_evaluate.py::test_losses_are_means_over_all_tokens_of_the_split"
        ],
    ),
    Mutant(
        id="EV4",
        what="a metric of scores gets those of the answers instead of the targets'",
        file="stepdistill_jax/training/validation.py",
        old="metrics.compute(found.ids, found.scores, target_scores)",
        new="metrics.compute(found.ids, found.scores, found.scores)",
        tests=[
            "tests/training/test_task_metrics.py::test_validation_gives_seqio_evaluators_values"
        ],
    ),
    Mutant(
        id="EV5",
        what="of BEST_METRIC the largest loss is best",
        file="stepdistill_jax/training/validation.py",
        old='value = -value if bare.startswith("loss") else value',
        new='value = -value if name == "loss/label" else value',
        tests=["tests/training/test_task_metrics.py::test_best_metric_chooses_the_step"],
    ),
    Mutant(
        id="M3",
        what="the tied head is not scaled",
        file="stepdistill_jax/models/encoder_decoder.py",
        old="return x if self.config.output_scale == 1.0 else x * self.config.output_scale",
        new="return x",
        tests=[
            "tests/models/test_tied_head.py::test_scaled_logits_are_divided_by_the_root_of_the_width"
        ],
    ),
    Mutant(
        id="M4",
        what="no dropout on the decoder's embeddings",
        file="stepdistill_jax/models/stacks.py",
        old="x, cache = layers(drop(x), windows, cache, context)",
        new="x, cache = layers(x, windows, cache, context)",
        tests=["tests/models/test_training_cost.py::test_dropout_has_all_the_places_of_t5"],
    ),
    Mutant(
        id="M5",
        what="no dropout after the decoder's last norm",
        file="stepdistill_jax/models/stacks.py",
        old='return drop(RMSNorm(c, name="decoder_norm")(x)), cache',
        new='return RMSNorm(c, name="decoder_norm")(x), cache',
        tests=["tests/models/test_training_cost.py::test_dropout_has_all_the_places_of_t5"],
    ),
    Mutant(
        id="M6",
        what="no dropout on the output of cross-attention",
        file="stepdistill_jax/models/stacks.py",
        old='x = x + drop(self.normed(y.reshape(x.shape), "cross_attention"))',
        new='x = x + self.normed(y.reshape(x.shape), "cross_attention")',
        tests=["tests/models/test_training_cost.py::test_dropout_has_all_the_places_of_t5"],
    ),
    Mutant(
        id="M7",
        what="all layers share one dropout mask",
        file="stepdistill_jax/models/stacks.py",
        old='split_rngs={"params": True, "dropout": True}',
        new='split_rngs={"params": True, "dropout": False}',
        tests=["tests/models/test_training_cost.py::test_each_layer_has_masks_of_its_own"],
    ),
    Mutant(
        id="M8",
        what="a packed target reads all inputs of its row",
        file="stepdistill_jax/models/encoder_decoder.py",
        old='cross_segments=(batch.get("decoder_encoder_segment_ids", target), source),',
        new="cross_segments=_one_segment(source > 0),",
        tests=["tests/models/test_t5.py::test_packed_examples_have_the_logits_of_examples_alone"],
    ),
    Mutant(
        id="M9",
        what="dropout does not scale up what it keeps",
        file="stepdistill_jax/models/dropout.py",
        old="(x.astype(jnp.float32) * (DRAWS / kept)).astype(x.dtype)",
        new="x",
        tests=[
            "tests/models/test_training_cost.py::test_dropout_meets_its_rate_and_keeps_the_mean"
        ],
    ),
    Mutant(
        id="M10",
        what="both positions of a random word share their draw",
        file="stepdistill_jax/models/dropout.py",
        old="jnp.where(position & HALF, words >> 16, words & (DRAWS - 1))",
        new="words & (DRAWS - 1)",
        tests=[
            "tests/models/test_training_cost.py::test_dropout_masks_are_independent_of_their_neighbours"
        ],
    ),
    Mutant(
        id="M11",
        what="a query sees the whole row, other examples and padding",
        file="stepdistill_jax/models/attention.py",
        old="mask = seen(query_segments, key_segments)",
        new="mask = seen(query_segments * 0 + 1, key_segments * 0 + 1)",
        tests=[
            "tests/models/test_attention.py::test_attention_is_the_mean_of_what_each_query_sees"
        ],
    ),
    Mutant(
        id="M12",
        what="a mask as large as the scores is made outside the layers' loop",
        file="stepdistill_jax/models/attention.py",
        old="hidden = (~mask).astype(jnp.float32) * NEG_INF",
        new="hidden = jnp.where(jnp.broadcast_to(mask, scores.shape), 0.0, NEG_INF)",
        tests=["tests/models/test_lowered_step.py::test_no_scores_or_masks_go_from_layer_to_layer"],
    ),
    Mutant(
        id="M13",
        what="float32 scores are multiplied at an accelerator's default precision",
        file="stepdistill_jax/models/attention.py",
        old='jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision)',
        new='jnp.einsum("bqhd,bkhd->bhqk", q, k)',
        tests=[
            "tests/models/test_lowered_step.py::test_float32_is_multiplied_as_float32_and_bfloat16_as_bfloat16"
        ],
    ),
    Mutant(
        id="G1",
        what="the norms of T5Gemma multiply by their scale, not by 1 plus it",
        file="stepdistill_jax/models/t5gemma.py",
        old="norm_offset: ClassVar[float] = 1.0",
        new="norm_offset: ClassVar[float] = 0.0",
        tests=GEMMA_PARITY,
    ),
    Mutant(
        id="G2",
        what="the windows of an encoder do not count the last place",
        file="stepdistill_jax/models/stacks.py",
        old="reach = [w + (not causal) if w",
        new="reach = [w if w",
        tests=GEMMA_PARITY,
    ),
    Mutant(
        id="G3",
        what="the windows of a decoder count one place more",
        file="stepdistill_jax/models/stacks.py",
        old="reach = [w + (not causal) if w",
        new="reach = [w + 1 if w",
        tests=GEMMA_PARITY,
    ),
    Mutant(
        id="G4",
        what="a token that is decoded reads one place more of the cache than its window",
        file="stepdistill_jax/models/stacks.py",
        old="near = context.key > context.index - window",
        new="near = context.key >= context.index - window",
        tests=GEMMA_GREEDY,
    ),
    Mutant(
        id="G5",
        what="the loss's gradient ignores the cap of logits",
        file="stepdistill_jax/training/cross_entropy.py",
        old="slope *= 1 - jnp.square(logits / softcap)",
        new="pass",
        tests=[
            "tests/training/test_cross_entropy.py::test_any_chunk_gives_the_plain_losss_values_and_gradients"
        ],
    ),
    Mutant(
        id="G6",
        what="positions turn neighbouring features, not those of the two halves",
        file="stepdistill_jax/models/positions.py",
        old="first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)",
        new="first, second = (x.astype(jnp.float32)[..., i::2] for i in (0, 1))",
        tests=GEMMA_PARITY,
    ),
    Mutant(
        id="G7",
        what="the decoder of T5Gemma begins with padding",
        file="stepdistill_jax/models/t5gemma.py",
        old="return self.bos_id",
        new="return 0",
        tests=GEMMA_PARITY,
    ),
    Mutant(
        id="G8",
        what="the embeddings of T5Gemma are not multiplied by the root of their width",
        file="stepdistill_jax/models/t5gemma.py",
        old="scaled_embeddings: ClassVar[bool] = True",
        new="scaled_embeddings: ClassVar[bool] = False",
        tests=GEMMA_PARITY,
    ),
    Mutant(
        id="G9",
        what="heads that are neighbours read different keys, where keys have fewer heads",
        file="stepdistill_jax/models/attention.py",
        old='jnp.einsum("bqhgd,bkhd->bhgqk"',
        new='jnp.einsum("bqhgd,bkhd->bghqk"',
        tests=[
            "tests/models/test_attention.py::test_attention_is_the_mean_of_what_each_query_sees"
        ],
    ),
    Mutant(
        id="G10",
        what="the same over a cache",
        file="stepdistill_jax/models/layers.py",
        old='product("bqhgd,bhdk->bhgqk"',
        new='product("bqhgd,bhdk->bghqk"',
        tests=GEMMA_GREEDY,
    ),
    Mutant(
        id="G11",
        what="the same over the encoder's states",
        file="stepdistill_jax/models/layers.py",
        old="jnp.repeat(found, groups, axis=1)",
        new="jnp.tile(found, (1, groups, 1))",
        tests=GEMMA_GREEDY,
    ),
    Mutant(
        id="KT1",
        what="the TPU kernel swaps the two draws of a random word",
        file="stepdistill_jax/models/kernels/tpu_programs.py",
        old="[words & (DRAWS - 1), words >> 16]",
        new="[words >> 16, words & (DRAWS - 1)]",
        tests=["tests/models/test_kernel_tpu.py::test_dropout_keeps_its_rate_and_mean"],
    ),
    Mutant(
        id="KT2",
        what="the TPU kernel's gradient forgets that dropout scales",
        file="stepdistill_jax/models/kernels/tpu_programs.py",
        old="dots = jnp.sum(dots.T, axis=0, keepdims=True) / scale",
        new="dots = jnp.sum(dots.T, axis=0, keepdims=True)",
        tests=[
            "tests/models/test_kernel_tpu.py::test_gradients_are_differences_of_values_with_the_mask_fixed"
        ],
    ),
    Mutant(
        id="KT3",
        what="a layer computed again calls the TPU's forward kernel again",
        file="stepdistill_jax/models/kernels/tpu.py",
        old="log_sums = checkpoint_name(log_sums, ATTENTION_OUTPUT)",
        new="pass",
        tests=[
            "tests/models/test_kernel_tpu.py::test_a_layer_computed_again_does_not_call_the_kernel_again"
        ],
    ),
    Mutant(
        id="M14",
        what="the output of attention is not kept by its name",
        file="stepdistill_jax/models/stacks.py",
        old="policies.save_only_these_names(ATTENTION_OUTPUT)",
        new="policies.save_only_these_names()",
        tests=[
            "tests/models/test_training_cost.py::test_the_output_of_attention_is_kept_by_its_name_and_once"
        ],
    ),
    Mutant(
        id="M15",
        what="attention weights do not share their mask where dropout's masks are shared",
        file="stepdistill_jax/models/layers.py",
        old="dropout_broadcast=c.dropout_broadcast,",
        new="",
        tests=["tests/models/test_training_cost.py::test_shared_masks_have_one_position_each"],
    ),
    Mutant(
        id="GK1",
        what="both halves of a GPU program's queries have the same draws",
        file="stepdistill_jax/models/kernels/gpu_tiles.py",
        old="draws = words >> 16 if half else words & (DRAWS - 1)",
        new="draws = words & (DRAWS - 1)",
        tests=[
            "tests/models/test_kernel_gpu.py::test_the_kernel_computes_what_plain_operations_do"
        ],
    ),
    Mutant(
        id="GK2",
        what="a GPU program reads queries after the end of its row",
        file="stepdistill_jax/models/kernels/gpu_tiles.py",
        old="return _rows(ref, start, HALF, call.q_len, call.queries, *row)",
        new="return _rows(ref, start, HALF, call.q_len, 1, *row)",
        tests=[
            "tests/models/test_kernel_gpu.py::test_the_kernel_computes_what_plain_operations_do"
        ],
    ),
    Mutant(
        id="IN1",
        what="a score continues after the end of its answer",
        file="stepdistill_jax/decoding/token_loop.py",
        old='"scores": state["scores"] + jnp.where(state["done"], 0.0, log_prob),',
        new='"scores": state["scores"] + log_prob,',
        tests=[
            "tests/decoding/test_greedy.py::test_ids_are_the_argmax_of_teacher_forcing_and_scores_their_log_probability"
        ],
    ),
    Mutant(
        id="IN2",
        what="the token loop never ends before max_decode_len",
        file="stepdistill_jax/decoding/token_loop.py",
        old='return (state["index"] < max_decode_len) & (going > enough)',
        new='return (state["index"] < max_decode_len) & (going > (enough or -1))',
        tests=["tests/decoding/test_greedy.py::test_rows_that_stop_early_end_the_loop"],
    ),
    Mutant(
        id="IN3",
        what="the few rows that continue are never gathered",
        file="stepdistill_jax/decoding/token_loop.py",
        old="    while isinstance(batch, int) and len(sizes) <= SMALLER_SIZES and sizes[-1] >= FEWER * FEWEST:",
        new="    while isinstance(batch, int) and len(sizes) <= 0 and sizes[-1] >= FEWER * FEWEST:",
        tests=[
            "tests/decoding/test_greedy.py::test_when_a_quarter_of_the_rows_is_left_these_are_decoded_by_themselves"
        ],
    ),
    Mutant(
        id="IN5",
        what="the length penalty counts one token less",
        file="stepdistill_jax/decoding/beam.py",
        old="np.arange(1, max_decode_len + 1.0) ** length_penalty",
        new="np.maximum(np.arange(max_decode_len + 0.0), 1) ** length_penalty",
        tests=["tests/decoding/test_beam.py::test_a_wide_beam_finds_the_best_of_all_answers"],
    ),
    Mutant(
        id="IN6",
        what="after a gather each row draws with another row's key",
        file="stepdistill_jax/decoding/sampling.py",
        old="(keys[places], index)",
        new="(keys[: logits.shape[0]], index)",
        tests=["tests/decoding/test_sampling.py::test_label_decoder_draws_the_same_in_any_order"],
    ),
    Mutant(
        id="IN7",
        what="top_k keeps one token too few",
        file="stepdistill_jax/decoding/sampling.py",
        old="last = jax.lax.top_k(logits, top_k)[0][..., -1:]",
        new="last = jax.lax.top_k(logits, max(top_k - 1, 1))[0][..., -1:]",
        tests=["tests/decoding/test_sampling.py::test_filtered_logits_are_those_of_transformers"],
    ),
    Mutant(
        id="IN8",
        what="the score of a choice is a mean over its ids",
        file="stepdistill_jax/decoding/choices.py",
        old="scores[place] = sums[1:].astype(np.float32)",
        new="scores[place] = (sums[1:] / np.bincount(owners[i].ravel())[1:]).astype(np.float32)",
        tests=[
            "tests/decoding/test_choices.py::test_what_greedy_decoding_answers_has_its_score_and_wins_where_it_is_likeliest"
        ],
    ),
    Mutant(
        id="IN11",
        what="the temperature multiplies",
        file="stepdistill_jax/inference/allowed_answers.py",
        old="(scores - scores[best]) / self.temperature",
        new="(scores - scores[best]) * self.temperature",
        tests=[
            "tests/inference/test_predict_choices.py::test_a_temperature_flattens_the_probabilities_and_leaves_label_and_score"
        ],
    ),
    Mutant(
        id="SV1",
        what="a client that leaves while its batch runs shifts the answers of the others",
        file="stepdistill_jax/serving/batcher.py",
        old=(
            "            for one, answer in zip(batch, answers, strict=True):\n"
            "                if not one.answer.done():\n"
            "                    one.answer.set_result(answer)"
        ),
        new=(
            "            waiting = [one for one in batch if not one.answer.done()]\n"
            "            for one, answer in zip(waiting, answers, strict=False):\n"
            "                one.answer.set_result(answer)"
        ),
        tests=[
            "tests/serving/test_batcher.py::test_a_client_that_leaves_while_a_batch_runs_shifts_no_answer"
        ],
    ),
    Mutant(
        id="SV2",
        what="the queue takes one row more than max_queue",
        file="stepdistill_jax/serving/batcher.py",
        old="if self.rows + len(rows) > self.max_queue:",
        new="if self.rows + len(rows) > self.max_queue + 1:",
        tests=[
            "tests/serving/test_batcher.py::test_a_full_queue_takes_all_rows_of_a_request_or_none"
        ],
    ),
    Mutant(
        id="SV3",
        what="a lane that returns is owed its pause",
        file="stepdistill_jax/serving/batcher.py",
        old="                lane.seconds = max(lane.seconds, self._time)\n",
        new="                pass\n",
        tests=["tests/serving/test_batcher.py::test_a_pause_gives_no_lane_a_claim_to_the_engine"],
    ),
    Mutant(
        id="SV4",
        what="answers are given in reverse order",
        file="stepdistill_jax/serving/batcher.py",
        old="for one, answer in zip(batch, answers, strict=True):",
        new="for one, answer in zip(batch, reversed(answers), strict=True):",
        tests=[
            "tests/serving/test_batcher.py::test_rows_that_come_while_a_batch_runs_are_the_next_one"
        ],
    ),
    Mutant(
        id="FM1",
        what="bfloat16 is read as float16",
        file="stepdistill_jax/formats/torch_bin.py",
        old=".view(ml_dtypes.bfloat16)",
        new=".view(np.float16)",
        tests=["tests/formats/test_torch_bin.py::test_other_float_types_are_read_to_float32"],
    ),
    Mutant(
        id="FM2",
        what="a shard may exceed its limit by one tensor",
        file="stepdistill_jax/formats/hf.py",
        old="if shards[-1] and filled + size > most:",
        new="if shards[-1] and filled > most:",
        tests=[
            "tests/formats/test_saving.py::test_shards_are_named_and_indexed_as_hugging_face_does"
        ],
    ),
    Mutant(
        id="FM3",
        what="square matrices (the encoder's query) are not transposed",
        file="stepdistill_jax/formats/parameter_names.py",
        old='return path.endswith(("/kernel", "/rel_embedding"))',
        new=(
            'return path.endswith(("/kernel", "/rel_embedding")) '
            'and not path.endswith("attention/query/kernel")'
        ),
        tests=[
            "tests/formats/test_hf.py::test_written_tensors_have_the_names_and_orientation_of_torch"
        ],
    ),
    Mutant(
        id="FM4",
        what="the layers of a stacked checkpoint are read in reverse",
        file="stepdistill_jax/formats/tensors.py",
        old="out[...] = self.stacks[name][(slice(layers.start, layers.stop), *index)]",
        new="out[...] = self.stacks[name][(slice(layers.start, layers.stop), *index)][::-1]",
        tests=[
            "tests/formats/test_t5x.py::test_the_first_form_gives_sizes_and_weights[t5_v1_1-stacked]"
        ],
    ),
    Mutant(
        id="FM5",
        what="tokenizer.json merges the pairs of a Gemma in alphabetical order",
        file="stepdistill_jax/formats/tokenizer.py",
        old="sorted(scores, key=lambda piece: -scores[piece])",
        new="sorted(scores)",
        tests=[
            "tests/formats/test_tokenizer.py::test_transformers_frames_the_inputs_and_pairs_of_a_gemma_as_we_do"
        ],
    ),
    Mutant(
        id="FM6",
        what="a T5 is opened with the vocabulary of a Gemma",
        file="stepdistill_jax/formats/directory.py",
        old="    if config.start_id not in ([bos] if bos else [PAD_ID, EOS_ID]):\n",
        new="    if config.start_id not in [bos, PAD_ID, EOS_ID]:\n",
        tests=["tests/formats/test_directory.py::test_a_vocabulary_of_another_family_is_refused"],
    ),
    Mutant(
        id="SH1",
        what="attention is not split over `tensor`",
        file="stepdistill_jax/models/sharding.py",
        old='("joined_kv", "tensor"),',
        new='("joined_kv", None),',
        tests=[
            "tests/models/test_sharding.py::test_a_layout_cuts_width_by_fsdp_and_heads_mlp_and_vocabulary_by_tensor"
        ],
    ),
    Mutant(
        id="SH2",
        what="the embedding is split over fsdp by its vocabulary",
        file="stepdistill_jax/models/sharding.py",
        old='    ("vocab", "tensor"),\n',
        new='    ("vocab", "fsdp"),\n',
        tests=["tests/models/test_sharding.py::test_a_dimension_that_is_not_divided_is_named"],
    ),
    Mutant(
        id="SH3",
        what="heads of keys and values are cut inside",
        file="stepdistill_jax/models/sharding.py",
        old='if count % mesh.shape["tensor"]:',
        new="if False:",
        tests=["tests/models/test_sharding.py::test_heads_that_are_shared_are_cut_whole"],
    ),
    Mutant(
        id="PL1",
        what="plan counts the rows of one device on any layout",
        file="stepdistill_jax/planning/workload.py",
        old="batches = batches_of(config, data, row_multiple=multiple)",
        new="batches = batches_of(config, data, row_multiple=1)",
        tests=["tests/planning/test_plan.py::test_rows_are_those_that_a_run_packs"],
    ),
    Mutant(
        id="PL2",
        what="plan compiles layouts that leave most rows empty, and takes them",
        file="stepdistill_jax/planning/candidates.py",
        old="if least is not None and flops > WASTE * least:",
        new="if least is not None and flops < 0:",
        tests=["tests/planning/test_plan.py::test_layouts_that_leave_rows_empty_come_last"],
    ),
    Mutant(
        id="PL3",
        what="plan advises slices whose rows would be empty",
        file="stepdistill_jax/planning/advice.py",
        old="if work.step_flops(shards * k) <= base.most_flops)",
        new="if k)",
        tests=[
            "tests/commands/test_plan.py::test_advice_is_typed_as_printed_and_gives_what_it_says"
        ],
    ),
    Mutant(
        id="PL4",
        what="the figures of advice are those of the candidate that does not fit",
        file="stepdistill_jax/planning/advice.py",
        old='return {**found, "changes": changes}',
        new='return {**found, **base.found, "fits": found["fits"], "changes": changes}',
        tests=[
            "tests/commands/test_plan.py::test_advice_is_typed_as_printed_and_gives_what_it_says"
        ],
    ),
]


def problems(mutant: Mutant, root: pathlib.Path = ROOT) -> list[str]:
    """Why `mutant` cannot be planted or tested in `root`, one line each; none when it can."""
    file = root / mutant.file
    times = file.read_text("utf-8").count(mutant.old) if file.is_file() else 0
    found = []
    if times != 1:
        found.append(
            f"`old` is in {mutant.file} {times} times, expected once; rewrite `old`, `new`"
        )
    if not mutant.tests:
        found.append("no tests are listed")
    for test in mutant.tests:
        path, *names = test.split("::")
        if not (root / path).exists():
            found.append(f"no such test file: {path}")
        elif names:
            name = names[-1].partition("[")[0]
            if f"def {name}(" not in (root / path).read_text("utf-8"):
                found.append(f"no such test: {test}")
    return [f"{mutant.id}: {line}" for line in found]


def copy_repository(folder: pathlib.Path) -> None:
    """Copies the working tree's files to `folder`, without those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: pathlib.Path, tests: Sequence[str], *flags: str) -> tuple[int, str]:
    """Runs `tests` of the copy in `folder` up to the first failure: pytest's status and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    # the compiled programs of the working tree's tests serve the copies, too
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    flags = (*flags, f"--basetemp={folder}.tmp")
    done = subprocess.run(
        [*command, *flags, *tests], cwd=folder, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def try_mutant(folder: pathlib.Path, mutant: Mutant) -> tuple[str, str]:
    """Plants `mutant` in the copy in `folder`, tests it and restores the file.

    Returns:
        "killed" and the node id of the test that failed; "survived" and the tests that passed; or
        "error" and the end of pytest's output.
    """
    path = folder / mutant.file
    path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
    # Python knows a stale .pyc by the time and size of its source: each mutant has its own time
    moment = 1 + [m.id for m in MUTANTS].index(mutant.id)
    os.utime(path, (moment, moment))
    try:
        status, output = run_tests(folder, mutant.tests)
    finally:
        shutil.copy2(ROOT / mutant.file, path)
    failed = re.search(r"^(?:FAILED|ERROR) ([^\[\s]+(?:\[.*?\])?)(?: - .*)?$", output, re.M)
    if status == 0:
        return "survived", " ".join(mutant.tests)
    if status == 1 and failed:
        return "killed", failed[1]
    return "error", output[-2000:]


def try_all(mutants: Sequence[Mutant], jobs: int) -> list[str]:
    """Tries `mutants`, `jobs` at once, and prints a line for each; the ids that were not killed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        folders: queue.Queue[pathlib.Path] = queue.Queue()
        for job in range(jobs):
            folder = pathlib.Path(work, f"copy{job}")
            copy_repository(folder)
            folders.put(folder)

        def tried(mutant: Mutant) -> tuple[str, str, float]:
            folder = folders.get()
            start = time.monotonic()
            try:
                return *try_mutant(folder, mutant), time.monotonic() - start
            finally:
                folders.put(folder)

        print("the tests on the code as it is ...", flush=True)
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        start = time.monotonic()
        status, output = run_tests(pathlib.Path(work, "copy0"), tests, "-n", str(jobs))
        if status:
            sys.exit(f"the tests fail without a mutant:\n{output[-2000:]}")
        print(f"passed in {time.monotonic() - start:.0f} s", flush=True)
        alive = []
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for mutant, (outcome, by, seconds) in zip(
                mutants, pool.map(tried, mutants), strict=True
            ):
                print(f"{outcome:8} {mutant.id:4} {seconds:5.1f} s  {by}", flush=True)
                if outcome != "killed":
                    alive.append(mutant.id)
    return alive


def chosen(only: str | None, part: str) -> list[Mutant]:
    """The mutants of `--only` (all without it), and of these every n-th from the k-th (`k/n`)."""
    ids = only.split(",") if only else [m.id for m in MUTANTS]
    if unknown := set(ids) - {m.id for m in MUTANTS}:
        sys.exit(f"--only: no such mutant: {', '.join(sorted(unknown))}")
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        sys.exit(f"--part: expected K/N with K from 1 to N, got {part}")
    return [m for m in MUTANTS if m.id in ids][int(found[1]) - 1 :: int(found[2])]


def main() -> int:
    """Reads the flags, tries the mutants; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="ID[,ID]", help="only these mutants")
    parser.add_argument("--part", metavar="K/N", default="1/1", help="the K-th of N equal parts")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (default 2)")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    flags = parser.parse_args()
    if flags.jobs < 1:
        parser.error(f"--jobs: expected 1 or more, got {flags.jobs}")
    mutants = chosen(flags.only, flags.part)
    if flags.list:
        for mutant in mutants:
            print(f"{mutant.id:4} {mutant.file}: {mutant.what}")
        return 0
    if lines := [line for mutant in mutants for line in problems(mutant)]:
        print("\n".join(lines), file=sys.stderr)
        return 1
    start = time.monotonic()
    alive = try_all(mutants, flags.jobs)
    killed = f"{len(mutants) - len(alive)} of {len(mutants)} killed"
    print(f"{killed} in {(time.monotonic() - start) / 60:.1f} minutes", *alive)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
