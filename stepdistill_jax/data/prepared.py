"""Finding and opening what `prepare` wrote; reads no TensorFlow."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator

from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.files import local_path, read_json, read_jsonl

FILE = "dataset.json"
VOCABULARY = "spiece.model"
TFDS_VERSION = "1.0.0"  # and the name of the folder of the TFDS files
ORIGINALS = ("cqa", "svamp", "esnli", "anli")  # prepared from the paper's files, or an export's
EMBEDDED = "delivery"  # needs no source, so it is prepared on first use


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A dataset on disk.

    Attributes:
        name: the dataset's, and its folder's.
        directory: `data_dir/name`, with SPLIT.jsonl, defects.jsonl, spiece.model and TFDS's 1.0.0/.
        fingerprint: digest of the sources, the reader and the rows.
        metric: `text_match` or `value_match`.
        splits: number of rows by split.
        labels: the labels of train, sorted, where they are at most 50 and rows have no choices.
    """

    name: str
    directory: pathlib.Path
    fingerprint: str
    metric: str
    splits: dict[str, int]
    labels: tuple[str, ...] = ()

    @property
    def spiece_model(self) -> pathlib.Path:
        """The vocabulary that was trained on train.

        Raises:
            InputError: there was no train split to learn one from.
        """
        path = self.directory / VOCABULARY
        if not path.is_file():
            raise InputError(
                f"{path}: no vocabulary, since {self.name} was prepared without a train split;"
                " take a model directory's (INIT_FROM) or `bytes`"
            )
        return path

    def file(self, split: str) -> pathlib.Path:
        """SPLIT.jsonl.

        Raises:
            InputError: the dataset has no such split; names those it has.
        """
        if split not in self.splits:
            raise InputError(
                f"{self.name}: no split {split!r} (it has {', '.join(self.splits)})"
                f"{nearest(split, self.splits)}"
            )
        return self.directory / f"{split}.jsonl"

    def examples(self, split: str) -> Iterator[Example]:
        """The rows of a split, in the order of the TFDS dataset.

        Raises:
            InputError: no such split, or its file is gone or damaged.
        """
        path = self.file(split)  # checked at the call, not at the first row
        return (example_from_json(row) for _, row in read_jsonl(path))


def example_from_json(row: dict) -> Example:
    """An Example of a row that `Example.to_json` wrote."""
    return Example(
        **{
            **row,
            "rationales": tuple(Rationale(**r) for r in row.get("rationales", ())),
            "choices": tuple(row.get("choices", ())),
        }
    )


def default_data_dir() -> pathlib.Path:
    """`$STEPDISTILL_DATA_DIR`, else `stepdistill` in the user's cache folder."""
    if folder := os.environ.get("STEPDISTILL_DATA_DIR"):
        return pathlib.Path(folder).expanduser()
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("stepdistill", appauthor=False))


def data_folder(data_dir: os.PathLike | str | None) -> pathlib.Path:
    """`data_dir`, or the default one for None.

    Raises:
        InputError: it is a URL: token stores are memory-mapped, which takes a file system.
    """
    return local_path(default_data_dir() if data_dir is None else data_dir, "--data-dir")


def prepared_names(data_dir: os.PathLike | str) -> list[str]:
    """Names of the datasets that are prepared in `data_dir`."""
    return sorted(path.parent.name for path in pathlib.Path(data_dir).glob(f"[!.]*/{FILE}"))


def open_prepared(name: str, data_dir: os.PathLike | str | None = None) -> PreparedDataset:
    """The prepared dataset `name`.

    Args:
        name: a folder of `data_dir`.
        data_dir: None for the default one.

    Raises:
        InputError: it is not prepared there (lists those that are, and how to prepare it), or what
            is there is damaged.
    """
    directory = data_folder(data_dir) / name
    path = directory / FILE
    if not path.is_file():
        names = prepared_names(directory.parent)
        raise InputError(
            f"dataset {name!r} is not prepared in {directory.parent}"
            f" (prepared: {', '.join(names) or 'none'}){nearest(name, names)};"
            f" {how_to_prepare(name)}"
        )
    stored = read_json(path)
    try:
        dataset = PreparedDataset(
            name,
            directory,
            stored["fingerprint"],
            stored["metric"],
            dict(stored["splits"]),
            tuple(stored["labels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error!r}); {how_to_prepare(name)}") from None
    needed = [f"{split}.jsonl" for split in dataset.splits] + [TFDS_VERSION]
    if "train" in dataset.splits:
        needed.append(VOCABULARY)
    for file in (directory / part for part in needed):
        if not file.exists():
            raise InputError(f"{file}: gone; {how_to_prepare(name)}")
    return dataset


def how_to_prepare(name: str) -> str:
    """The command that prepares `name`."""
    if name == EMBEDDED:
        return f"run `stepdistill prepare {name}`"
    if name in ORIGINALS:
        return f"run `stepdistill prepare {name} --source DIR`"
    return f"run `stepdistill prepare jsonl --source FILE --name {name}`"
