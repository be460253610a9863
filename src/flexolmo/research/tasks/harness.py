"""lm-evaluation-harness on our models: its tasks, its engine.

Needs the `lm_eval` package (pip install -e '.[eval]').
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import ConfigError

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as e:
    raise ConfigError(
        f"lm-evaluation-harness is needed and is not here ({e}); pip install -e '.[eval]'."
    ) from None

from flexolmo.evaluation.scorer import Scorer
from flexolmo.inference.reader import Reader, open_reader
from flexolmo.inference.sampling import Sampling

DEFAULT_NEW_TOKENS = 256  # the harness's own


@register_model("flexolmo")
class HarnessModel(LM):  # type: ignore[misc]
    """Any model that `open_reader` opens, as the harness calls it: `--model flexolmo --model_args
    pretrained=model,trust=trusted,without=news`; several experts are joined by "+".
    """

    def __init__(
        self,
        pretrained: str | Reader,
        without: str = "",
        only: str | None = None,
        batch_size: int | str | None = 32,
        device: str | None = "cpu",
        trust: str | None = None,
        **_: Any,
    ):
        super().__init__()
        self._device = torch.device(device or "cpu")
        if isinstance(pretrained, str):
            pretrained, self.about = open_reader(
                Path(pretrained),
                None if trust is None else TrustedOwners.load(Path(trust)),
                without=_joined(without),
                only=None if only is None else _joined(only),
                device=self._device,
            )
        size = 32 if batch_size in (None, "auto") else int(batch_size)
        self.scorer = Scorer(pretrained, size)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        scores = self.scorer.log_likelihoods([r.args for r in requests])
        return [(s.log_prob, s.is_greedy) for s in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [r.args[0] for r in requests]
        return [s.log_prob for s in self.scorer.rolling_log_likelihoods(texts)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            by_settings.setdefault(json.dumps(r.args[1], sort_keys=True), []).append(i)
        for settings, places in by_settings.items():
            asked = json.loads(settings)
            stops = asked.get("until") or []
            temperature = asked.get("temperature") or 0.0
            if not asked.get("do_sample", temperature > 0):
                temperature = 0.0
            limit = asked.get("max_gen_toks", asked.get("max_new_tokens", DEFAULT_NEW_TOKENS))
            room = self.scorer.reader.max_seq_len
            sampling = Sampling(
                max_new_tokens=int(limit) if int(limit) < room else room // 2,
                temperature=temperature,
                top_k=asked.get("top_k") or None,
                top_p=asked.get("top_p", 1.0),
            )
            written = self.scorer.continuations(
                [requests[i].args[0] for i in places],
                sampling,
                [stops] if isinstance(stops, str) else stops,
            )
            for i, (text, _) in zip(places, written, strict=True):
                found[i] = text
        return found


def run_harness(
    reader: Reader,
    tasks: Sequence[str],
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, dict[str, Any]]:
    """The harness's results by task. ConfigError: a task that it does not know, or whose data it
    cannot get."""
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown or not tasks:
        raise ConfigError(
            f"lm-evaluation-harness knows no task {', '.join(unknown) or '(none)'}; "
            "name one of its own, or the directory of yours by --include-path."
        )
    try:
        found = simple_evaluate(
            HarnessModel(reader, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
        )
    except (OSError, ValueError) as e:
        raise ConfigError(f"lm-evaluation-harness could not run {', '.join(tasks)}: {e}") from None
    return {
        name: {k: v for k, v in values.items() if isinstance(v, int | float | str)}
        for name, values in found["results"].items()
    }


def _joined(names: str) -> list[str]:
    return [n for n in names.split("+") if n]
