"""Says in words what the numbers of a run mean while there is still time to act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SILENT_ITERATIONS = 200
MANY_BOXES = 3.0
LOSS_RATIO = 100.0
DATA_SHARE = 0.3
START_UP = 20  # iterations in which loader processes start and say nothing about their pace
NAMED_CLASSES = 5
WORSE_EVALUATIONS = 3


@dataclass
class Health:
    """Turns logged numbers into warnings; each is given once until its condition went away.

    Args:
        classes: class names by label.
        score_thr: score above which the method keeps a pseudo box.
        boxes_per_labeled: mean number of boxes on a labelled image.
        workers: loader processes, for the advice on slow data.
        burn_in: whether the method can begin with labelled images alone, for the advice on missing pseudo labels.
    """

    classes: Sequence[str]
    score_thr: float
    boxes_per_labeled: float
    workers: int = 0
    burn_in: bool = True
    _active: set[str] = field(default_factory=set)
    _silent_since: int | None = None
    _best_score: float = 0.0
    _gate_shut_since: int | None = None
    _worse: int = 0

    def start(
        self, labeled_counts: Mapping[str, int], labeled_batch: int, reference_batch: int, lr: float, drawn: bool = False
    ) -> list[str]:
        """Warnings that are known before the first step.

        Args:
            labeled_counts: boxes per class in the labelled set.
            labeled_batch: labelled images per optimizer step over all ranks and accumulated steps.
            reference_batch: what the recipe was published with.
            lr: learning rate in use.
            drawn: the labelled images were drawn here, and others could have been.
        """
        out = []
        missing = [name for name in self.classes if not labeled_counts.get(name)]
        if missing:
            advice = ": draw another fold or use --cover-classes" if drawn else ""
            out.append(f"{len(missing)} of {len(self.classes)} classes have no labelled box ({_listed(missing)}){advice}")
        if labeled_batch * 2 <= reference_batch:
            sizes = f"labelled images per step {labeled_batch}, reference {reference_batch}"
            out.append(f"{sizes}: published numbers will not be reached; lr in use {lr:.3g}")
        return out

    def after_log(self, it: int, log: Mapping[str, Any]) -> list[str]:
        """Warnings from one train line: its losses by branch, pseudo-label counts and time shares."""
        pseudo = log.get("pseudo")
        found = self._loss_ratio(log.get("losses", {}))
        if it >= START_UP:
            found |= self._data_time(log.get("time_split", {}))
        if pseudo is not None:
            found |= {**self._silence(it, pseudo), **self._crowding(pseudo), **self._gate(it, pseudo)}
        return self._new(found, {"ratio", "data", "silent", "crowd", "gate"})

    def after_eval(
        self, teacher: Mapping[str, Any] | None, student: Mapping[str, Any], pseudo_per_class: Mapping[str, int] | None
    ) -> list[str]:
        """Warnings from one evaluation and from the pseudo boxes per class since the last one (None: not counted)."""
        silent = [name for name, count in (pseudo_per_class or {}).items() if count == 0]
        found = {f"class {name}": "" for name in silent}
        new = [name for name in silent if f"class {name}" not in self._active]
        if new:  # one message for all of them
            which = f"class {new[0]!r}" if len(new) == 1 else f"{len(new)} of {len(self.classes)} classes ({_listed(new)})"
            found[f"class {new[0]}"] = f"{which} got 0 pseudo labels since the last evaluation"
        if teacher is not None:
            # AP -1 means that there was nothing to find: no ground for a comparison.
            self._worse = self._worse + 1 if 0 <= teacher["AP"] < student["AP"] else 0
            if self._worse >= WORSE_EVALUATIONS or (teacher["AP"] == 0 and student["AP"] > 0.01):
                found["worse"] = "teacher is worse than student: EMA too slow or teacher not initialised"
        return self._new(found, {"worse", *(f"class {name}" for name in self.classes)})

    def _new(self, found: Mapping[str, str], scope: set[str]) -> list[str]:
        """Messages that were not given yet; keys of `scope` that are no longer found may be given again."""
        messages = [text for key, text in found.items() if text and key not in self._active]
        self._active = (self._active - scope) | set(found)
        return messages

    def _silence(self, it: int, pseudo: Mapping[str, Any]) -> dict[str, str]:
        if pseudo["kept_per_image"] > 0:
            self._silent_since = None
            return {}
        if self._silent_since is None:
            self._silent_since, self._best_score = it, 0.0
        self._best_score = max(self._best_score, pseudo["max_score"])
        quiet = it - self._silent_since
        if quiet < SILENT_ITERATIONS:
            return {}
        best = f"best teacher score {self._best_score:.2f}"
        if self._best_score > self.score_thr:
            return {"silent": f"no pseudo label for {quiet} iterations: {best} is above thr {self.score_thr:g}, another filter takes all"}
        advice = "burn in longer (--burn-in) or lower --thr" if self.burn_in else "lower --thr"
        return {"silent": f"no pseudo label for {quiet} iterations: {best} is below thr {self.score_thr:g}; {advice}"}

    def _gate(self, it: int, pseudo: Mapping[str, Any]) -> dict[str, str]:
        if pseudo.get("gate") != 0 or pseudo["kept_per_image"] == 0:
            self._gate_shut_since = None
            return {}
        self._gate_shut_since = it if self._gate_shut_since is None else self._gate_shut_since
        shut = it - self._gate_shut_since
        if shut < SILENT_ITERATIONS:
            return {}
        text = (
            f"the unsupervised loss was gated off for {shut} iterations: {pseudo['kept_per_image']:.2f} pseudo boxes per image are kept, "
        )
        return {"gate": text + "but some image of each batch has none; lower --thr or use --method.gate per_image"}

    def _crowding(self, pseudo: Mapping[str, Any]) -> dict[str, str]:
        kept = pseudo["kept_per_image"]
        if kept <= MANY_BOXES * max(self.boxes_per_labeled, 1.0):
            return {}
        return {"crowd": f"{kept:.0f} pseudo boxes per image, labelled images have {self.boxes_per_labeled:.1f}: threshold too low?"}

    def _loss_ratio(self, losses: Mapping[str, float]) -> dict[str, str]:
        supervised = sum(v for k, v in losses.items() if k.startswith("sup/"))
        others = {k: v for k, v in losses.items() if not k.startswith("sup/")}
        if not others or supervised <= 0 or sum(others.values()) <= LOSS_RATIO * supervised:
            return {}
        worst = max(others, key=lambda k: others[k])
        return {"ratio": f"unsup loss {sum(others.values()) / supervised:.0f}x sup loss, most of it in {worst}"}

    def _data_time(self, split: Mapping[str, float]) -> dict[str, str]:
        total = sum(split.values())
        if not total or split.get("data", 0.0) <= DATA_SHARE * total:
            return {}
        share = 100 * split["data"] / total
        return {"data": f"{share:.0f} % of the time waits for data: more --workers (now {self.workers}) or smaller images"}

    def state_dict(self) -> dict[str, Any]:
        """Counters and which warnings were given."""
        names = ("_silent_since", "_best_score", "_gate_shut_since", "_worse")
        return {"active": sorted(self._active), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        values = dict(state)
        self._active = set(values.pop("active"))
        for name, value in values.items():
            setattr(self, name, value)


def _listed(names: Sequence[str]) -> str:
    """The first names, quoted."""
    return ", ".join(map(repr, names[:NAMED_CLASSES])) + (", ..." if len(names) > NAMED_CLASSES else "")
